"""The report's figures, as SVG that goes straight into a page and takes its colours from the page's style.

matplotlib draws in placeholder colours, which are then replaced by CSS variables (`var(--ink)`, `var(--m0)` …), so one
figure serves light and dark. No pyplot, so no global state; hashed ids and no date, so the same input gives the same
bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from evergreen.contracts.evaluation import Curve, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
_SERIES = [f"#{0x10 + i:02x}0101" for i in range(12)]
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card"} | {
    color: f"--m{i}" for i, color in enumerate(_SERIES)
}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be selected
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.constrained_layout.use": True,
    "axes.titlesize": 10,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Series:
    """One model in a figure."""

    name: str
    color: int
    """Its place in the palette; 0 is the grey of the base rate."""
    chosen: bool = False

    @property
    def css(self) -> str:
        """The CSS variable of its colour."""
        return f"var(--m{self.color % len(_SERIES)})"

    @property
    def paint(self) -> str:
        """The placeholder colour."""
        return _SERIES[self.color % len(_SERIES)]


def _draw(name: str, label: str, size: tuple[float, float], paint: Callable[[Axes], None]) -> str:
    """Run `paint` on an empty chart and give it back as an `<svg>` element with an accessible label."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size)
        axes = figure.add_subplot()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # in a page it would apply to everything
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML needs none
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # ids of one figure would clash with those of the next
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'width="([\d.]+)pt" height="([\d.]+)pt"', f'role="img" aria-label="{label}"', svg, count=1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg


def _bar(estimate: Estimate) -> tuple[float, float] | None:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return None
    # A percentile interval need not hold the value; a bar cannot be drawn backwards.
    return max(estimate.value - estimate.low, 0.0), max(estimate.high - estimate.value, 0.0)


def forest(rows: Sequence[tuple[Series, Estimate]], *, label: str, baseline: float | None) -> str:
    """A dot and an interval for each model, the baseline as a line."""

    def paint(axes: Axes) -> None:
        if baseline is not None:
            axes.axvline(baseline, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for y, (series, estimate) in enumerate(rows):
            if estimate.value is None:
                axes.text(0.02, y, "undefined", transform=axes.get_yaxis_transform(), va="center", color=MUTED)
                continue
            _dot(axes, estimate.value, y, series, x_interval=_bar(estimate))
        axes.set_yticks(range(len(rows)), [series.name for series, _ in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.margins(x=0.08)

    return _draw("forest", f"{label} of every model with its interval", (6.2, max(3.6, 0.9 + 0.42 * len(rows))), paint)


def _dot(
    axes: Axes,
    x: float,
    y: float,
    series: Series,
    *,
    x_interval: tuple[float, float] | None = None,
    y_interval: tuple[float, float] | None = None,
    hollow: bool = False,
) -> None:
    axes.errorbar(
        x,
        y,
        xerr=None if x_interval is None else [[x_interval[0]], [x_interval[1]]],
        yerr=None if y_interval is None else [[y_interval[0]], [y_interval[1]]],
        fmt="o",
        color=series.paint,
        markersize=9 if series.chosen else 6,
        markerfacecolor="none" if hollow else series.paint,
        markeredgecolor=INK if series.chosen else series.paint,
        markeredgewidth=1.6 if series.chosen else 1.2 if hollow else 0,
        elinewidth=2,
        label=series.name,
        zorder=3 + series.chosen,
    )


def quality_against_latency(points: Sequence[tuple[Series, float, Estimate]], *, label: str, budget_ms: float) -> str:
    """The primary metric over p99 milliseconds; the chosen model is ringed, those over the budget are hollow."""

    def paint(axes: Axes) -> None:
        shown = [(series, p99, estimate) for series, p99, estimate in points if estimate.value is not None]
        for series, p99, estimate in shown:
            assert estimate.value is not None
            _dot(axes, p99, estimate.value, series, y_interval=_bar(estimate), hollow=p99 > budget_ms)
        times = [budget_ms, *(p99 for _, p99, _ in shown)]
        # Models differ by factors, from a linear model to a deep one, so equal factors are equal distances.
        axes.set_xscale("log")
        axes.set_xlim(min(times) / 1.5, max(times) * 1.5)
        axes.axvspan(budget_ms, max(times) * 1.5, color=GRID, alpha=0.45, linewidth=0, zorder=0)
        axes.axvline(budget_ms, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"budget {budget_ms:g} ms",
            (budget_ms, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -10),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=9,
        )
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.15)
        axes.set_xlabel("milliseconds to score one request (p99)")
        axes.set_ylabel(label)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)

    return _draw("latency", f"{label} against latency of every model", (6.2, 3.6), paint)


def roc_curves(curves: Mapping[str, Curve], series: Mapping[str, Series]) -> str:
    """ROC curve of every model."""

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for name, curve in curves.items():
            one = series[name]
            axes.plot(
                curve.false_positive_rate,
                curve.true_positive_rate,
                color=one.paint,
                linewidth=2.4 if one.chosen else 1.4,
                label=one.name,
                zorder=3 + one.chosen,
            )
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_aspect("equal")
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        axes.legend(loc="lower right", fontsize=9)

    return _draw("roc", "ROC curve of every model", (4.6, 4.4), paint)


def reliability(curves: Mapping[str, Curve], series: Mapping[str, Series]) -> str:
    """Predicted against actual rate in bins of equally many rows; on the diagonal is calibrated."""

    def paint(axes: Axes) -> None:
        bins = [one for curve in curves.values() for one in curve.calibration]
        top = max((max(one.predicted, one.actual) for one in bins), default=1.0) * 1.08 or 1.0
        axes.plot([0, top], [0, top], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for name, curve in curves.items():
            one = series[name]
            axes.plot(
                [b.predicted for b in curve.calibration],
                [b.actual for b in curve.calibration],
                marker="o",
                markersize=5 if one.chosen else 3.5,
                color=one.paint,
                linewidth=2.2 if one.chosen else 1.2,
                label=one.name,
                zorder=3 + one.chosen,
            )
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.set_aspect("equal")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("predicted rate")
        axes.set_ylabel("actual rate")
        axes.legend(loc="best", fontsize=9)

    return _draw("reliability", "Predicted against actual rate of every model", (4.6, 4.4), paint)


def by_period(
    periods: Sequence[str], values: Mapping[str, Sequence[Estimate | None]], *, series: Mapping[str, Series], label: str
) -> str:
    """The primary metric by day, week or month: a line for each model, the chosen one with its interval as a band."""

    def paint(axes: Axes) -> None:
        for name, estimates in values.items():
            one = series[name]
            known = [(x, e.value) for x, e in enumerate(estimates) if e is not None and e.value is not None]
            axes.plot(
                [x for x, _ in known],
                [value for _, value in known],
                color=one.paint,
                marker="o",
                markersize=4 if one.chosen else 2.5,
                linewidth=2.2 if one.chosen else 1.2,
                label=one.name,
                zorder=3 + one.chosen,
            )
            if one.chosen:
                band = [
                    (x, e.low, e.high)
                    for x, e in enumerate(estimates)
                    if e and e.low is not None and e.high is not None
                ]
                axes.fill_between(
                    [x for x, _, _ in band],
                    [low for _, low, _ in band],
                    [high for _, _, high in band],
                    color=one.paint,
                    alpha=0.16,
                    linewidth=0,
                )
        step = max(1, -(-len(periods) // 8))
        axes.set_xticks(range(0, len(periods), step), [periods[i] for i in range(0, len(periods), step)])
        axes.set_ylabel(label)
        axes.margins(y=0.12)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(5, max(1, len(values))), fontsize=9)

    return _draw("by_period", f"{label} of every model over time", (9.6, 3.3), paint)


def _day_number(moment: datetime) -> float:
    """Days since 1970, which is what matplotlib counts dates in."""
    return moment.timestamp() / 86_400


def timeline(splits: Sequence[tuple[str, datetime, datetime, str]], *, as_of: datetime) -> str:
    """Where train, validation and test lie; the gaps between them are the embargo.

    Args:
        splits: (name, start, end, words beneath the name).
        as_of: the moment up to which the snapshot knows the world.
    """

    def paint(axes: Axes) -> None:
        for i, (name, start, end, words) in enumerate(splits):
            left, right = _day_number(start), _day_number(end)
            axes.barh(0, right - left, left=left, height=0.5, color=MUTED, alpha=(0.35, 0.6, 1.0)[i])
            # Short splits have no room for their words, so these stand beneath, each at its own height.
            axes.plot([(left + right) / 2] * 2, [-0.25, -0.36 - 0.3 * i], color=MUTED, linewidth=1)
            axes.text(
                (left + right) / 2, -0.5 - 0.3 * i, f"{name}: {words}", ha=("center", "right", "right")[i], va="center"
            )
        axes.axvline(_day_number(as_of), color=INK, linewidth=1)
        axes.annotate(
            "as_of", (_day_number(as_of), 0.42), xytext=(-4, 0), textcoords="offset points", ha="right", color=MUTED
        )
        axes.set_ylim(-1.35, 0.6)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        locator = AutoDateLocator(maxticks=9)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]

    return _draw("timeline", "Train, validation and test on a time line", (9.6, 1.9), paint)
