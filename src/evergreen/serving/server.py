"""The inference server: KServe's HTTP and gRPC protocols around one model, from its start to its last request."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen.contracts.errors import EvergreenError
from evergreen.serving.settings import ServeSettings

if TYPE_CHECKING:
    from evergreen.serving.impressions import ImpressionLog
    from evergreen.serving.recommender import Recommender
    from evergreen.serving.tracing import Tracing

OpenModel = Callable[[Path], Awaitable["Recommender"]]
"""From the directory of a model package to a recommender that is ready to answer."""

_BACKGROUND_SECONDS = 60.0
_METRICS_FOLDERS = ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR")

logger = logging.getLogger(__name__)


def serve(settings: ServeSettings) -> None:
    """Load a model package and its features, then answer requests until the process is told to stop.

    Raises:
        ArtifactError: a directory is missing or is not what it should be.
        InputError: impressions cannot be logged there, or a file of rules or tokens is broken.
        EvergreenError: the port cannot be had.
    """
    # What can be told at once is told before kserve, torch and Feast are imported, which takes ten seconds and more.
    settings.check()
    with ExitStack() as stack:
        listener = stack.enter_context(listen_on(settings.host, settings.port))
        _prepare_process(settings.threads)
        from evergreen.serving.impression_sinks import open_sink
        from evergreen.serving.impressions import ImpressionLog
        from evergreen.serving.rules import AnswerRules
        from evergreen.serving.tracing import Tracing

        rules = AnswerRules.load(settings.rules) if settings.rules else None
        tracing = None
        if settings.otlp_endpoint:
            tracing = Tracing(settings.otlp_endpoint, service_name=settings.name)
            stack.callback(tracing.close)
        log = None
        if settings.impressions is not None:
            log = ImpressionLog(open_sink(settings.impressions), sampling_rate=settings.impression_sampling)
            stack.callback(log.close)
        try:
            forced = _run(Server(settings, opener(settings, rules, log), tracing), listener)
        except OSError as error:  # another server bound the same port while both were loading, and listens already
            raise _no_port(settings.host, settings.port, error) from error
        if forced and log is not None:
            log.close(deadline_seconds=0)
    logger.info("stopped")


def opener(settings: ServeSettings, rules: Any, impressions: ImpressionLog | None) -> OpenModel:
    """How a server opens a model package: beside the event loop, and not before it has answered once."""
    from evergreen.serving.recommender import Recommender

    def load(model: Path) -> Recommender:
        recommender = Recommender.load(
            model,
            settings.feature_store,
            retriever=settings.retriever_of(model),
            rules=rules,
            impressions=impressions,
            items_url=settings.items,
            deadline_seconds=settings.deadline_ms / 1000,
            device=settings.device,
        )
        for name in _METRICS_FOLDERS:  # Feast is imported, and nobody else is to find an empty name
            if os.environ.get(name) == "":
                del os.environ[name]
        return recommender

    async def open_model(model: Path) -> Recommender:
        # Followed once: a link that is switched meanwhile must not give half of another package.
        recommender = await asyncio.to_thread(load, model.resolve())
        try:
            await recommender.warm_up()
        except BaseException:
            await recommender.close()
            raise
        recommender.start(settings.refresh_seconds)
        return recommender

    return open_model


class Server:
    """One server with its model; `serve` is called once, on the event loop that it is to use."""

    def __init__(self, settings: ServeSettings, open_model: OpenModel, tracing: Tracing | None = None) -> None:
        """Assemble the server. Nothing is loaded and nothing listens yet.

        Args:
            settings: of the server.
            open_model: see there.
            tracing: makes spans; None: none.

        Raises:
            InputError: the file of tokens is broken.
        """
        from evergreen.serving.auth import Gate, RequireAuthCalls
        from evergreen.serving.logs import IdentifyCalls, quiet_libraries
        from evergreen.serving.metrics import CountCalls
        from evergreen.serving.predictor import RecommenderModel
        from evergreen.serving.protocol import RecommenderDataPlane
        from evergreen.serving.repository import ModelSlot, Repository
        from evergreen.serving.rest import RestServer, registry_of
        from evergreen.serving.tracing import TraceCalls

        quiet_libraries()
        self._settings = settings
        self._open_model = open_model
        self.slot = ModelSlot(settings.name)
        registry = registry_of(settings.name, RecommenderModel(settings.name, self.slot), settings.port)
        data_plane = RecommenderDataPlane(registry)
        repository = Repository(
            registry,
            self.slot,
            open_model,
            model=settings.model,
            folder=settings.model_repository,
            allow_load=settings.allow_reload,
        )
        gate = Gate.of(settings.token_file, settings.trusted_header)
        interceptors: list[Any] = [CountCalls()]
        if tracing is not None:
            interceptors.append(TraceCalls(tracing))
        interceptors.append(IdentifyCalls())
        if not gate.is_open:
            interceptors.append(RequireAuthCalls(gate))
        self._grpc = None
        if settings.grpc_port is not None:
            from evergreen.serving.grpc_server import GrpcServer

            self._grpc = GrpcServer(
                data_plane, repository, interceptors=interceptors, max_message_bytes=settings.max_body_bytes
            )
        self.grpc_port: int | None = None
        self.rest = RestServer(data_plane, repository, settings, gate, tracing, stop_others=self._stop_grpc)

    async def serve(self, listener: socket.socket) -> None:
        """Load the model, then answer requests until the server is told to stop and has drained."""
        settings, started = self._settings, time.perf_counter()
        logger.info("loading %s", settings.model)
        self.slot.put(await self._open_model(settings.model))
        # Half a million objects of the libraries and the model stay: the collector need not look at them again. Done
        # once, before anybody asks: it takes a fifth of a second.
        gc.collect()
        gc.freeze()
        try:
            if self._grpc is not None and settings.grpc_port is not None:
                self.grpc_port = await self._grpc.start(settings.host, settings.grpc_port)
                logger.info("serving gRPC on %s:%d", settings.host, self.grpc_port)
            host, port = listener.getsockname()[:2]
            logger.info(
                "serving %s on http://%s:%d/v1/models/%s:predict after %.1f s",
                self.slot.recommender.model_version,
                host,
                port,
                settings.name,
                time.perf_counter() - started,
            )
            await self.rest.run_on(listener)
        finally:
            gc.unfreeze()  # or extensions take what is left at the end for leaks, and say so
            await self._stop_grpc(0)
            if not self.rest.forced:
                await self.slot.close()

    async def _stop_grpc(self, grace_seconds: float) -> None:
        if self._grpc is not None:
            await self._grpc.stop(grace_seconds)


@dataclass(frozen=True)
class Background:
    """A server in a thread of this process."""

    url: str
    grpc_port: int | None
    server: Server


@contextmanager
def serving_in_background(
    settings: ServeSettings, open_model: OpenModel, tracing: Tracing | None = None
) -> Iterator[Background]:
    """Run a server in a thread, for tests and benchmarks; it is drained in the end.

    Args:
        settings: of the server; with port 0 it chooses a free one.
        open_model: gives the first model, and those that are loaded later.
        tracing: makes spans; None: none.
    """
    with listen_on(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        server = Server(settings, open_model, tracing)
        failures: list[BaseException] = []

        def run() -> None:
            try:
                _run(server, listener)
            except BaseException as error:  # noqa: BLE001  (raised again where it is of use)
                failures.append(error)

        thread = threading.Thread(target=run, name="server")
        thread.start()
        deadline = time.monotonic() + _BACKGROUND_SECONDS
        while not server.rest.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            if server.rest.started:
                yield Background(f"http://{host}:{port}", server.grpc_port, server)
        finally:
            if not server.rest.draining:
                server.rest.stop()
            thread.join()
        if failures:
            raise failures[0]


def _run(server: Server, listener: socket.socket) -> bool:
    """Run a server on an event loop of its own; True if it was told to stop at once."""
    import uvicorn

    loop_factory = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(server.serve(listener))
    return server.rest.forced


def listen_on(host: str, port: int) -> socket.socket:
    """A socket bound to an address. It does not listen yet: callers are refused until the model is ready.

    Raises:
        EvergreenError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise EvergreenError(f"host {host!r} cannot be resolved: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _no_port(host, port, error) from error
    return listener


def _no_port(host: str, port: int, error: OSError) -> EvergreenError:
    if error.errno == errno.EADDRINUSE:
        return EvergreenError(f"port {port} is in use: choose another with --port")
    return EvergreenError(f"cannot listen on {host}:{port}: {error.strerror}")


def _prepare_process(threads: int) -> None:
    """Settle what libraries read from the environment when they are imported.

    Args:
        threads: that each library computes with: more than cores only wait for each other.
    """
    for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
        os.environ[f"{library}_NUM_THREADS"] = str(threads)
    # A file system for reading only has no place for files that nobody needs. Feast 0.67 has prometheus_client keep
    # every metric in one, which also costs time, unless that is imported first and Feast finds a name; a parent process
    # that has imported Feast hands its folder on. One process has nothing to share. dill, which torch imports if it is
    # there, asks for a folder and puts nothing in it.
    for variable in _METRICS_FOLDERS:
        os.environ.pop(variable, None)
    import prometheus_client  # noqa: F401

    os.environ[_METRICS_FOLDERS[0]] = ""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = "/tmp"
    import pyarrow as pa
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(threads)
    pa.set_cpu_count(threads)
