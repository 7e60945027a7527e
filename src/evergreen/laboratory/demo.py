"""The demonstration: one world whose tastes shift, under the loop, under no retraining, and under a daily one."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from evergreen.contracts.errors import InputError
from evergreen.laboratory.loop import Arm, LoopConfig, Start, prepare
from evergreen.laboratory.policies import policy_of
from evergreen.laboratory.results import LOOP_FILE, ArmResults, LoopDay, LoopResults
from evergreen.laboratory.shop import OverHttp
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.scenarios import find_scenario
from evergreen.simulator.visits import VisitPlan
from evergreen.training.trainer import TrainingConfig

POLICIES = ("ours", "daily", "never")
"""Two live at a time; the first two take longest."""

OnDay = Callable[[str, LoopDay], None]

_MARKER = ".evergreen-demo"
_PROCESSES = 2
_POLL_SECONDS = 0.5


def demo_config(*, days: int, scenario: str, seed: int) -> LoopConfig:
    """A small shop in which tastes matter: people of one segment like the same things, and differ from the others.

    Two days of it hold clicks enough to learn the tastes of a segment anew; in a shop with rarer clicks or more items
    it is the same, but takes longer.
    """
    log = SimulatorConfig(
        num_users=1_200,
        num_items=80,
        num_days=10,
        events_per_day=20_000,
        click_rate=0.08,
        num_segments=4,
        taste_dimensions=4,
        segment_taste_share=0.9,
        interaction_strength=2.0,
        taste_half_life_days=90,
        item_age_days=30,
        seed=seed,
    )
    return LoopConfig(
        plan=VisitPlan(log=log, scenario=find_scenario(scenario), seed=seed, requests_per_day=2_000, explore=0.3),
        num_days=days,
        # One day of a small shop is soon read, and may be read often.
        training=TrainingConfig(model="deepfm", max_epochs=12, patience=8, seed=seed, export_program=False),
        training_days=4,
        pages=True,
        canary_requests=100,
        seed=seed,
    )


def run_demo(out: Path, *, days: int, scenario: str, seed: int, on_day: OnDay) -> LoopResults:
    """Live through a world under three policies, two at a time, each asking its own server over HTTP.

    Args:
        out: folder for the results: `loop.json`, and a folder for each policy; emptied if it is of an earlier one.
        days: of the world.
        scenario: what happens.
        seed: of the world and the models.
        on_day: told of each day when its evening is over.

    Raises:
        InputError: the folder holds something else.
    """
    began = time.perf_counter()
    config = demo_config(days=days, scenario=scenario, seed=seed)
    _claim(out)
    with _quiet():
        start = prepare(config, out / "start")
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(_PROCESSES, mp_context=context) as pool:
        told: Queue[Any] = manager.Queue()
        running = [pool.submit(_live, config, start, policy, out, told) for policy in POLICIES]
        _tell(running, told, on_day)
        arms = tuple(arm.result() for arm in running)
    plan = config.plan
    results = LoopResults(
        scenario=scenario,
        begins=plan.scenario.begins,
        seed=seed,
        requests_per_day=plan.requests_per_day,
        model=config.training.model,
        arms=arms,
        wall_seconds=time.perf_counter() - began,
    )
    results.write(out / LOOP_FILE)
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say to developers is not for whoever watches the days go by."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _live(config: LoopConfig, start: Start, policy: str, out: Path, told: Queue[Any]) -> ArmResults:
    began = time.perf_counter()
    if not policy_of(policy).reads_reports:
        config = config.model_copy(update={"canary_requests": 0})  # a schedule releases whatever it trains
    days = []
    with _quiet():
        arm = Arm(config, start, policy_of(policy, config.decision), out / policy, OverHttp)
        for day in arm.run():
            told.put((policy, day))
            days.append(day)
    folders = {"click log": arm.world / "events", "impressions": arm.impressions, "state of the loop": arm.state.path}
    return ArmResults(
        policy=policy,
        days=tuple(days),
        wall_seconds=time.perf_counter() - began,
        logs={words: str(folder.relative_to(out)) for words, folder in folders.items()},
    )


def _tell(running: list[Future[ArmResults]], told: Queue[Any], on_day: OnDay) -> None:
    """Pass days on until all arms are done, or one of them has failed."""
    while True:
        done = all(arm.done() for arm in running) or any(arm.done() and arm.exception() for arm in running)
        try:
            while True:
                on_day(*told.get(timeout=0 if done else _POLL_SECONDS))
        except Empty:
            if done:
                return


def _claim(out: Path) -> None:
    """Make the folder ours: new, empty, or of an earlier demonstration, whose results are removed."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARKER).exists())):
        raise InputError(f"{out}: holds something else than a demonstration; name a new or empty folder")
    for old in list(out.iterdir()) if out.exists() else []:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
