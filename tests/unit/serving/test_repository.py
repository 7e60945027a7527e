"""Exchanging the model that answers while calls are in flight, and what becomes of the ones before."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from kserve.errors import ModelNotReady
from kserve.model_repository import ModelRepository
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from evergreen.contracts.errors import ArtifactError
from evergreen.serving.repository import ModelSlot, Repository, repository_routes

SECRET = "/srv/models"


class StandIn:
    """What the repository asks of a recommender: a version, items, and to be closed once."""

    def __init__(self, version: str) -> None:
        self.model_version = version
        self.items = SimpleNamespace(num_items=7, read_at=0.0)
        self.closed = 0

    async def close(self) -> None:
        self.closed += 1


class World:
    """Packages by path, and a repository that opens them."""

    def __init__(self, folder: Path | None = None, *, allow_load: bool = True, first: str = "m-1") -> None:
        self.slot = ModelSlot("evergreen")
        self.packages: dict[str, str | Exception] = {SECRET: first}
        self.opened: list[StandIn] = []
        self.gate: asyncio.Event | None = None
        self.repository = Repository(
            ModelRepository(), self.slot, self.open, model=Path(SECRET), folder=folder, allow_load=allow_load
        )

    async def open(self, path: Path) -> Any:
        if self.gate is not None:
            await self.gate.wait()
        package = self.packages[str(path)]
        if isinstance(package, Exception):
            raise package
        self.opened.append(StandIn(package))
        return self.opened[-1]

    async def start(self) -> None:
        self.slot.put(await self.open(Path(SECRET)))


def loads(outcome: str) -> float:
    return REGISTRY.get_sample_value("evergreen_model_loads_total", {"outcome": outcome}) or 0.0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def write_packages(folder: Path, *names: str) -> dict[str, Path]:
    """What the repository reads of packages to know their versions; by version."""
    from evergreen.contracts.mapping import LogKind
    from evergreen.models.package import ModelInfo, PackageManifest

    packages = {}
    for name in names:
        path = folder / f"package-of-{name}"
        path.mkdir(parents=True)
        manifest = PackageManifest(files={"weights.safetensors": name})
        manifest.write(path / "manifest.json")
        info = ModelInfo(
            name=name,
            kind=LogKind.RATINGS,
            mapping_name="m",
            snapshot_id="s",
            feature_service="ranker_v1",
            as_of="2026-01-01T00:00:00Z",  # type: ignore[arg-type]
            features=(),
            hyperparameters={},
            training={},
            train_rows=1,
            label_mean=0.5,
            num_parameters=1,
        )
        info.write(path / "model.json")
        packages[f"{name}-{manifest.digest[:12]}"] = path
    return packages


def test_empty_slot_is_not_ready() -> None:
    slot = ModelSlot("evergreen")
    assert not slot.loaded
    with pytest.raises(ModelNotReady, match="evergreen"):
        slot.use()


def test_load_reads_the_package_anew_and_counts() -> None:
    async def scenario() -> None:
        world = World()
        await world.start()
        world.packages[SECRET] = "m-2"
        before = loads("loaded")
        await world.repository.load("evergreen")
        assert world.slot.recommender.model_version == world.repository.version == "m-2"
        assert loads("loaded") == before + 1
        assert REGISTRY.get_sample_value("evergreen_model_info", {"version": "m-2"}) == 1
        assert REGISTRY.get_sample_value("evergreen_items") == 7

    run(scenario)


def test_call_ends_on_the_model_that_it_began_with_and_only_then_is_that_closed() -> None:
    async def scenario() -> None:
        world = World()
        await world.start()
        with world.slot.use() as recommender:
            for version in ("m-2", "m-3"):
                world.packages[SECRET] = version
                await world.repository.load("evergreen")
            await asyncio.sleep(0)
            first = world.opened[0]
            assert recommender is first and not first.closed
            assert world.slot.recommender.model_version == "m-3"
        await asyncio.sleep(0.01)
        assert [model.closed for model in world.opened] == [1, 0, 0], "the one before stays, for the way back"
        await world.slot.close()
        assert [model.closed for model in world.opened] == [1, 1, 1]

    run(scenario)


def test_roll_back_takes_no_loading_and_goes_both_ways() -> None:
    async def scenario() -> None:
        world = World()
        await world.start()
        world.packages[SECRET] = "m-2"
        await world.repository.load("evergreen")
        before = loads("rolled_back")
        with world.slot.use():
            for version in ("m-1", "m-2", "m-1"):
                await world.repository.load("evergreen", version)
                assert world.repository.version == version
        assert len(world.opened) == 2 and loads("rolled_back") == before + 3
        await asyncio.sleep(0.01)
        assert [model.closed for model in world.opened] == [0, 0]
        await world.slot.close()
        assert [model.closed for model in world.opened] == [1, 1]

    run(scenario)


def test_version_that_answers_already_is_left_alone() -> None:
    async def scenario() -> None:
        world = World()
        await world.start()
        before = loads("unchanged")
        await world.repository.load("evergreen", "m-1")
        assert len(world.opened) == 1 and loads("unchanged") == before + 1

    run(scenario)


def test_version_is_found_in_the_model_repository(tmp_path: Path) -> None:
    packages = write_packages(tmp_path, "deepfm", "dcn")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.json").write_text("{")
    (tmp_path / "notes.txt").touch()

    async def scenario() -> None:
        world = World(tmp_path)
        await world.start()
        for version, path in packages.items():
            world.packages[str(path)] = version
        wanted = next(iter(packages))
        await world.repository.load("evergreen", wanted)
        assert world.repository.version == wanted
        index = {entry["version"]: (entry["state"], entry["reason"]) for entry in await world.repository.index()}
        assert index == {
            wanted: ("READY", ""),
            "m-1": ("UNAVAILABLE", "in memory: it answered before"),
            **{version: ("UNAVAILABLE", "not loaded") for version in packages if version != wanted},
        }
        assert [entry["version"] for entry in await world.repository.index(filter_ready=True)] == [wanted]

    run(scenario)


@pytest.mark.parametrize(
    "failure", [ArtifactError(f"{SECRET}/weights.safetensors was altered"), RuntimeError(SECRET), MemoryError()]
)
def test_package_that_cannot_be_loaded_leaves_the_old_one_and_tells_no_path(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        world = World()
        await world.start()
        world.packages[SECRET] = failure
        before = loads("failed")
        with pytest.raises(HTTPException) as caught:
            await world.repository.load("evergreen")
        assert caught.value.status_code == 422
        assert "m-1 keeps serving" in caught.value.detail and SECRET not in caught.value.detail
        assert loads("failed") == before + 1 and world.repository.version == "m-1"
        world.packages[SECRET] = "m-2"
        await world.repository.load("evergreen")
        assert world.repository.version == "m-2", "the next one is loaded all the same"

    with caplog.at_level(logging.ERROR):
        run(scenario)
    assert f"cannot load {SECRET}" in caplog.text


def test_package_that_changes_while_it_is_loaded_is_not_taken_for_another(tmp_path: Path) -> None:
    packages = write_packages(tmp_path, "deepfm")

    async def scenario() -> None:
        world = World(tmp_path)
        await world.start()
        ((version, path),) = packages.items()
        world.packages[str(path)] = "deepfm-else"
        with pytest.raises(HTTPException) as caught:
            await world.repository.load("evergreen", version)
        assert caught.value.status_code == 422 and world.repository.version == "m-1"
        assert world.opened[-1].closed == 1

    run(scenario)


def test_one_load_at_a_time() -> None:
    async def scenario() -> None:
        world = World()
        await world.start()
        world.gate = asyncio.Event()
        first = asyncio.ensure_future(world.repository.load("evergreen"))
        await asyncio.sleep(0)
        with pytest.raises(HTTPException) as caught:
            await world.repository.load("evergreen")
        assert caught.value.status_code == 409
        world.gate.set()
        await first
        await world.repository.load("evergreen")

    run(scenario)


@pytest.mark.parametrize(
    ("allow_load", "name", "version", "status"),
    [(False, "evergreen", None, 403), (True, "other", None, 404), (True, "evergreen", "m-9", 404)],
)
def test_load_is_refused_and_counted(allow_load: bool, name: str, version: str | None, status: int) -> None:
    async def scenario() -> None:
        world = World(allow_load=allow_load)
        await world.start()
        before = loads("refused")
        with pytest.raises(HTTPException) as caught:
            await world.repository.load(name, version)
        assert caught.value.status_code == status and loads("refused") == before + 1

    run(scenario)


def test_memory_of_a_closed_model_returns() -> None:
    async def scenario() -> None:
        world = World()
        await world.start()
        gone = weakref.ref(world.opened[0])
        for version in ("m-2", "m-3"):
            world.packages[SECRET] = version
            await world.repository.load("evergreen")
        world.opened.clear()
        await asyncio.sleep(0.01)
        gc.collect()
        assert gone() is None

    run(scenario)


def ask(world: World, *requests: tuple[str, bytes]) -> list[httpx.Response]:
    async def tell(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    async def scenario() -> list[httpx.Response]:
        await world.start()
        app = Starlette(routes=repository_routes(world.repository), exception_handlers={HTTPException: tell})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return [await http.post(path, content=body) for path, body in requests]

    return asyncio.run(scenario())


LOAD, INDEX = "/v2/repository/models/evergreen/load", "/v2/repository/index"


def test_load_over_http_tells_the_version() -> None:
    world = World()
    bodies = (b"", b"{}", b'{"parameters": {}}', b'{"parameters": {"version": "m-1"}}', b'{"parameters": null}')
    for response in ask(world, *((LOAD, body) for body in bodies)):
        assert response.status_code == 200
        assert response.json() == {"name": "evergreen", "load": True, "version": "m-1"}


def test_index_over_http_lists_versions() -> None:
    entry = {"name": "evergreen", "version": "m-1", "state": "READY", "reason": ""}
    for response in ask(World(), (INDEX, b""), (INDEX, b'{"ready": true}'), (INDEX, b'{"ready": false}')):
        assert response.json() == [entry]


def test_unload_is_refused() -> None:
    (response,) = ask(World(), ("/v2/repository/models/evergreen/unload", b""))
    assert response.status_code == 403 and "delete the deployment" in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (LOAD, b"{", "the body is not valid JSON"),
        (LOAD, b"[]", "must be a JSON object"),
        (LOAD, b'{"parameters": "m-2"}', 'must be {"parameters"'),
        (LOAD, b'{"parameters": {"version": 2}}', 'must be {"parameters"'),
        (LOAD, b'{"parameters": {"version": ""}}', 'must be {"parameters"'),
        (LOAD, b'{"parameters": {"version": "%s"}}' % (b"x" * 1000), 'must be {"parameters"'),
        (LOAD, b'{"parameters": {"config": "{}"}}', "unknown 'config'; known: version"),
        (LOAD, b'{"parameter": {"version": "m-2"}}', "unknown 'parameter'; known: parameters"),
        (INDEX, b'{"ready": 1}', 'must be {"ready"'),
        (INDEX, b'{"raedy": true}', "unknown 'raedy'; known: ready"),
    ],
)
def test_body_that_says_something_else_is_400_with_the_reason(path: str, body: bytes, message: str) -> None:
    (response,) = ask(World(), (path, body))
    assert response.status_code == 400 and message in response.json()["error"]
