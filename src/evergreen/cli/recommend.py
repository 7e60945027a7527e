"""`evergreen recommend`: a small client of the inference service."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import click

from evergreen.cli.options import INSTANT

if TYPE_CHECKING:
    from evergreen.serving.schema import RankedItem, Recommendation


@click.command()
@click.option("--url", required=True, help="Base URL of the service, e.g. http://127.0.0.1:8080")
@click.option("--model-name", default="evergreen", show_default=True)
@click.option("--user", "user_id", default=None, help="User id.")
@click.option("-k", "--k", "k", type=int, default=None, help="How many items.  [default: 10]")
@click.option("--candidates", default=None, help="Comma-separated item ids to rank; without it, the whole catalogue.")
@click.option("--context", "context", multiple=True, metavar="NAME=VALUE", help="Context feature; may be repeated.")
@click.option("--at", "at", type=INSTANT, default=None, help="Time of the request.  [default: now]")
@click.option("--protocol", type=click.Choice(["v1", "v2"]), default="v1", show_default=True)
def recommend(
    url: str,
    model_name: str,
    user_id: str | None,
    k: int | None,
    candidates: str | None,
    context: Sequence[str],
    at: datetime | None,
    protocol: Literal["v1", "v2"],
) -> None:
    """Ask a served model for recommendations and print them."""
    values = dict(_context_value(entry) for entry in context)

    from evergreen.serving.client import RecommenderClient

    client = RecommenderClient(url, model_name=model_name)
    answer = client.recommend(
        user_id,
        k=k,
        candidates=candidates.split(",") if candidates else None,
        context=values,
        event_timestamp=at,
        protocol=protocol,
    )
    echo_recommendations(answer)


def _context_value(entry: str) -> tuple[str, str]:
    name, separator, value = entry.partition("=")
    if not separator:
        raise click.UsageError(f"--context {entry!r}: write NAME=VALUE")
    return name, value


def echo_recommendations(answer: Recommendation) -> None:
    """Print one answer as a table."""
    who = "anybody" if answer.user_id is None else f"user {answer.user_id}"
    known = " (new to the model)" if answer.user_id is not None and not answer.known_user else ""
    click.echo(f"{who}{known}, model {answer.model_version}")
    for item in answer.items:
        click.echo(f"  {item.rank:>3}  {item.item_id:<24} {_value(item)}")
    if not answer.items:
        click.echo(f"  {_value(answer)}")
    if answer.unknown_items:
        click.echo(f"  scored as new items: {', '.join(answer.unknown_items)}")
    for note in answer.notes:
        click.echo(f"  note: {note}")


def _value(answer: RankedItem | Recommendation) -> str:
    return f"p = {answer.probability:.4f}" if answer.probability is not None else f"rating = {answer.rating:.2f}"
