"""Which model should serve: quality first, latency as a bound, and the simplest of those that are equally good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evergreen.contracts.evaluation import BASE_RATE, Difference, Estimate, Latency, Verdict


@dataclass(frozen=True)
class Contender:
    """A model that may become champion."""

    name: str
    value: Estimate
    """The primary metric."""
    latency: Latency


@dataclass(frozen=True)
class Choice:
    """The champion, why, and whether any model at all is better than the baseline outside the interval."""

    champion: str
    reason: str
    any_beats_baseline: bool


def choose_champion(
    contenders: Sequence[Contender],
    differences: Mapping[tuple[str, str], Difference],
    *,
    metric: str,
    lower_is_better: bool,
    baseline: str,
    latency_budget_ms: float,
    simplest_first: Sequence[str],
) -> Choice:
    """Choose a champion.

    Among the models within the latency budget the one with the best metric leads. A model that is not worse than the
    leader outside the paired interval is as good; of those the simplest is champion, because it costs less to serve
    and to understand. One that does not itself beat the baseline is not taken for as good as a leader that does.

    Args:
        contenders: the models, at least one.
        differences: for each ordered pair of names (a, b), a's metric minus b's; also for pairs with the baseline.
        metric: name of the primary metric, for the reason.
        lower_is_better: of the metric.
        baseline: name of the baseline, which may be one of the contenders.
        latency_budget_ms: a contender whose latency says that it is over budget is left out; when all are, the
            fastest is champion and the reason says so.
        simplest_first: names in the order of complexity; models not in it count as more complex.

    Raises:
        ValueError: there is no contender.
    """
    if not contenders:
        raise ValueError("no contenders: at least one model is needed to choose a champion")
    ranked = sorted(contenders, key=lambda c: _complexity(c.name, simplest_first))
    any_beats = any(_beats(differences, c.name, baseline) for c in ranked)
    eligible = [c for c in ranked if c.latency.within_budget]
    if not eligible:
        fastest = min(ranked, key=lambda c: c.latency.p99_ms)
        reason = (
            f"No model meets the latency budget of {latency_budget_ms:g} ms; {fastest.name} is the fastest "
            f"(p99 {fastest.latency.p99_ms:.1f} ms). Raise the budget or train a smaller model."
        )
        return Choice(fastest.name, reason + _baseline_text(fastest, differences, baseline, any_beats), any_beats)
    comparable = [c for c in eligible if c.value.value is not None]
    if not comparable:
        simplest = eligible[0]
        reason = (
            f"{metric} is undefined on the test rows ({simplest.value.reason}), so nothing can be compared; "
            f"{simplest.name} is the simplest model."
        )
        reason += _budget_text(simplest, ranked, differences, latency_budget_ms)
        return Choice(simplest.name, reason, any_beats)
    # sorted() is stable: of equal values the simplest leads.
    by_quality = sorted(comparable, key=lambda c: _value(c) if lower_is_better else -_value(c))
    leader = by_quality[0]
    as_good = [c for c in comparable if c is leader or differences[c.name, leader.name].verdict is not Verdict.WORSE]
    if _beats(differences, leader.name, baseline):
        as_good = [c for c in as_good if _beats(differences, c.name, baseline)]
    champion = as_good[0]
    reason = _quality_text(champion, by_quality, differences, metric)
    reason += _simpler_text(champion, comparable, by_quality, differences, baseline)
    reason += _budget_text(champion, ranked, differences, latency_budget_ms)
    return Choice(champion.name, reason + _baseline_text(champion, differences, baseline, any_beats), any_beats)


def _complexity(name: str, simplest_first: Sequence[str]) -> int:
    return simplest_first.index(name) if name in simplest_first else len(simplest_first)


def _value(contender: Contender) -> float:
    assert contender.value.value is not None
    return contender.value.value


def _beats(differences: Mapping[tuple[str, str], Difference], name: str, baseline: str) -> bool:
    difference = differences.get((name, baseline))
    return difference is not None and difference.verdict is Verdict.BETTER


def format_estimate(estimate: Estimate, *, signed: bool = False) -> str:
    """Words for an estimate, e.g. `-0.0123 [-0.0150, -0.0098]`."""
    if estimate.value is None:
        return f"undefined ({estimate.reason})"
    sign = "+" if signed else ""
    text = f"{estimate.value:{sign}.4f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:{sign}.4f}, {estimate.high:{sign}.4f}]"


def _quality_text(
    champion: Contender,
    by_quality: Sequence[Contender],
    differences: Mapping[tuple[str, str], Difference],
    metric: str,
) -> str:
    leader = by_quality[0]
    if len(by_quality) == 1:
        return f"{champion.name} is the only model to choose from: {metric} {format_estimate(champion.value)}."
    if champion is leader:
        second = by_quality[1]
        difference = differences[champion.name, second.name]
        outside = "outside" if difference.verdict is Verdict.BETTER else "but within"
        return (
            f"{champion.name} has the best {metric}, {format_estimate(champion.value)}; it is ahead of {second.name}, "
            f"the next best, by {format_estimate(difference.estimate, signed=True)}, {outside} the interval."
        )
    difference = differences[champion.name, leader.name]
    faster = ""
    if champion.latency.p99_ms < leader.latency.p99_ms:
        faster = f" and faster (p99 {champion.latency.p99_ms:.1f} against {leader.latency.p99_ms:.1f} ms)"
    return (
        f"{champion.name} is as good as {leader.name}, which has the best {metric}, within the interval: "
        f"{format_estimate(champion.value)}, a difference of {format_estimate(difference.estimate, signed=True)}. "
        f"It is simpler{faster}."
    )


def _simpler_text(
    champion: Contender,
    comparable: Sequence[Contender],
    by_quality: Sequence[Contender],
    differences: Mapping[tuple[str, str], Difference],
    baseline: str,
) -> str:
    """Why none of the models that are simpler than the champion was taken."""
    simpler = comparable[: comparable.index(champion)]
    if not simpler:
        return ""
    best = next(c for c in by_quality if c in simpler)
    which = f"The simpler {best.name}" if len(simpler) == 1 else f"Of {len(simpler)} simpler models {best.name} is best"
    leader = by_quality[0]
    difference = differences[best.name, leader.name]
    if difference.verdict is not Verdict.WORSE:
        called = _called(baseline)
        why = f"it is not worse than {leader.name} outside the interval, but does not beat {called} outside it either"
    elif leader is champion:
        why = f"it is worse by {format_estimate(difference.estimate, signed=True)}, outside the interval"
    else:
        why = f"it is worse than {leader.name} by {format_estimate(difference.estimate, signed=True)}"
    return f" {which} (p99 {best.latency.p99_ms:.1f} ms): {why}."


def _budget_text(
    champion: Contender,
    ranked: Sequence[Contender],
    differences: Mapping[tuple[str, str], Difference],
    latency_budget_ms: float,
) -> str:
    """What the budget left out, and what that cost."""
    texts = []
    for slow in ranked:
        if slow.latency.within_budget:
            continue
        text = f" {slow.name} is left out: its p99 of {slow.latency.p99_ms:.1f} ms is over the budget of "
        text += f"{latency_budget_ms:g} ms"
        difference = differences.get((slow.name, champion.name))
        if difference is not None and difference.estimate.value is not None:
            amount = format_estimate(difference.estimate, signed=True)
            text += {
                Verdict.BETTER: f"; without the budget it would be better by {amount}",
                Verdict.TIED: f"; it is no better outside the interval ({amount})",
                Verdict.WORSE: f"; it is worse, too ({amount})",
            }[difference.verdict]
        texts.append(text + ".")
    return "".join(texts)


def _called(baseline: str) -> str:
    return "the base rate" if baseline == BASE_RATE else baseline


def _baseline_text(
    champion: Contender, differences: Mapping[tuple[str, str], Difference], baseline: str, any_beats: bool
) -> str:
    called = _called(baseline)
    difference = differences.get((champion.name, baseline))
    against = ""
    if difference is not None:
        against = f"{champion.name} differs by {format_estimate(difference.estimate, signed=True)}"
    if not any_beats:
        return f" No model beats {called} outside the interval" + (f": {against}." if against else ".")
    if difference is not None and difference.verdict is Verdict.BETTER:
        return f" It beats {called} by {format_estimate(difference.estimate, signed=True)}."
    return f" It does not beat {called} outside the interval" + (f": {against}." if against else ".")
