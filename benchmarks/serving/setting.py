"""`evergreen serve` as a process, on a feature store in a Redis of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.processes import Server, evergreen_serve, running
from benchmarks.serving.world import WORLD, World, build_world, create_store, enlarge
from evergreen.features.store import FeatureStore
from evergreen.simulator.config import SimulatorConfig
from tests.servers import RedisServer, redis_server


@dataclass(frozen=True)
class Setting:
    """What a measurement has to do with."""

    world: World
    store: FeatureStore
    redis: RedisServer
    server: Server


@contextmanager
def open_setting(
    work: Path,
    *,
    model: str = "deepfm",
    retriever: str | None = None,
    num_items: int | None = None,
    config: SimulatorConfig = WORLD,
    redis_options: Sequence[str] = (),
    serve_options: Sequence[str] = (),
) -> Iterator[Setting]:
    """Start them; ended with the block.

    Args:
        work: folder that keeps the world.
        model: which model ranks.
        retriever: which model retrieves.
        num_items: of an enlarged catalogue; None: the world's own.
        config: of the world, where it is not there yet.
        redis_options: of redis-server.
        serve_options: of `evergreen serve`.
    """
    world = build_world(work, (model,) if retriever is None else (model, retriever), config=config)
    if num_items is not None:
        world = World(enlarge(world.tables, num_items, work / f"tables_{num_items}"), world.packages)
    options = [*serve_options]
    if retriever is not None:
        options += ["--retriever", str(world.packages / retriever)]
    with tempfile.TemporaryDirectory() as scratch, redis_server(*redis_options) as redis:
        store = create_store(world.tables, Path(scratch) / "store", redis.address)
        command = evergreen_serve(world.packages / model, store.path, *options)
        with running("evergreen serve", command, Path(scratch)) as server:
            yield Setting(world, store, redis, server)
