"""report.html: how many events were labelled, why, whose, and examples of each reason. One file, no script."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from evergreen.contracts.snapshot import SnapshotManifest
from evergreen.fraud.labels import SuspiciousManifest
from evergreen.fraud.rules import Limits, Reason


@dataclass(frozen=True)
class Findings:
    """Rows for people, from the labels."""

    days: list[tuple[date, int, int]]
    """Day, suspicious events, positives among them."""
    users: list[tuple[str, list[str], int, int, int, datetime, datetime, float]]
    """User, reasons, suspicious events, positives among them, items, first, last, score; the most events first."""
    examples: dict[Reason, list[tuple[int, str, str | None, int | None, bool, datetime, float]]]
    """Of each reason: event_id, user, item, position, clicked, time, score."""


def explanations(limits: Limits, false_positive_share: float) -> dict[Reason, str]:
    """What each reason means, with the numbers that it was judged by."""
    chance = f"a chance below {limits.alpha:g}"
    rate, lowest = limits.click_rate * limits.plausible_factor, limits.click_rate / limits.plausible_factor
    return {
        Reason.VELOCITY: f"on a day with more than {limits.requests_per_minute} requests in a minute or "
        f"{limits.requests_per_hour} in an hour",
        Reason.CLICK_RATE: f"on a day with so many clicks that someone who clicks {rate:.2%} had {chance}",
        Reason.NO_CLICKS: f"a user who never clicked: for someone who clicks {lowest:.3%}, {chance}",
        Reason.REGULAR_CLICKS: f"on a day with {limits.regular_gaps} gaps between clicks that differ by less than "
        f"{limits.regular_spread:.0%} (standard deviation over mean)",
        Reason.REPEATED_CLICK: f"the same item of the same request more than {limits.repeats} times",
        Reason.ACCOUNT_BURST: f"an account less than {limits.new_account_hours} hours old that clicked an item "
        f"together with at least {limits.burst_accounts - 1} others: by their share of all clicks, {chance}",
        Reason.ANOMALY: f"a window of days that fewer than {false_positive_share:.2%} of people are as far out as",
    }


def write_report(manifest: SuspiciousManifest, snapshot: SnapshotManifest, findings: Findings, path: Path) -> None:
    """Render the report.

    Args:
        manifest: the counts, and the limits they follow from.
        snapshot: what was judged.
        findings: days, users and examples.
        path: the file to write.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = lambda value: f"{value:,}"
    template = (resources.files("evergreen.fraud") / "report.html.j2").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        manifest=manifest,
        snapshot=snapshot,
        findings=findings,
        most_a_day=max((events for _, events, _ in findings.days), default=1),
        explanations=explanations(manifest.limits, manifest.false_positive_share),
    )
    path.write_text(text, encoding="utf-8")
