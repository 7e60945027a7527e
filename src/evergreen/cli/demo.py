"""`evergreen demo`: a world whose tastes shift, the loop that answers, and one page that shows it."""

from __future__ import annotations

import time
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING

import click

from evergreen.contracts.decision import Verdict

if TYPE_CHECKING:
    from evergreen.laboratory.results import LoopDay

_COLORS = {Verdict.RETRAIN: "green", Verdict.ALARM: "yellow", Verdict.ROLLBACK: "red"}


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--days", type=click.IntRange(1, 365), default=14, show_default=True, help="Of the world.")
@click.option("--scenario", default="taste-shift", show_default=True, help="What happens; a wrong name lists all.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--open", "open_page", is_flag=True, help="Show the page in a browser at the end.")
def demo(out: Path, days: int, scenario: str, seed: int, open_page: bool) -> None:
    """Let the loop keep a model fresh in a simulated world, beside the same world under other policies.

    OUT gets demo.html, loop.json with all its figures, and a folder for each policy with what it left behind.
    """
    from evergreen.simulator.scenarios import find_scenario

    find_scenario(scenario)  # what cannot work is refused before torch is imported

    from evergreen.laboratory.demo import run_demo
    from evergreen.laboratory.page import write_page
    from evergreen.laboratory.story import tell

    start = time.perf_counter()

    def on_day(policy: str, day: LoopDay) -> None:
        click.echo(f"[{time.perf_counter() - start:6.1f} s] {day_line(policy, day)}")

    results = run_demo(out, days=days, scenario=scenario, seed=seed, on_day=on_day)
    story = tell(results)
    click.secho(f"\n{story.headline}", bold=True)
    for paragraph in story.paragraphs:
        click.echo(fill(paragraph, 100))
    page = write_page(results, out)
    click.echo(f"\npage: {page}\ntook {time.perf_counter() - start:.0f} s")
    if open_page:
        click.launch(str(page))


def day_line(policy: str, day: LoopDay) -> str:
    """A day as one line: its click rate and what the evening decided."""
    rates = f"expected {day.expected_rate:6.2%} of at best {day.oracle_rate:6.2%}"
    line = f"{policy:<8} day {day.day:>2}  {day.date:%a %Y-%m-%d}  {rates}"
    if day.verdict is None:
        return line
    line += f"  {click.style(f'{day.verdict:<8}', fg=_COLORS.get(day.verdict))}"
    if day.verdict is not Verdict.KEEP:
        line += f" {shorten(day.reason, 90, placeholder=' …')}"
    if day.retraining is not None:
        line += f" → {day.retraining.model_version} {'released' if day.retraining.released else 'not released'}"
    return line
