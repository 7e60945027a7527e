"""The closed loop in virtual time, over seeds: does it see what happens, and does it do the right thing about it?

    python -m benchmarks.loop.scenarios --work build/loop --seeds 20 --out benchmarks/loop/scenarios.md

Every run is a file in the work folder: what is there is not run again, so the table grows by and by. The model is asked
in process; `tests/integration/test_world.py` holds that HTTP gives the same days.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

from evergreen.contracts.decision import TriggerName, Verdict
from evergreen.laboratory.results import ArmResults, LoopDay

CLOCK = {TriggerName.SCHEDULE, TriggerName.NEW_ROWS}
DAYS = {
    "taste-shift": 9,
    "broken-feature": 8,
    "logging-outage": 7,
    "click-outage": 7,
    "stable": 60,
    "seasonal": 28,
    "slow-fade": 14,
    "new-catalogue": 12,
    "bot-attack": 12,
}


@dataclass(frozen=True)
class Run:
    """One arm of one world."""

    scenario: str
    policy: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.scenario}_{self.policy}_{self.seed}"


def live(run: Run, work: Path, days: int) -> ArmResults:
    """Run an arm, or read what came of it."""
    file = work / f"{run.name}_{days}.json"
    if file.exists():
        return ArmResults.read(file)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import torch

    from evergreen.laboratory.demo import demo_config
    from evergreen.laboratory.loop import Arm, prepare
    from evergreen.laboratory.policies import policy_of
    from evergreen.laboratory.shop import InProcess

    torch.set_num_threads(1)
    began = time.perf_counter()
    config = demo_config(days=days, scenario=run.scenario, seed=run.seed)
    config = config.model_copy(update={"pages": False, "canary_requests": 0})
    folder = work / run.name
    shutil.rmtree(folder, ignore_errors=True)
    start = prepare(config, folder / "start")
    arm = Arm(config, start, policy_of(run.policy, config.decision), folder / "arm", InProcess)
    lived = tuple(arm.run())
    results = ArmResults(policy=run.policy, days=lived, wall_seconds=time.perf_counter() - began)
    shutil.rmtree(folder)
    partial = file.with_suffix(".partial")
    results.write(partial)
    partial.replace(file)
    return results


def share(day: LoopDay) -> float:
    """Of the oracle's clicks."""
    return day.expected_rate / day.oracle_rate


def is_about_the_world(day: LoopDay) -> bool:
    """Whether the loop acted on more than the clock."""
    return day.verdict is Verdict.RETRAIN and bool(set(day.raised) - CLOCK)


def was_needed(days: Sequence[LoopDay], place: int) -> bool:
    """Whether the two days after a training were better, by the truth, than the two days before its release."""
    before, after = days[max(place - 1, 0) : place + 1], days[place + 1 : place + 3]
    return not after or fmean(map(share, after)) > fmean(map(share, before))


@dataclass(frozen=True)
class Shift:
    """How the loop took a sudden change."""

    days_to_detect: int | None
    recovered: float | None
    """Share of the loss two days after the detection."""
    loss: float


def of_shift(days: Sequence[LoopDay], begins: int) -> Shift:
    """Detection is the first evening on or after the change that retrains for more than the clock."""
    before = fmean(share(day) for day in days[max(begins - 3, 0) : begins])
    detected = next((day.day for day in days[begins:] if is_about_the_world(day)), None)
    if detected is None:
        return Shift(None, None, before - min(share(day) for day in days[begins:]))
    low = min(share(day) for day in days[begins : detected + 1])
    after = share(days[min(detected + 2, len(days) - 1)])
    return Shift(detected + 1 - begins, (after - low) / (before - low), before - low)


def arms_of(runs: dict[Run, ArmResults], scenario: str, policy: str = "ours") -> list[ArmResults]:
    """Of all seeds."""
    return [arm for run, arm in runs.items() if run.scenario == scenario and run.policy == policy]


def tables(runs: dict[Run, ArmResults], begins: int = 5) -> Iterable[str]:
    """The page, a line at a time."""
    scenarios = list(dict.fromkeys(run.scenario for run in runs))
    yield "| scenario | seeds | days | retrainings | not by the clock | alarms | rollbacks | clicks of the oracle's |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for scenario in scenarios:
        arms = arms_of(runs, scenario)
        if not arms:
            continue

        def mean(of: object, arms: list[ArmResults] = arms) -> float:
            return fmean(sum(1 for day in arm.days if of(day)) for arm in arms)  # type: ignore[operator]

        yield (
            f"| {scenario} | {len(arms)} | {len(arms[0].days)} | {mean(lambda d: d.verdict is Verdict.RETRAIN):.1f} "
            f"| {mean(is_about_the_world):.1f} | {mean(lambda d: d.verdict is Verdict.ALARM):.1f} "
            f"| {mean(lambda d: d.verdict is Verdict.ROLLBACK):.1f} "
            f"| {fmean(share(day) for arm in arms for day in arm.days):.1%} |"
        )
    shifts = [
        of_shift(arm.days, begins)
        for run, arm in runs.items()
        if run.scenario == "taste-shift" and run.policy == "ours"
    ]
    if shifts:
        detected = [shift.days_to_detect for shift in shifts if shift.days_to_detect is not None]
        recovered = [shift.recovered for shift in shifts if shift.recovered is not None]
        yield ""
        yield (
            f"`taste-shift`: seen within two days in {sum(d <= 2 for d in detected)} of {len(shifts)}; "
            f"the loss is {median(s.loss for s in shifts):.0%} of the oracle's clicks; two days after the detection "
            f"{median(recovered):.0%} of it is won back in the median ({min(recovered):.0%} to {max(recovered):.0%}), "
            f"at least 80 % in {sum(r >= 0.8 for r in recovered)} of {len(shifts)}."
        )
    for scenario in ("stable", "seasonal"):
        arms = arms_of(runs, scenario)
        if arms:
            months = sum(len(arm.days) for arm in arms) / 30
            acts = [(arm.days, day.day) for arm in arms for day in arm.days if is_about_the_world(day)]
            idle = sum(not was_needed(days, place) for days, place in acts)
            weeks = sum(len(arm.days) // 7 for arm in arms)
            yield ""
            yield (
                f"`{scenario}`: {len(acts) / months:.1f} retrainings in 30 days for more than the clock, of which "
                f"{idle / months:.1f} were not needed: the two days after were no better than the two before, by the "
                f"truth. All retrainings: {sum(len(arm.trainings) for arm in arms)} in {weeks} weeks."
            )
    for scenario, lasts in (("broken-feature", 3), ("logging-outage", 2), ("click-outage", 2)):
        arms = arms_of(runs, scenario)
        if arms:
            broken = [[d.verdict for d in arm.days[begins : begins + lasts]] for arm in arms]
            yield ""
            yield (
                f"`{scenario}`: an alarm in {sum(Verdict.ALARM in v for v in broken)} of {len(arms)}, "
                f"on all of the {lasts} days in {sum(all(x is Verdict.ALARM for x in v) for v in broken)}; "
                f"a retraining on one of them in {sum(Verdict.RETRAIN in v for v in broken)}."
            )
    compared = sorted({run.policy for run in runs})
    if len(compared) > 1:
        yield ""
        yield "| scenario | policy | seeds | of the oracle's | regret to daily | trainings | CPU s | of daily's |"
        yield "|---|---|---:|---:|---:|---:|---:|---:|"
        for scenario in scenarios:
            seeds = {run.seed for run in runs if run.scenario == scenario and run.policy == "daily"}
            daily = arms_of(runs, scenario, "daily")
            if not daily:
                continue
            best = fmean(share(day) for arm in daily for day in arm.days)
            most = fmean(arm.training_cpu_seconds for arm in daily)
            for policy in compared:
                arms = [
                    arm
                    for run, arm in runs.items()
                    if run.scenario == scenario and run.policy == policy and run.seed in seeds
                ]
                if not arms:
                    continue
                value, cpu = fmean(share(d) for a in arms for d in a.days), fmean(a.training_cpu_seconds for a in arms)
                yield (
                    f"| {scenario} | {policy} | {len(arms)} | {value:.1%} | {1 - value / best:+.1%} "
                    f"| {fmean(len(a.trainings) for a in arms):.1f} | {cpu:.0f} | {cpu / most:.0%} |"
                )


def main() -> None:
    """Run what is not there yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--scenarios", default=",".join(DAYS))
    parser.add_argument("--policies", default="ours")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only-write", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.only_write:
        wanted = [
            Run(scenario, policy, seed)
            for seed in range(arguments.seeds)
            for scenario in arguments.scenarios.split(",")
            for policy in arguments.policies.split(",")
        ]
        with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(live, run, arguments.work, DAYS[run.scenario]): run for run in wanted}
            for number, done in enumerate(as_completed(running), 1):
                arm = done.result()
                print(f"{number}/{len(wanted)} {running[done].name}: {arm.wall_seconds:.0f} s", flush=True)
    runs = {}
    for file in sorted(arguments.work.glob("*_*_*_*.json")):
        scenario, policy, seed, _ = file.stem.split("_")
        runs[Run(scenario, policy, int(seed))] = ArmResults.read(file)
    head = "# The closed loop in virtual time: what it does in each scenario\n\n"
    arguments.out.write_text(head + "\n".join(tables(runs)) + "\n")


if __name__ == "__main__":
    main()
