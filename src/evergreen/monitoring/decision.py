"""Retrain, or not? A pure function of what was measured, what was done before, and the moment.

Broken data comes first: an alarm is never held back, and nothing else is decided on such a window. Then a release that
turns out worse is taken back. Then triggers may call for a training, and guards may hold it back; what a guard holds
back is in the decision all the same, with its value, its threshold and the reason.

Matured labels, age and estimated quality decide. Features that drift open an investigation; alone they retrain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from evergreen.contracts.decision import (
    DecisionConfig,
    Guard,
    GuardName,
    HistoryRecord,
    PastDecision,
    RetrainDecision,
    Trigger,
    TriggerName,
    Verdict,
    Window,
)
from evergreen.contracts.monitoring_report import DriftStatus, MonitoringReport
from evergreen.monitoring.decision_history import Past, collapsed_at, relevant_history
from evergreen.monitoring.triggers import (
    Wish,
    alarms,
    drift_wishes,
    quality_wishes,
    release_trigger,
    time_wishes,
)


def decide(
    report: MonitoringReport,
    history: Sequence[RetrainDecision | HistoryRecord],
    *,
    as_of: datetime,
    config: DecisionConfig | None = None,
) -> RetrainDecision:
    """Decide what follows from a report.

    Args:
        report: of the window that has just ended.
        history: earlier decisions, runs and releases, in any order. What is not before `as_of` is not looked at, so a
            decision that is made again after a crash, with its own consequences in the history, is the same.
        as_of: the moment of the decision.
        config: thresholds.

    Raises:
        ValueError: `as_of` has no time zone, or the report knows what comes after it.
    """
    config = config or DecisionConfig()
    if as_of.tzinfo is None:
        raise ValueError(f"as_of={as_of.isoformat()}: has no offset: write {as_of.isoformat()}+00:00 if it is UTC")
    if report.as_of > as_of:
        raise ValueError(f"as_of={as_of}: the report knows the world until {report.as_of}: decide as of then, or later")
    known = relevant_history(report, history, as_of=as_of, config=config)
    past = Past(known, report, as_of, config)
    release = release_trigger(report, past, config)
    wishes = [*quality_wishes(report, config), *drift_wishes(report, config), *time_wishes(report, past, config)]
    judged = [_judge(wish, past, config) for wish in wishes]
    triggers = (*alarms(report, config), release, *(trigger for trigger, _ in judged))
    guards = (
        *(guard for _, own in judged for guard in own),
        *_run_guards(report, past, config, judged),
    )
    verdict, reason = _verdict(triggers, guards)
    broken = [Window(start=p.start, end=p.end) for p in past.decisions if p.verdict is Verdict.ALARM]
    if verdict is Verdict.ALARM:
        broken.append(Window(start=report.start, end=report.end))
    return RetrainDecision(
        as_of=as_of,
        verdict=verdict,
        reason=reason,
        triggers=triggers,
        guards=guards,
        investigate=_investigate(report, past, triggers, guards),
        broken_windows=tuple(w for w in broken if report.trained_as_of is None or w.end > report.trained_as_of),
        rollback_to=past.release.replaced if verdict is Verdict.ROLLBACK and past.release else None,
        config=config,
        history=known,
        report=report,
    )


def changed_at(decision: RetrainDecision) -> datetime | None:
    """Since when clicks follow other rules than before; None: nothing is known of a change.

    It is the start of the window in which quality collapsed, if that has led to a training: now, or as far back as the
    decision's history goes. A slight loss says nothing of the kind: a model is somewhat off, and a training on the few
    rows since would make it more so. What else moved may have moved without any change of the rules.
    """
    past = [record for record in decision.history if isinstance(record, PastDecision)]
    windows = sorted([*past, decision.record()], key=lambda window: window.as_of)
    collapsed = collapsed_at(windows)
    answered = any(w.verdict is Verdict.RETRAIN and collapsed is not None and w.end > collapsed for w in windows)
    return collapsed if answered else None


def replay(path: Path) -> RetrainDecision:
    """Make the decision of a file again, from what it holds.

    Raises:
        ArtifactError: not a decision, or of another version of Evergreen.
    """
    decision = RetrainDecision.read(path)
    return decide(decision.report, decision.history, as_of=decision.as_of, config=decision.config)


def _judge(wish: Wish, past: Past, config: DecisionConfig) -> tuple[Trigger, list[Guard]]:
    """A trigger with the guards of its own."""
    windows = past.windows_raised(wish.name) if wish.raised else 0
    guards = []
    if wish.too_few is not None:
        guards.append(_guard(GuardName.MINIMUM_SAMPLES, wish, None, None, True, wish.too_few))
    if wish.windows > 1 and wish.raised:
        blocks = windows < wish.windows and not wish.severe
        words = f"{windows} windows in a row of {wish.windows}" + (", but severe" if wish.severe else "")
        guards.append(_guard(GuardName.PERSISTENCE, wish, float(windows), float(wish.windows), blocks, words))
    if wish.may_be_season and wish.raised:
        before = None if wish.severe else past.came_and_went(wish.name, config.season)
        words = "was not so a season ago, or has not gone since"
        if before is not None:
            words = f"was so on {before.as_of:%Y-%m-%d} too, and has gone in between: it comes and goes"
        guards.append(_guard(GuardName.SEASON, wish, None, None, before is not None, words))
    if wish.needs_agreement and wish.raised:
        words = wish.agreement or "neither measured nor estimated quality is worse: look into it, but do not retrain"
        guards.append(_guard(GuardName.AGREEMENT, wish, None, None, wish.agreement is None, words))
    trigger = Trigger(
        name=wish.name,
        calls_for=Verdict.RETRAIN,
        value=wish.value,
        threshold=wish.threshold,
        raised=wish.raised,
        windows=windows,
        severe=wish.severe,
        fired=wish.raised and not any(guard.blocks for guard in guards),
        reason=wish.reason,
    )
    return trigger, guards


def _guard(
    name: GuardName, wish: Wish, value: float | None, threshold: float | None, blocks: bool, reason: str
) -> Guard:
    return Guard(name=name, triggers=(wish.name,), value=value, threshold=threshold, blocks=blocks, reason=reason)


def _run_guards(
    report: MonitoringReport, past: Past, config: DecisionConfig, judged: Sequence[tuple[Trigger, list[Guard]]]
) -> list[Guard]:
    """What stands against a training, whatever calls for it."""
    wishes = tuple(trigger.name for trigger, _ in judged)
    now = PastDecision(
        as_of=past.as_of,
        start=report.start,
        end=report.end,
        model_version=report.model_version,
        verdict=Verdict.KEEP,
        raised=tuple(trigger.name for trigger, _ in judged if trigger.raised),
        severe=tuple(trigger.name for trigger, _ in judged if trigger.severe),
    )
    collapsed = collapsed_at([*past.decisions, now])
    counted = [run for run in past.recent_runs if collapsed is None or run.started_at > collapsed]
    new_rows = report.quality.new_matured_rows if report.quality else None
    since = past.as_of - past.last_change if past.last_change is not None else None
    return [
        Guard(
            name=GuardName.NEW_DATA,
            triggers=wishes,
            value=new_rows,
            threshold=config.min_new_rows,
            blocks=new_rows is not None and new_rows < config.min_new_rows,
            reason=f"{'unknown' if new_rows is None else new_rows}: matured rows that the model has not seen",
        ),
        Guard(
            name=GuardName.ONE_RUN,
            triggers=wishes,
            value=len(past.running),
            threshold=1,
            blocks=bool(past.running),
            reason=f"running: {', '.join(run.run_id for run in past.running) or 'none'}",
        ),
        Guard(
            name=GuardName.COOLDOWN,
            triggers=wishes,
            value=since / timedelta(hours=1) if since is not None else None,
            threshold=config.cooldown / timedelta(hours=1),
            blocks=since is not None and since < config.cooldown,
            reason=f"last run or release at {past.last_change}"
            if since is not None
            else "no run and no release before",
        ),
        Guard(
            name=GuardName.BUDGET,
            triggers=wishes,
            value=len(counted),
            threshold=config.budget,
            blocks=len(counted) >= config.budget,
            reason=f"{len(counted)} runs began in the last seven days"
            + (
                f" after quality collapsed on {collapsed:%Y-%m-%d %H:%M}"
                if len(counted) < len(past.recent_runs)
                else ""
            ),
        ),
    ]


def _verdict(triggers: Sequence[Trigger], guards: Sequence[Guard]) -> tuple[Verdict, str]:
    """The verdict, and why in a sentence or two."""
    for verdict in (Verdict.ALARM, Verdict.ROLLBACK):
        if fired := [t for t in triggers if t.fired and t.calls_for is verdict]:
            return verdict, f"{_names(fired)}: {'; '.join(t.reason for t in fired[:3])}."
    fired = [t for t in triggers if t.fired]
    held = [g for g in guards if g.blocks and len(g.triggers) > 1]
    if fired and not held:
        return Verdict.RETRAIN, f"{_names(fired)}: {'; '.join(t.reason for t in fired)}."
    if fired:
        against = "; ".join(f"{guard.name} ({guard.reason})" for guard in held)
        return Verdict.KEEP, f"{_names(fired)} would retrain, held back by {against}."
    if raised := [t for t in triggers if t.raised]:
        own = [g for g in guards if g.blocks and len(g.triggers) == 1 and g.triggers[0] in {t.name for t in raised}]
        against = "; ".join(f"{guard.triggers[0]}: {guard.name} ({guard.reason})" for guard in own)
        return Verdict.KEEP, f"{_names(raised)} raised, held back: {against}."
    return Verdict.KEEP, "No trigger is raised."


def _names(triggers: Sequence[Trigger]) -> str:
    return ", ".join(dict.fromkeys(f"{t.name} of {t.subject}" if t.subject else t.name for t in triggers))


def _investigate(
    report: MonitoringReport, past: Past, triggers: Sequence[Trigger], guards: Sequence[Guard]
) -> tuple[str, ...]:
    """What a person should look at."""
    notes = []
    if any(t.name is TriggerName.DRIFT and t.raised and not t.fired for t in triggers):
        columns = ", ".join(report.feature_drift.columns[:5])
        notes.append(f"features drift, without a training so far: {columns}: {report.feature_drift.reason}")
    for what, finding in (("predictions", report.prediction_drift), ("labels", report.label_drift)):
        if finding.status is DriftStatus.DRIFTED:
            notes.append(f"{what} drift: {finding.reason}")
    if report.quality is None:
        notes.append("no outcomes were given, so nothing is known of quality")
    notes += [f"run {run.run_id} began at {run.started_at} and never ended" for run in past.dead]
    notes += [f"{g.triggers[0]}: {g.reason}" for g in guards if g.name is GuardName.MINIMUM_SAMPLES]
    notes += [
        f"{t.subject} stays: {t.reason}"
        for t in triggers
        if t.name is TriggerName.WORSE_RELEASE
        and not t.raised
        and t.value is not None
        and t.value <= (t.threshold or 0)
    ]
    if unknown := [t for t in triggers if t.calls_for is Verdict.ALARM and t.value is None]:
        notes.append(f"signals that cannot be judged: {_names(unknown)}; {unknown[0].reason}")
    return tuple(notes)
