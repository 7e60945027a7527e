"""`evergreen simulate log`: a click log of a world whose truth is known."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

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
@click.option("--num-fast-crawlers", type=int, default=0, show_default=True, help="Bots that click all they see.")
@click.option("--num-farm-accounts", type=int, default=0, show_default=True, help="Accounts that push a few items.")
@click.option("--num-mimics", type=int, default=0, show_default=True, help="Bots with the pace and hours of people.")
@click.option("--seed", type=int, default=0, show_default=True)
def simulate_log_command(out: Path, **settings: Any) -> None:
    """Write a click log with known click probabilities.

    The log is OUT/events, to be read with `--mapping simulated`; the truth is OUT/truth, which training never reads.
    """
    from evergreen.simulator.config import SimulatorConfig
    from evergreen.simulator.log import simulate_log

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    simulate_log(SimulatorConfig(**settings), out)
    click.echo(f"next: evergreen run --mapping simulated --data {out}")
