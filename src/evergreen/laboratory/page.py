"""demo.html: a loop in virtual time for people. One file, no script, nothing from the network.

Everything that has a day is drawn over one axis of days, in HTML cells and one stretched SVG, so that it fits a phone
as well as a screen and its text keeps its size. Links are relative to the results' file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import groupby
from math import ceil, floor, log10
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from evergreen.contracts.decision import TriggerName, Verdict
from evergreen.contracts.monitoring_report import DriftStatus
from evergreen.laboratory.results import LOOP_FILE, ArmResults, LoopDay, LoopResults
from evergreen.laboratory.story import Story, event_words, main_model, percent, policy_name, tell
from evergreen.simulator.scenarios import SCENARIOS

PAGE = "demo.html"

_COLORS = ("ours", "blue", "orange", "violet", "rose", "teal")
_MARKS = {Verdict.KEEP: "·", Verdict.RETRAIN: "↻", Verdict.ALARM: "!", Verdict.ROLLBACK: "↩"}
_DRIFT_MARKS = {
    DriftStatus.STABLE: "·",
    DriftStatus.DRIFTED: "▲",
    DriftStatus.SEASONAL: "~",
    DriftStatus.UNKNOWN: "?",
}
_PARTS = ("features", "predictions", "labels")
_LABEL_GAP = 6.5
"""Least distance of two labels at the ends of lines, in hundredths of the figure's height."""


def write_page(results: LoopResults, out: Path) -> Path:
    """Render the page.

    Args:
        results: of the loop and of other policies; links of its days are relative to `out`.
        out: folder that the results lie in; the page goes beside them.

    Raises:
        InputError: the policy `ours` is not among the results, or it lived no day.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    environment.filters["link"] = quote
    environment.filters["change"] = _change_words
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    template = (resources.files("evergreen.laboratory") / "page.html.j2").read_text(encoding="utf-8")
    page = Path(out) / PAGE
    page.write_text(environment.from_string(template).render(_context(results, tell(results))), encoding="utf-8")
    return page


@dataclass(frozen=True)
class _Line:
    """A line of the figure: a policy, or a bound."""

    name: str
    color: str
    points: tuple[tuple[float, float], ...]
    """(day + 0.5, 100 is the figure's foot and 0 its head)."""
    label_at: float
    """Where its name stands, in hundredths from the head."""
    last: float
    """Rate on the last day."""

    @property
    def path(self) -> str:
        """For SVG."""
        return "M" + " L".join(f"{x:g} {y:.2f}" for x, y in self.points)

    @property
    def dots(self) -> str:
        """Lines without length, whose round ends are dots that no stretching makes oval."""
        return " ".join(f"M{x:g} {y:.2f}h0" for x, y in self.points)


@dataclass(frozen=True)
class _Cell:
    """A day, or several, in a strip."""

    css: str
    mark: str
    days: int = 1


@dataclass(frozen=True)
class _Strip:
    name: str
    cells: Sequence[_Cell]


def _context(results: LoopResults, story: Story) -> dict[str, Any]:
    arms = {cost.policy: results.arm(cost.policy) for cost in story.costs}
    loop = next(iter(arms.values()))
    words = event_words(results.scenario)
    lasts = SCENARIOS[results.scenario].lasts if results.scenario in SCENARIOS else None
    bounds = [("an oracle", "oracle", "oracle_rate"), ("at random", "random", "random_rate")]
    curves = [(cost.name, color, arms[cost.policy].days, "expected_rate") for cost, color in _colored(story)]
    curves += [(name, color, loop.days, field) for name, color, field in bounds]
    head, ticks = _scale([getattr(day, field) for _, _, days, field in curves for day in days])
    return {
        "results": results,
        "story": story,
        "days": loop.days,
        "rates": {
            day.day: {policy: found for policy, arm in arms.items() if (found := _on(arm, day.day))}
            for day in loop.days
        },
        "colors": {cost.policy: color for cost, color in _colored(story)},
        "lines": _apart([_line(name, color, days, field, head) for name, color, days, field in curves]),
        "ticks": [(100 - 100 * tick / head, f"{tick * 100:.6g}\N{NO-BREAK SPACE}%") for tick in ticks],
        "num_days": len(loop.days),
        "label_step": ceil(len(loop.days) / 16),
        "event": words if any(day.day == results.begins for day in loop.days) else None,
        "event_days": min(lasts or len(loop.days), len(loop.days) - results.begins),
        "strips": _strips(loop),
        "model_numbers": _model_numbers(loop),
        "policy_name": policy_name,
        "most_cpu": max((cost.cpu_seconds for cost in story.costs), default=0.0),
        "verdict_marks": _MARKS,
        "verdicts": {day.verdict for day in loop.days},
        "keep": Verdict.KEEP,
        "parts": _PARTS,
        "logs": {cost.name: arms[cost.policy].logs for cost in story.costs if arms[cost.policy].logs},
        "results_file": LOOP_FILE,
        "canary_name": lambda name: name.replace("_", " ").replace(" ms", " (ms)"),
    }


def _colored(story: Story) -> list[tuple[Any, str]]:
    return [(cost, _COLORS[i % len(_COLORS)]) for i, cost in enumerate(story.costs)]


def _on(arm: ArmResults, day: int) -> LoopDay | None:
    return next((one for one in arm.days if one.day == day), None)


def _scale(values: Sequence[float]) -> tuple[float, list[float]]:
    """The rate at the head of the figure, whose foot is 0, and where lines go across it."""
    top = max([*values, 1e-6]) * 1.06
    step = 10.0 ** floor(log10(top / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if top / (step * factor) <= 5)
    return top, [step * i for i in range(floor(top / step) + 1)]


def _line(name: str, color: str, days: Sequence[LoopDay], field: str, head: float) -> _Line:
    points = tuple((day.day + 0.5, 100 - 100 * getattr(day, field) / head) for day in days)
    return _Line(name, color, points, points[-1][1], getattr(days[-1], field))


def _apart(lines: Sequence[_Line]) -> list[_Line]:
    """The same lines, their names moved down where they would cover each other, and back up from the foot."""
    order = sorted(range(len(lines)), key=lambda i: lines[i].label_at)
    places = [lines[i].label_at for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + _LABEL_GAP)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 100 - _LABEL_GAP * (len(places) - 1 - i))
    at = dict(zip(order, places, strict=True))
    return [replace(line, label_at=at[i]) for i, line in enumerate(lines)]


def _change_words(value: float | None, unknown: str = "not known") -> str:
    """A relative change for people: 0.051 is "+5 %", and what rounds to nothing has no sign."""
    if value is None:
        return unknown
    sign = "" if abs(value) < 0.005 else "+" if value > 0 else "−"
    return f"{sign}{percent(abs(value))}"


def _model_numbers(loop: ArmResults) -> dict[str, int]:
    """Models in the order in which they served, from 1."""
    versions = dict.fromkeys(version for day in loop.days for version in (*day.model_versions, main_model(day)))
    return {version: number for number, version in enumerate(versions, start=1)}


def _strips(loop: ArmResults) -> list[_Strip]:
    days, numbers = loop.days, _model_numbers(loop)
    served = []
    for version, several in groupby(days, key=main_model):
        css = "served odd" if numbers[version] % 2 else "served"
        served.append(_Cell(css, str(numbers[version]), days=len(list(several))))
    return [
        _Strip("decision", [_decision_cell(day) for day in days]),
        _Strip("model", served),
        *(_Strip(part, [_drift_cell(day.drift.get(part)) for day in days]) for part in _PARTS),
        _Strip("quality", [_change_cell(day.entropy_change, TriggerName.QUALITY, day) for day in days]),
        _Strip("calibration", [_change_cell(day.calibration_change, TriggerName.CALIBRATION, day) for day in days]),
    ]


def _decision_cell(day: LoopDay) -> _Cell:
    return _Cell("unknown", "") if day.verdict is None else _Cell(f"verdict {day.verdict}", _MARKS[day.verdict])


def _drift_cell(status: DriftStatus | None) -> _Cell:
    return _Cell("unknown", "") if status is None else _Cell(str(status), _DRIFT_MARKS[status])


def _change_cell(change: float | None, trigger: TriggerName, day: LoopDay) -> _Cell:
    if change is None:
        return _Cell("unknown", "?")
    return _Cell("drifted" if trigger in day.raised else "stable", _change_words(change)[:-2])
