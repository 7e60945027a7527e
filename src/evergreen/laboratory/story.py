"""What a loop in virtual time has shown, in figures and sentences: the top of the page, the end of `evergreen demo`.

Click rates are expected ones, which are free of luck. How well a model does is its share of the oracle's rate, because
the oracle has harder and easier days too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean

from evergreen.contracts.decision import TriggerName, Verdict
from evergreen.contracts.errors import InputError
from evergreen.laboratory.results import ArmResults, LoopDay, LoopResults

OURS, NEVER, DAILY = "ours", "never", "daily"

ENOUGH = 0.8
"""Share of a loss from which it counts as won back."""

_EVENTS = {
    "taste-shift": "tastes shifted",
    "slow-fade": "tastes began to change faster",
    "new-catalogue": "new items and users came in crowds",
    "bot-attack": "bots came",
    "broken-feature": "a feature pipeline began to write zeros",
    "logging-outage": "most impressions were no longer logged",
    "click-outage": "most clicks were no longer logged",
}
_BY_THE_CLOCK = {TriggerName.SCHEDULE, TriggerName.NEW_ROWS}
_NAMES = {
    OURS: "the loop",
    NEVER: "never retrained",
    DAILY: "retrained daily",
    "weekly": "retrained weekly",
    "drift": "retrained on drift",
}


@dataclass(frozen=True)
class Change:
    """What an event of the world did to the loop, and what the loop did about it."""

    words: str
    begins: int
    """Day, from 0."""
    before: float
    """Mean share of the oracle's click rate on the days before."""
    low_day: int
    low: float
    """Lowest share from then on while the same model serves."""
    noticed: int | None
    """First evening on which a monitor raised something other than the clock."""
    answered: int | None
    """First evening from then on with another verdict than keep; None: there was none."""
    recovered: int | None
    """First day with another model on which `ENOUGH` of the loss was won back; None: none, or no loss."""
    won_back: float | None
    """Share of the loss on that day, or else on the last; None: no other model, or no loss."""

    @property
    def loss(self) -> float:
        """In shares of the oracle's click rate; not above 0: it cost nothing."""
        return self.before - self.low


@dataclass(frozen=True)
class Cost:
    """A policy from the event on, or over all days where there is none."""

    policy: str
    name: str
    click_rate: float
    """Mean expected clicks a place."""
    oracle_share: float
    trainings: int
    """Of all days, as the next two."""
    released: int
    cpu_seconds: float


@dataclass(frozen=True)
class Story:
    """A loop in short."""

    headline: str
    paragraphs: tuple[str, ...]
    """What happened, and how it compares."""
    change: Change | None
    costs: tuple[Cost, ...]
    """The loop first."""

    def cost(self, policy: str) -> Cost | None:
        """Of a policy, if it ran."""
        return next((cost for cost in self.costs if cost.policy == policy), None)


def policy_name(policy: str) -> str:
    """A policy's name for people: `never` is "never retrained"."""
    return _NAMES.get(policy, f"retrained {policy.replace('-', ' ')}")


def event_words(scenario: str) -> str | None:
    """What happens to the world, e.g. "tastes shifted"; None: nothing on a day of its own."""
    return _EVENTS.get(scenario)


def tell(results: LoopResults) -> Story:
    """Put a finished loop into figures and words.

    Raises:
        InputError: the policy `ours` is not among the results, or it lived no day.
    """
    loop = next((arm for arm in results.arms if arm.policy == OURS), None)
    if loop is None or not loop.days:
        there = ", ".join(arm.policy for arm in results.arms) or "nothing"
        raise InputError(f"policy {OURS!r}: no days of it among the results ({there}); run the loop with it")
    change = _change(results, loop)
    first = change.begins if change else 0
    arms = [loop, *(arm for arm in results.arms if arm is not loop)]
    costs = tuple(_cost(arm, [day for day in arm.days if day.day >= first]) for arm in arms)
    happened = [_setting(results, loop), *(_of_change(change, loop) if change else []), *_of_trainings(loop)]
    compared = [*_comparison(costs, change), _of_failures(loop)]
    return Story(_headline(costs), (" ".join(happened), " ".join(compared)), change, costs)


def main_model(day: LoopDay) -> str:
    """The model that answered most of a day's requests; empty: there was none."""
    return max(day.model_versions, key=day.model_versions.__getitem__, default="")


def percent(value: float, digits: int = 0) -> str:
    """A share for people: 0.051 is "5.1 %" with one digit; the space does not break."""
    return f"{value * 100:.{digits}f}\N{NO-BREAK SPACE}%"


def _share(day: LoopDay) -> float:
    return day.expected_rate / day.oracle_rate if day.oracle_rate else 0.0


def _change(results: LoopResults, loop: ArmResults) -> Change | None:
    words = event_words(results.scenario)
    before = [day for day in loop.days if day.day < results.begins]
    after = [day for day in loop.days if day.day >= results.begins]
    if words is None or not before or not after:
        return None
    usual = fmean(_share(day) for day in before)
    with_the_old = list(takewhile(lambda day: main_model(day) == main_model(after[0]), after))
    worst = min(with_the_old, key=_share)
    loss = usual - _share(worst)
    later = after[len(with_the_old) :] if loss > 0 else []
    won = {day.day: 1 - (usual - _share(day)) / loss for day in later}
    recovered = next((day for day, share in won.items() if share >= ENOUGH), None)
    return Change(
        words=words,
        begins=results.begins,
        before=usual,
        low_day=worst.day,
        low=_share(worst),
        noticed=next((day.day for day in after if set(day.raised) - _BY_THE_CLOCK), None),
        answered=next((day.day for day in after if day.verdict not in (None, Verdict.KEEP)), None),
        recovered=recovered,
        won_back=won[recovered if recovered is not None else later[-1].day] if later else None,
    )


def _cost(arm: ArmResults, days: Sequence[LoopDay]) -> Cost:
    oracle = fmean(day.oracle_rate for day in days) if days else 0.0
    rate = fmean(day.expected_rate for day in days) if days else 0.0
    return Cost(
        policy=arm.policy,
        name=policy_name(arm.policy),
        click_rate=rate,
        oracle_share=rate / oracle if oracle else 0.0,
        trainings=len(arm.trainings),
        released=sum(training.released for training in arm.trainings),
        cpu_seconds=arm.training_cpu_seconds,
    )


def _headline(costs: Sequence[Cost]) -> str:
    ours = costs[0]
    by_policy = {cost.policy: cost for cost in costs}
    parts = []
    if (never := by_policy.get(NEVER)) and never.click_rate:
        parts.append(f"{_more(ours.click_rate, never.click_rate)} clicks {_than_as(ours, never)} without retraining")
    if (daily := by_policy.get(DAILY)) and daily.cpu_seconds:
        parts.append(f"for {percent(ours.cpu_seconds / daily.cpu_seconds)} of what training daily costs")
    if not parts:
        parts.append(f"{percent(ours.oracle_share)} of the clicks that an oracle gets")
    words = ", ".join(parts)
    return words[0].upper() + words[1:]


def _more(value: float, other: float) -> str:
    """E.g. "12 % more"; what rounds to nothing is "as many"."""
    change = value / other - 1
    if abs(change) < 0.0005:
        return "as many"
    return f"{percent(abs(change), 0 if abs(change) >= 0.1 else 1)} {'more' if change > 0 else 'fewer'}"


def _than_as(ours: Cost, other: Cost) -> str:
    return "as" if _more(ours.click_rate, other.click_rate) == "as many" else "than"


def _setting(results: LoopResults, loop: ArmResults) -> str:
    requests = sum(day.requests for day in loop.days)
    words = f"In {_count(len(loop.days), 'virtual day')} people asked the served {results.model.replace('_', ' ')} "
    return f"{words}{_count(requests, 'time')}."


def _of_change(change: Change, loop: ArmResults) -> list[str]:
    days = {day.day: day for day in loop.days}
    words = [f"On day {change.begins} {change.words}"]
    if change.loss > 0:
        words[0] += (
            f": the loop's expected click rate went from {percent(change.before)} of an oracle's to "
            f"{percent(change.low)} on {'that day' if change.low_day == change.begins else f'day {change.low_day}'}."
        )
    else:
        words[0] += ", which cost the loop no clicks."
    if change.noticed is not None:
        raised = ", ".join(name.replace("_", " ") for name in days[change.noticed].raised if name not in _BY_THE_CLOCK)
        words.append(f"The monitors noticed on {_evening(change.noticed, change.begins)} ({raised}).")
    else:
        words.append("The monitors raised nothing.")
    if change.won_back is not None and change.recovered is not None:
        words.append(
            f"On day {change.recovered}, {_count(change.recovered - change.begins, 'day')} after it began, "
            f"{percent(change.won_back)} of the loss was won back."
        )
    elif change.won_back is not None:
        words.append(f"By the last day {percent(change.won_back)} of the loss was won back.")
    elif change.loss > 0:
        words.append("No other model has served since.")
    return words


def _evening(day: int, begins: int) -> str:
    return "the same evening" if day == begins else f"the evening of day {day}"


def _of_trainings(loop: ArmResults) -> list[str]:
    words = []
    if loop.trainings:
        days = _evenings([day.day for day in loop.days if day.retraining is not None])
        released = sum(training.released for training in loop.trainings)
        refused = len(loop.trainings) - released
        became = (
            f"{released} went out" + (f", {refused} did not pass" if refused else "") if released else "none passed"
        )
        words.append(f"The loop trained {_count(len(loop.trainings), 'model')} on the {days}; {became}.")
    for verdict, said in ((Verdict.ALARM, "raised an alarm"), (Verdict.ROLLBACK, "went back to the model before")):
        if days_of := [day.day for day in loop.days if day.verdict is verdict]:
            words.append(f"It {said} on the {_evenings(days_of)}.")
    return words


def _comparison(costs: Sequence[Cost], change: Change | None) -> list[str]:
    ours = costs[0]
    since = f"From day {change.begins} on" if change else "Over all days"
    parts: list[str] = []
    for cost in costs[1:]:
        if cost.click_rate:
            how = f"{'one' if parts else 'a model'} that was {cost.name}"
            more, than = _more(ours.click_rate, cost.click_rate), _than_as(ours, cost)
            parts.append(f"{more}{' clicks' if not parts else ''} {than} {how}")
    if not parts:
        return []
    return [f"{since} the loop got {_listed(parts)} (expected clicks, so free of luck)."]


def _evenings(days: Sequence[int]) -> str:
    return (
        f"evening{'s' if len(days) > 1 else ''} of day{'s' if len(days) > 1 else ''} {_listed([str(d) for d in days])}"
    )


def _of_failures(loop: ArmResults) -> str:
    failures = sum(day.failures for day in loop.days)
    return f"{_count(failures, 'call')} to the loop's server failed." if failures else "No call to its server failed."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
