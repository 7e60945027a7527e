"""Policies of retraining on three logs: a world that stays as it is, one whose tastes go round, and Deskdrop.

    python benchmarks/loop/backtest.py [--deskdrop DIR] [--out benchmarks/loop/backtest.md] [--work DIR]

The worlds are shown items at random, so a click depends on the world alone and not on any model. `never`, fixed
schedules, drift alone and our own decision live through each log (`evergreen policy backtest`); the truth of when
tastes changed is used here only, to count the days until a policy has answered.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from evergreen.cli.policy import percent
from evergreen.contracts.decision import DecisionConfig, Verdict
from evergreen.contracts.mapping import Mapping
from evergreen.laboratory.backtest import backtest
from evergreen.laboratory.backtest_results import RESULTS_FILE, BacktestConfig, BacktestResults, PolicyResults
from evergreen.laboratory.policies import Ours, policy_of
from evergreen.simulator.asking import Ask, Served
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.days import run_day
from evergreen.simulator.scenarios import find_scenario
from evergreen.simulator.visits import VisitPlan, Visits

POLICIES = ("never", "daily", "every-3-days", "weekly", "drift")
DAYS, SHIFT = 35, 21
WORLD = SimulatorConfig(num_users=2_000, num_items=500, num_days=DAYS, click_rate=0.05)
REQUESTS_PER_DAY, K = 1_500, 10


def as_named(asks: Sequence[Ask]) -> list[Served]:
    """Pages are filled by the shop, at random: their order is left as it is, and other questions unanswered."""
    return [Served(ask.request_id, ask.candidates or (), "random") for ask in asks]


def make_world(scenario: str, out: Path, *, seed: int) -> datetime:
    """Write the click log of a world that shows items at random; returns when the scenario begins."""
    changed = find_scenario(scenario).model_copy(update={"begins": SHIFT})
    plan = VisitPlan(
        log=WORLD, scenario=changed, seed=seed, first_day=0, requests_per_day=REQUESTS_PER_DAY, k=K, explore=1.0
    )
    visits = Visits(plan, num_days=DAYS)
    for day in range(DAYS):
        run_day(visits, day, as_named, out)
    return plan.date(SHIFT)


def answered(policy: PolicyResults, shift: datetime) -> str:
    """Days from the shift to the first training that has seen a day of it."""
    moments = [retraining.as_of for retraining in policy.retrainings if retraining.as_of > shift]
    return f"{(min(moments) - shift) / timedelta(days=1):.0f}" if moments else "never"


def lines(results: BacktestResults, shift: datetime | None) -> list[str]:
    """A table: a line a policy."""
    has_auc = all(step.auc is not None for policy in results.policies for step in policy.steps)
    header = [
        "policy",
        "quality lost to staleness",
        "trainings",
        "false",
        "missed",
        "CPU-s",
        "of freshest",
        "alarms",
    ]
    header += ["mean AUC"] if has_auc else []
    header += ["days to answer"] if shift else []
    table = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for policy in results.policies:
        cells = [
            policy.policy,
            percent(policy.lost),
            str(len(policy.retrainings)),
            str(policy.false_retrainings),
            str(len(policy.missed)),
            f"{policy.training_cpu_seconds:.1f}",
            f"{policy.training_cpu_seconds / results.fresh_cpu_seconds:.0%}",
            str(policy.count(Verdict.ALARM)),
        ]
        if has_auc:
            cells.append(f"{sum(step.auc or 0.0 for step in policy.steps) / len(policy.steps):.4f}")
        if shift:
            cells.append(answered(policy, shift))
        table.append(f"| {' | '.join(cells)} |")
    return table


def reasons(results: BacktestResults, policy: str) -> list[str]:
    """What a policy did, and why."""
    steps = zip(results.steps, results.policy(policy).steps, strict=True)
    return [
        f"- {step.start:%a %Y-%m-%d} {own.verdict}: {own.reason}"
        for step, own in steps
        if own.verdict not in (None, Verdict.KEEP)
    ]


def main() -> None:
    """Run, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deskdrop", type=Path, help="folder of users_interactions.csv")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--work", type=Path, help="keep logs, models and results here; what is there is not run again")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        sections = []
        for scenario in ("stable", "taste-shift"):
            data, out, is_stable = work / scenario / "world", work / scenario / "out", scenario == "stable"
            shift = make_world(scenario, data, seed=arguments.seed)
            results = run("simulated", str(data), out, BacktestConfig(seed=arguments.seed), POLICIES)
            what = "nothing happens" if is_stable else f"tastes go round on {shift:%a %Y-%m-%d}"
            sections += section(f"A simulated world, `{scenario}`: {what}", results, None if is_stable else shift)
        if arguments.deskdrop:
            week = timedelta(days=7)
            config = BacktestConfig(
                step=week, warm_up=8 * week, window=12 * week, validation=week, test=week, horizon=4 * week
            )
            # 200 interactions a day: weeks are to this log what days are to a busy one.
            out, ours = work / "deskdrop" / "out", DecisionConfig(max_age=4 * week)
            schedules = ("never", "weekly", "every-14-days", "every-28-days", "drift")
            results = run("deskdrop", str(arguments.deskdrop), out, config, schedules, ours)
            sections += section("Deskdrop, a week a step; `ours` with a maximum age of 28 days", results, None)
    arguments.out.write_text("\n".join([*head(), *sections]))
    print(f"written: {arguments.out}")


def head() -> list[str]:
    """What the columns mean."""
    return [
        "# Policies of retraining, tried on logs",
        "",
        f"`{Path(__file__).name}`, {platform.machine()}, one thread. Quality lost to staleness: mean over the steps of "
        "normalized entropy relative to that of a model trained anew before each step, minus 1, with its 95 % "
        "interval; steps are resampled. A retraining was *false* if the days after it were not better than with the "
        "model before, "
        "outside the interval. One was *missed* where, two steps in a row or more, a fresh model would have been over "
        "2 % better and the policy kept its own (`laboratory/staleness.py` says both exactly). CPU-s are those of "
        "training alone, and *of freshest* their share of what training before every step costs.",
        "",
    ]


def run(
    mapping: str,
    data: str,
    out: Path,
    config: BacktestConfig,
    names: Sequence[str],
    ours: DecisionConfig | None = None,
) -> BacktestResults:
    """One backtest, with its progress; or the results that are there."""
    if (out / RESULTS_FILE).exists():
        return BacktestResults.read(out / RESULTS_FILE)
    policies = [*(policy_of(name) for name in names), Ours(ours or DecisionConfig())]
    return backtest(Mapping.load(mapping), data, out, policies, config=config, on_progress=print)


def section(title: str, results: BacktestResults, shift: datetime | None) -> list[str]:
    """A log in the result."""
    config, rows = results.config, sum(step.rows for step in results.steps)
    what = (
        f"{len(results.steps)} steps of {config.step.days} d with {rows:,} rows, {config.model} on the "
        f"{config.window.days} days before, first after {config.warm_up.days} days."
    )
    acts = reasons(results, "ours")
    return [
        f"## {title}",
        "",
        what,
        "",
        *lines(results, shift),
        "",
        "What `ours` did:" if acts else "`ours` kept its model all the time.",
        "",
        *acts,
        *([""] if acts else []),
        *(["To know:", "", *(f"- {note}" for note in results.notes[2:]), ""] if results.notes[2:] else []),
    ]


if __name__ == "__main__":
    main()
