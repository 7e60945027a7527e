"""`evergreen policy`: when to retrain, tried on a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evergreen.contracts.mapping import Mapping, parse_duration

if TYPE_CHECKING:
    from evergreen.contracts.evaluation import Estimate
    from evergreen.laboratory.backtest_results import BacktestResults

_COLUMNS = ("policy", "lost to staleness", "trainings", "false", "missed", "CPU s", "of freshest", "alarms")


class _DurationType(click.ParamType[timedelta]):
    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        parsed = parse_duration(value)
        if not isinstance(parsed, timedelta) or parsed <= timedelta(0):
            self.fail(f"{value!r} is not a time span; write e.g. 1d", param, ctx)
        return parsed


@click.group()
def policy() -> None:
    """Try policies of retraining."""


@policy.command()
@click.option("--mapping", "mapping_reference", required=True, help="A shipped mapping's name, or a TOML file.")
@click.option("--data", required=True, help="The log: a file, a folder, or an fsspec URL.")
@click.option("--policies", default="never,daily,weekly,drift,ours", show_default=True, help="Also every-N-days.")
@click.option("--model", default="logistic_regression", show_default=True, help="A name of the model registry.")
@click.option("--start-days", type=click.IntRange(1), default=14, show_default=True, help="Before the first model.")
@click.option("--window-days", type=click.IntRange(1), default=28, show_default=True, help="That a model learns from.")
@click.option(
    "--step", type=_DurationType(), default="1d", show_default=True, help="Between two decisions; whole days."
)
@click.option(
    "--max-age", type=_DurationType(), default=None, help="At which `ours` retrains in any case.  [default: 7d]"
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
def backtest(
    mapping_reference: str,
    data: str,
    policies: str,
    model: str,
    start_days: int,
    window_days: int,
    step: timedelta,
    max_age: timedelta | None,
    seed: int,
    out: Path,
) -> None:
    """Live through a log under several policies: what each loses by old models, and what it costs to train.

    The yardstick is a model trained anew before every step. OUT gets results.json; what is expensive (features, models)
    stays in OUT for the next run, and what the steps say of themselves in OUT/backtest.log.
    """
    from evergreen.contracts.decision import DecisionConfig
    from evergreen.laboratory.backtest import backtest as run_backtest
    from evergreen.laboratory.backtest_results import RESULTS_FILE, BacktestConfig
    from evergreen.laboratory.policies import policy_of

    start = time.perf_counter()
    decision = DecisionConfig(training_window=timedelta(days=window_days))
    if max_age:
        decision = decision.model_copy(update={"max_age": max_age})
    names = [name.strip() for name in policies.split(",") if name.strip()]
    chosen = [policy_of(name, decision) for name in names]
    config = BacktestConfig(
        model=model,
        seed=seed,
        warm_up=timedelta(days=start_days),
        window=timedelta(days=window_days),
        step=step,
        # A split shorter than a step would hold less than what is decided on.
        validation=step,
        test=step,
        horizon=max(timedelta(days=7), 4 * step),
    )
    with _logging_to(out / "backtest.log"):
        results = run_backtest(
            Mapping.load(mapping_reference),
            data,
            out,
            chosen,
            config=config,
            on_progress=lambda line: click.echo(f"[{time.perf_counter() - start:6.1f} s] {line}"),
        )
    click.echo()
    for line in table(results):
        click.echo(line)
    click.echo()
    for note in results.notes:
        click.echo(f"note: {note}")
    click.echo(f"\nresults: {out / RESULTS_FILE}")


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Hundreds of trainings have hundreds of warnings, which would bury the progress."""
    handler = logging.FileHandler(file, delay=True)  # the folder is made, or refused, before the first line
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger("evergreen")
    level, propagate = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        root.propagate = propagate
        handler.close()


def table(results: BacktestResults) -> list[str]:
    """What a person wants to see: a line a policy."""
    from evergreen.contracts.decision import Verdict

    rows = [
        (
            p.policy,
            percent(p.lost),
            str(len(p.retrainings)),
            str(p.false_retrainings),
            str(len(p.missed)),
            f"{p.training_cpu_seconds:.1f}",
            f"{p.training_cpu_seconds / results.fresh_cpu_seconds:.0%}" if results.fresh_cpu_seconds else "-",
            str(p.count(Verdict.ALARM)),
        )
        for p in results.policies
    ]
    widths = [max(len(row[n]) for row in (_COLUMNS, *rows)) for n in range(len(_COLUMNS))]
    return [
        "  ".join(
            cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (_COLUMNS, *rows)
    ]


def percent(change: Estimate) -> str:
    """A relative change with its interval, e.g. "+1.20 % [+0.80, +1.60]"."""
    if change.value is None or change.low is None or change.high is None:
        return change.reason or "not known"
    return f"{change.value:+.2%} [{100 * change.low:+.2f}, {100 * change.high:+.2f}]".replace("%", " %")
