"""`evergreen simulate log`: a click log of a world whose truth is known."""

from __future__ import annotations

import logging
from pathlib import Path

import click


@click.group()
def simulate() -> None:
    """Make data from a simulated world."""


@simulate.command("log")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--num-users", type=int, default=2_000, show_default=True)
@click.option("--num-items", type=int, default=500, show_default=True)
@click.option("--num-days", type=int, default=30, show_default=True)
@click.option("--events-per-day", type=int, default=10_000, show_default=True, help="Impressions a day.")
@click.option("--seed", type=int, default=0, show_default=True)
def simulate_log_command(
    out: Path, num_users: int, num_items: int, num_days: int, events_per_day: int, seed: int
) -> None:
    """Write a click log with known click probabilities.

    The log is OUT/events, to be read with `--mapping simulated`; the truth is OUT/truth, which training never reads.
    """
    from evergreen.simulator.config import SimulatorConfig
    from evergreen.simulator.log import simulate_log

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = SimulatorConfig(
        num_users=num_users, num_items=num_items, num_days=num_days, events_per_day=events_per_day, seed=seed
    )
    simulate_log(config, out)
    click.echo(
        f"{out}: {num_days * events_per_day:,} impressions; next: evergreen run --mapping simulated --data {out}"
    )
