"""`evergreen simulate`: a click log of a world whose truth is known, and the world that goes on from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from evergreen.simulator.days import DaySummary

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def simulate() -> None:
    """Make data from a simulated world."""


@simulate.command("log")
@click.option("--out", type=_FOLDER, required=True, help="Folder to write.")
@click.option("--num-users", type=int, default=2_000, show_default=True)
@click.option("--num-items", type=int, default=500, show_default=True)
@click.option("--num-days", type=int, default=30, show_default=True)
@click.option("--events-per-day", type=int, default=10_000, show_default=True, help="Impressions a day.")
@click.option("--click-rate", type=float, default=0.017, show_default=True, help="Of items shown at random.")
@click.option("--num-fast-crawlers", type=int, default=0, show_default=True, help="Bots that click all they see.")
@click.option("--num-farm-accounts", type=int, default=0, show_default=True, help="Accounts that push a few items.")
@click.option("--num-mimics", type=int, default=0, show_default=True, help="Bots with the pace and hours of people.")
@click.option("--scenario", default=None, help="Of the world that will go on from the log; `seasonal` needs it.")
@click.option("--seed", type=int, default=0, show_default=True)
def simulate_log_command(out: Path, scenario: str | None, **settings: Any) -> None:
    """Write a click log with known click probabilities.

    The log is OUT/events, to be read with `--mapping simulated`; the truth is OUT/truth, which training never reads.
    """
    from evergreen.simulator.config import SimulatorConfig
    from evergreen.simulator.log import simulate_log
    from evergreen.simulator.scenarios import find_scenario

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    simulate_log(SimulatorConfig(**settings), out, scenario=find_scenario(scenario) if scenario else None)
    click.echo(f"next: evergreen run --mapping simulated --data {out}")


@simulate.command("world")
@click.option("--url", required=True, help="Base URL of the service, e.g. http://127.0.0.1:8080")
@click.option("--log", "log", type=_FOLDER, required=True, help="What `simulate log` wrote and the model learned from.")
@click.option("--out", type=_FOLDER, required=True, help="Folder of the world's days.")
@click.option("--scenario", default="stable", show_default=True, help="What happens; a wrong name lists all.")
@click.option("--days", type=click.IntRange(1, 3_650), default=14, show_default=True, help="Of the world, in all.")
@click.option("--start-day", type=int, default=None, help="Day of the log to begin on.  [default: after its last]")
@click.option("--requests-per-day", type=int, default=1_000, show_default=True)
@click.option("--k", type=int, default=10, show_default=True, help="Items on a page.")
@click.option("--explore", type=float, default=0.2, show_default=True, help="Share of pages with items at random.")
@click.option("--seed", type=int, default=None, help="Of what happens after the log.  [default: the log's]")
@click.option("--connections", type=click.IntRange(1, 64), default=2, show_default=True, help="Calls at once.")
@click.option("--model-name", default="evergreen", show_default=True)
def simulate_world_command(
    url: str,
    log: Path,
    out: Path,
    scenario: str,
    days: int,
    start_day: int | None,
    seed: int | None,
    connections: int,
    model_name: str,
    **settings: Any,
) -> None:
    """Let the people of a log ask the served model, day by day in virtual time, and see what they click.

    OUT/events gets the click log of each day, to be read with `--mapping simulated`, OUT/clicks the stream of clicks;
    the rest of OUT is the truth. A second call goes on after the last finished day.
    """
    from evergreen.simulator.config import SimulatorConfig
    from evergreen.simulator.days import finished_days, run_day
    from evergreen.simulator.log import CONFIG, log_scenario
    from evergreen.simulator.scenarios import find_scenario
    from evergreen.simulator.served_model import ServedModel
    from evergreen.simulator.visits import VisitPlan, Visits

    config = SimulatorConfig.read(log / CONFIG)
    chosen = find_scenario(scenario)
    log_scenario(log).check_goes_on(chosen)
    plan = VisitPlan(
        log=config, scenario=chosen, seed=config.seed if seed is None else seed, first_day=start_day, **settings
    )
    first = finished_days(plan, out)
    if first:
        click.echo(f"{out}: {first} days are there")
    visits = Visits(plan, num_days=max(days, first))
    with ServedModel(url, model_name) as recommend:
        for day in range(first, days):
            click.echo(_line(run_day(visits, day, recommend, out, connections=connections)))
    click.echo(f"click log: {out / 'events'}   clicks: {out / 'clicks'}")


def _line(day: DaySummary) -> str:
    """A day as one line."""
    parts = [
        f"day {day.day:>3}  {day.date:%a %Y-%m-%d}  {day.requests:>7,} requests",
        f"clicked {day.click_rate:6.2%}, expected {day.expected_rate:6.2%}"
        f" of at best {day.oracle_rate:6.2%}, at random {day.random_rate:6.2%}",
        f"model {', '.join(day.model_versions)}",
    ]
    counts = {
        "degraded": day.degraded,
        "empty": day.empty,
        "failed calls": day.failures,
        "requests not logged": day.lost_requests,
        "clicks not logged": day.lost_clicks,
    }
    return "  ".join([*parts, *(f"{count:,} {name}" for name, count in counts.items() if count)])
