"""Which model answers, and how another takes its place while requests come in.

The other one is loaded and warmed up beside the one that answers, then takes its place between two calls. Calls in
flight end on the model that they began with. The one before stays in memory: going back to it takes no loading. The one
before that is closed after its last call. Whatever goes wrong in loading, the model that answers stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
from kserve.errors import ModelNotReady
from kserve.model_repository import ModelRepository
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from evergreen.contracts.errors import EvergreenError
from evergreen.serving import metrics
from evergreen.serving.logs import request_id
from evergreen.serving.metrics import Load
from evergreen.serving.recommender import Recommender

MAX_VERSION_LENGTH = 200

logger = logging.getLogger(__name__)


class LoadedModel:
    """A recommender and the calls that it is answering; a context manager for each of these."""

    __slots__ = ("_idle", "in_flight", "recommender")

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.in_flight = 0
        self._idle: asyncio.Event | None = None

    def __enter__(self) -> Recommender:
        self.in_flight += 1
        return self.recommender

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.in_flight -= 1
        if self._idle is not None and not self.in_flight:
            self._idle.set()

    async def close(self) -> None:
        """Close the recommender after its last call; there must be no way left to begin another."""
        if self.in_flight:
            self._idle = asyncio.Event()
            await self._idle.wait()
        await self.recommender.close()


class ModelSlot:
    """The model that answers now, and the one before it. Belongs to the event loop: it takes no lock."""

    def __init__(self, name: str) -> None:
        """An empty slot.

        Args:
            name: of the model in the URL.
        """
        self.name = name
        self._current: LoadedModel | None = None
        self._previous: LoadedModel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def loaded(self) -> bool:
        """Whether a model is there to answer."""
        return self._current is not None

    @property
    def recommender(self) -> Recommender:
        """What answers now, to be asked about itself.

        Raises:
            ModelNotReady: nothing is loaded yet.
        """
        return self.use().recommender

    @property
    def previous(self) -> Recommender | None:
        """What answered before, still in memory."""
        return self._previous.recommender if self._previous else None

    def use(self) -> LoadedModel:
        """Context manager for one call, from its first to its last use of the recommender that it gives.

        Raises:
            ModelNotReady: nothing is loaded yet.
        """
        if self._current is None:
            raise ModelNotReady(self.name)
        return self._current

    def put(self, recommender: Recommender) -> None:
        """Have another answer from now on, and keep the one that did. What was kept before is closed when it is idle.

        Args:
            recommender: ready to answer; not the current one.
        """
        dropped, self._previous = self._previous, self._current
        if dropped is not None and dropped.recommender is recommender:
            self._current = dropped  # with the calls that it is still answering
        else:
            self._current = LoadedModel(recommender)
            self._close(dropped)
        metrics.tell_model(recommender.model_version)
        # Functions of the slot, not of the recommender: it can be freed once it no longer answers.
        metrics.ITEMS.set_function(lambda: self.recommender.items.num_items)
        metrics.ITEM_TABLE_AGE.set_function(lambda: time.time() - self.recommender.items.read_at)

    async def close(self) -> None:
        """Close everything, each after its last call."""
        current, previous = self._current, self._previous
        self._current = self._previous = None
        metrics.ITEMS.set_function(lambda: 0)
        metrics.ITEM_TABLE_AGE.set_function(lambda: 0)
        self._close(previous)
        self._close(current)
        await asyncio.gather(*self._closing)

    def _close(self, model: LoadedModel | None) -> None:
        if model is not None:
            task = asyncio.ensure_future(model.close())
            self._closing.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("a model that no longer answers could not be closed: %r", error)


class Repository(ModelRepositoryExtension):  # type: ignore[misc]  # kserve has no type information
    """Loads other models at a caller's wish, where the operator allows it; unloads none."""

    def __init__(
        self,
        registry: ModelRepository,
        slot: ModelSlot,
        open_model: Callable[[Path], Awaitable[Recommender]],
        *,
        model: Path,
        folder: Path | None = None,
        allow_load: bool = False,
    ) -> None:
        """Load nothing yet.

        Args:
            registry: of KServe.
            slot: whose model is exchanged.
            open_model: from a package's directory to a recommender that is ready to answer.
            model: the package that a load without a version takes, as the path leads to it then.
            folder: of packages that may be loaded by their version.
            allow_load: whether callers may load anything.
        """
        super().__init__(registry)
        self._slot = slot
        self._open = open_model
        self._model = model
        self._folder = folder
        self._allow_load = allow_load
        self._loading = False

    @property
    def version(self) -> str:
        """Of the model that answers now."""
        return self._slot.recommender.model_version

    async def load(self, model_name: str, version: str | None = None) -> None:
        """Have another model answer; returns once it does.

        Args:
            model_name: in the URL.
            version: of the package in the folder, or of the one that answered before; None: the package that the
                server was started with, read anew.

        Raises:
            HTTPException: 403 loading is not allowed, 404 no such model or version, 409 another load is under way, 422
                the package cannot be loaded or does not fit.
        """
        try:
            self._check(model_name)
            if self._loading:
                raise HTTPException(409, "another load is under way: wait until it has ended")
            self._loading = True
        except HTTPException:
            metrics.LOADS.labels(Load.REFUSED).inc()
            raise
        try:
            outcome = await self._load(version)
        except HTTPException as error:
            metrics.LOADS.labels(Load.REFUSED if error.status_code == 404 else Load.FAILED).inc()
            raise
        finally:
            self._loading = False
        metrics.LOADS.labels(outcome).inc()

    async def unload(self, model_name: str) -> None:
        """Refuse: a server without its model is a deployment to be deleted.

        Raises:
            HTTPException: 403, always.
        """
        raise HTTPException(403, "models are not unloaded by callers: delete the deployment")

    async def index(self, filter_ready: bool | None = False) -> list[dict[str, str]]:
        """The versions that there are.

        Args:
            filter_ready: whether to leave out those that do not answer now.

        Returns:
            Of each its name, version, state (READY or UNAVAILABLE) and the reason of that.
        """
        states: dict[str, tuple[str, str]] = {}
        if self._allow_load and not filter_ready:
            states = dict.fromkeys(await asyncio.to_thread(self._versions), ("UNAVAILABLE", "not loaded"))
            if self._slot.previous is not None:
                states[self._slot.previous.model_version] = ("UNAVAILABLE", "in memory: it answered before")
        if self._slot.loaded:
            states[self._slot.recommender.model_version] = ("READY", "")
        name = self._slot.name
        return [
            {"name": name, "version": version, "state": state, "reason": reason}
            for version, (state, reason) in sorted(states.items())
        ]

    def _check(self, model_name: str) -> None:
        if model_name != self._slot.name:
            raise HTTPException(404, f"model {model_name[:MAX_VERSION_LENGTH]!r} does not exist")
        if not self._allow_load:
            raise HTTPException(403, "models are not loaded by callers here: deploy the other package")

    async def _load(self, version: str | None) -> Load:
        slot = self._slot
        if version is not None and slot.loaded and version == slot.recommender.model_version:
            return Load.UNCHANGED
        if version is not None and slot.previous is not None and version == slot.previous.model_version:
            return self._answer_with(slot.previous, Load.ROLLED_BACK)
        path = self._model
        if version is not None:
            versions = await asyncio.to_thread(self._versions)
            if version not in versions:
                raise HTTPException(
                    404, f"version {version!r} is not to be had: POST /v2/repository/index tells which are"
                )
            path = versions[version]
        try:
            recommender = await self._open(path)
            if version not in (None, recommender.model_version):
                await recommender.close()
                raise EvergreenError(f"{path} became {recommender.model_version} while {version} was to be loaded")
        except EvergreenError as error:
            logger.error("cannot load %s: %s", version or path, error)
            raise self._unloadable() from error
        except Exception as error:  # a package can be broken in any way, and none may take down what answers
            logger.exception("cannot load %s", version or path)
            raise self._unloadable() from error
        return self._answer_with(recommender, Load.LOADED)

    def _answer_with(self, recommender: Recommender, outcome: Load) -> Load:
        before = self._slot.recommender.model_version if self._slot.loaded else "nothing"
        self._slot.put(recommender)
        logger.info("%s answers in the place of %s (%s)", recommender.model_version, before, outcome.value)
        return outcome

    def _unloadable(self) -> HTTPException:
        stays = self._slot.recommender.model_version if self._slot.loaded else "no model"
        return HTTPException(
            422,
            f"the package cannot be loaded, {stays} keeps serving; the server's log says why, request {request_id()}",
        )

    def _versions(self) -> dict[str, Path]:
        """Packages in the folder by version; what is none is passed over."""
        from evergreen.models.package import ModelInfo, ModelPackage, PackageManifest

        versions = {}
        for path in sorted(self._folder.iterdir()) if self._folder and self._folder.is_dir() else ():
            if (path / ModelPackage.MODEL).is_file():
                try:
                    name = ModelInfo.read(path / ModelPackage.MODEL).name
                    digest = PackageManifest.read(path / ModelPackage.MANIFEST).digest
                except EvergreenError as error:
                    logger.warning("passed over in the model repository: %s", error)
                    continue
                versions[f"{name}-{digest[:12]}"] = path
        return versions


def repository_routes(repository: Repository) -> list[Route]:
    """The V2 repository extension with the bodies that KServe's own routes do not read; to be put before these.

    POST /v2/repository/models/{name}/load    nothing, or {"parameters": {"version": "…"}}
    POST /v2/repository/models/{name}/unload
    POST /v2/repository/index                 nothing, or {"ready": true}
    """

    async def load(request: Request) -> Response:
        name = request.path_params["model_name"]
        parameters = (await _body(request, "parameters")).get("parameters")
        parameters = {} if parameters is None else parameters
        version = _known(parameters, "version").get("version") if isinstance(parameters, dict) else ""
        if version is not None and not (isinstance(version, str) and 0 < len(version) <= MAX_VERSION_LENGTH):
            raise HTTPException(400, 'the body must be {"parameters": {"version": "<model version>"}}, or empty')
        await repository.load(name, version)
        return JSONResponse({"name": name, "load": True, "version": repository.version})

    async def unload(request: Request) -> Response:
        await repository.unload(request.path_params["model_name"])
        raise AssertionError("unload refuses")

    async def index(request: Request) -> Response:
        ready = (await _body(request, "ready")).get("ready", False)
        if not isinstance(ready, bool):
            raise HTTPException(400, 'the body must be {"ready": true or false}, or empty')
        return JSONResponse(await repository.index(ready))

    return [
        Route("/v2/repository/models/{model_name}/load", load, methods=["POST"]),
        Route("/v2/repository/models/{model_name}/unload", unload, methods=["POST"]),
        Route("/v2/repository/index", index, methods=["POST"]),
    ]


async def _body(request: Request, field: str) -> dict[str, Any]:
    """The object in a body, which may hold one field; empty for none."""
    content = await request.body()
    try:
        body = orjson.loads(content) if content.strip() else {}
    except orjson.JSONDecodeError as error:
        raise HTTPException(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object, or empty")
    return _known(body, field)


def _known(values: dict[str, Any], field: str) -> dict[str, Any]:
    for name in values:
        if name != field:
            raise HTTPException(400, f"unknown {name[:80]!r}; known: {field}")
    return values
