"""The inference server: kserve's HTTP server with one recommender model on it."""

from __future__ import annotations

import copy
import errno
import logging
import signal
import socket
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from evergreen.contracts.errors import ArtifactError, EvergreenError

logger = logging.getLogger(__name__)

_FEAST_CONFIG = "feature_store.yaml"


def serve(
    model: Path,
    feature_store: Path,
    *,
    port: int,
    name: str = "evergreen",
    host: str = "0.0.0.0",
    impressions: str | None = None,
    sampling_rate: float = 1.0,
) -> None:
    """Load a model package and its features, then answer requests until the process is told to stop.

    Args:
        model: directory of the model package.
        feature_store: directory of the feature store, materialized.
        port: to listen on; 0 chooses a free one.
        name: of the model in the URL.
        host: address to listen on; the default is every one, as a container needs.
        impressions: where answers are logged: a folder, an fsspec URL, or kafka://host:port/topic; None: nowhere.
        sampling_rate: share of requests that are logged.

    Raises:
        ArtifactError: a directory is missing or is not what it should be.
        InputError: impressions cannot be logged there.
        EvergreenError: the port cannot be had.
    """
    # What can be told at once is told before kserve, torch and Feast are imported, which takes ten seconds and more.
    for path, what, marker in ((model, "model package", "model.json"), (feature_store, "feature store", _FEAST_CONFIG)):
        if not Path(path).is_dir():
            raise ArtifactError(f"{path}: no such directory; give the {what} that `evergreen run` wrote")
        if not (Path(path) / marker).is_file():
            raise ArtifactError(
                f"{path}: no {marker} in it, so it is no {what}; give the one that `evergreen run` wrote"
            )
    with ExitStack() as stack:
        listener = stack.enter_context(listen_on(host, port))
        from evergreen.serving.impression_sinks import open_sink
        from evergreen.serving.impressions import ImpressionLog
        from evergreen.serving.predictor import RecommenderModel
        from evergreen.serving.recommender import Recommender

        log = None
        if impressions is not None:
            log = stack.enter_context(ImpressionLog(open_sink(impressions), sampling_rate=sampling_rate))
            # Once it has shut down, uvicorn raises the signal that ended it again, and by default SIGTERM ends a
            # process before anything is flushed.
            signal.signal(signal.SIGTERM, _end)
        predictor = RecommenderModel(name, partial(Recommender.load, Path(model), Path(feature_store), log))
        server = build_server(predictor, listener)
        predictor.load()
        bound_host, bound_port = listener.getsockname()[:2]
        version = predictor.recommender.model_version
        logger.info("serving %s on http://%s:%d/v1/models/%s:predict", version, bound_host, bound_port, name)
        try:
            server.run(sockets=[listener])
        except OSError as error:  # another server bound the same port while both were loading, and listens already
            raise _no_port(host, bound_port, error) from error


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


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


def build_server(predictor: Any, listener: socket.socket) -> Any:
    """KServe's REST server for one model; `run(sockets=[listener])` blocks until it is stopped.

    `kserve.ModelServer.start` would listen on every address, end the process when the port is taken, and start gRPC;
    so its REST server is run by itself, on a socket of ours, the way kserve's own worker processes do.
    """
    import kserve
    from kserve import logging as kserve_logging
    from kserve.model_server import app
    from kserve.protocol.rest.server import RESTServer

    from evergreen.serving.protocol import CallerMistakes, FixedRepository, RecommenderDataPlane, install_handlers

    kserve_logging.configure_logging(quiet(kserve_logging.KSERVE_LOG_CONFIG, CallerMistakes))
    # kserve 0.21 answers in a way that this FastAPI deprecates; whoever reads the server's log can do nothing about it.
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")
    port = listener.getsockname()[1]
    model_server = kserve.ModelServer(http_port=port, workers=1, enable_grpc=False, enable_latency_logging=False)
    model_server.register_model(predictor)
    install_handlers(app)
    return RESTServer(
        app="kserve.model_server:app",
        data_plane=RecommenderDataPlane(model_server.registered_models),
        model_repository_extension=FixedRepository(model_server.registered_models),
        http_port=port,
    )


def quiet(log_config: dict[str, Any], caller_mistakes: type[logging.Filter]) -> dict[str, Any]:
    """KServe's logging without its lines for every request: warnings and the server's own errors remain."""
    config = copy.deepcopy(log_config)
    for settings in config["loggers"].values():
        settings["level"] = "WARNING"
    config["filters"] = {"caller_mistakes": {"()": caller_mistakes}}
    config["loggers"]["kserve"]["filters"] = ["caller_mistakes"]
    return config
