"""What may call for a verdict, as far as this window tells: alarms, a release to take back, wishes for a training."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from evergreen.contracts.decision import DecisionConfig, Trigger, TriggerName, Verdict
from evergreen.contracts.evaluation import Estimate
from evergreen.contracts.monitoring_report import DriftStatus, MonitoringReport, Signal, SignalKind
from evergreen.contracts.quality import Comparison, ModelQuality
from evergreen.monitoring.decision_history import Past

_DAY = timedelta(days=1)

_ALARMS = {
    SignalKind.NULLS: TriggerName.BROKEN_FEATURE,
    SignalKind.CONSTANT: TriggerName.BROKEN_FEATURE,
    SignalKind.FRESHNESS: TriggerName.STALE_FEATURES,
    SignalKind.VOLUME: TriggerName.VOLUME_CHANGE,
    SignalKind.SCHEMA: TriggerName.SCHEMA_CHANGE,
    SignalKind.SKEW: TriggerName.SKEW,
    SignalKind.DEGRADED: TriggerName.DEGRADED,
    SignalKind.SUSPICIOUS: TriggerName.SUSPICIOUS,
}
"""What a signal of each kind is an alarm of. Unknown users and items are no fault of the data."""


def alarms(report: MonitoringReport, config: DecisionConfig) -> list[Trigger]:
    """Which signals say that the data is broken."""
    newcomers = 0.0
    for kind in (SignalKind.UNKNOWN_USERS, SignalKind.UNKNOWN_ITEMS):
        for signal in report.signals_of(kind)[:1]:
            newcomers += max((signal.value or 0.0) - (signal.reference or 0.0), 0.0)
    return [_alarm(signal, newcomers, config) for signal in report.signals if signal.kind in _ALARMS]


def _alarm(signal: Signal, newcomers: float, config: DecisionConfig) -> Trigger:
    threshold, below = _alarm_threshold(signal, newcomers, config)
    value = signal.value if signal.rows >= config.min_signal_rows else None
    raised = value is not None and threshold is not None and (value <= threshold if below else value >= threshold)
    reason = signal.reason
    if signal.value is not None and value is None:
        reason += f" ({signal.rows} rows, {config.min_signal_rows} are needed to raise an alarm)"
    elif threshold is None:
        reason += " (nothing to compare it with)"
    return Trigger(
        name=_ALARMS[signal.kind],
        calls_for=Verdict.ALARM,
        subject=signal.subject,
        value=value,
        threshold=threshold,
        raised=raised,
        windows=int(raised),
        fired=raised,
        reason=reason,
    )


def _alarm_threshold(signal: Signal, newcomers: float, config: DecisionConfig) -> tuple[float | None, bool]:
    """From where on a signal is an alarm, and whether that is downwards.

    Args:
        signal: of a kind that may be one.
        newcomers: increase of the shares of unknown users and items, who lack features and break none.
        config: the thresholds.
    """
    usual = signal.reference
    match signal.kind:
        case SignalKind.NULLS:
            return (None if usual is None else usual + config.nulls_increase + newcomers), False
        case SignalKind.CONSTANT:
            return _constant_threshold(usual, config), False
        case SignalKind.FRESHNESS:
            return (None if usual is None else max(config.stale_seconds, usual * config.stale_factor)), False
        case SignalKind.VOLUME:
            low = signal.value is not None and signal.value < 1
            return (config.volume_low if low else config.volume_high), low
        case SignalKind.SKEW:
            return (usual or 0.0) + config.skew_increase, False
        case SignalKind.DEGRADED:
            return (usual or 0.0) + config.degraded_increase, False
        case SignalKind.SUSPICIOUS:
            return (usual or 0.0) + config.suspicious_increase, False
        case _:
            return float(config.schema_changes), False


def _constant_threshold(usual: float | None, config: DecisionConfig) -> float | None:
    if usual is None:
        return None
    threshold = max(config.constant_share, usual + config.constant_increase)
    return min(threshold, 1.0) if usual <= config.constant_usual else threshold


def release_trigger(report: MonitoringReport, past: Past, config: DecisionConfig) -> Trigger:
    """Whether the model released last is worse than the one before it."""
    release, value, threshold, raised = past.release, None, None, False
    if release is None or release.replaced is None or release.is_rollback:
        reason = "no release to take back"
    elif past.as_of - release.released_at > config.probation:
        reason = f"{release.model_version} has passed its probation of {config.probation}"
    else:
        found = report.quality.comparison(release.model_version, release.replaced) if report.quality else None
        if found is None or found.click_rate_change.value is None or found.click_rate_change.high is None:
            why = found.click_rate_change.reason if found else "not both of them have matured impressions"
            reason = f"{release.model_version} and {release.replaced} cannot be compared: {why}"
        elif min(found.rows, found.against_rows) < config.min_rows:
            reason = f"{found.rows} and {found.against_rows} matured rows, {config.min_rows} of each model are needed"
        else:
            effect = config.rollback_effect if found.side_by_side else config.rollback_effect_apart
            value, threshold = found.click_rate_change.value, -effect
            raised = value <= threshold and found.click_rate_change.high < 0
            hours = "the same hours" if found.side_by_side else "other hours"
            reason = f"{release.model_version} has a click rate {value:+.1%} against {release.replaced} in {hours}"
            if raised and not found.side_by_side:
                # Fewer clicks in other hours may be the world's doing; an older model that is better now is not.
                raised = older_is_better(found, config) is True
                reason += _replayed_words(found)
    return Trigger(
        name=TriggerName.WORSE_RELEASE,
        calls_for=Verdict.ROLLBACK,
        subject=release.model_version if release else "",
        value=value,
        threshold=threshold,
        raised=raised,
        windows=int(raised),
        fired=raised,
        reason=reason,
    )


def older_is_better(found: Comparison, config: DecisionConfig) -> bool | None:
    """Whether the model before would have been better on what the new one has shown; None: not known."""
    change = found.replayed_change
    if change is None or change.value is None or change.high is None:
        return None
    return change.value <= -config.rollback_effect_replayed and change.high < 0


def _replayed_words(found: Comparison) -> str:
    change = found.replayed_change
    if change is None or change.value is None:
        why = change.reason if change is not None else "it was not asked again"
        return f"; whether {found.against} would have done better is not known: {why}"
    return f"; asked the same, {found.against} has a normalized entropy {change.value:+.1%} against it"


@dataclass(frozen=True)
class Wish:
    """A trigger that calls for a training, before its guards."""

    name: TriggerName
    value: float | None
    threshold: float | None
    raised: bool
    reason: str
    windows: int = 1
    """How many in a row it needs."""
    severe: bool = False
    """One is enough."""
    may_be_season: bool = False
    too_few: str | None = None
    """Why the window cannot tell."""
    needs_agreement: bool = False
    agreement: str | None = None
    """What agrees with it, for people; None: nothing does."""


def quality_wishes(report: MonitoringReport, config: DecisionConfig) -> list[Wish]:
    """Is the model worse than it was expected to be, in what it ranks or in what it promises?"""
    measured = report.quality.model(report.model_version) if report.quality else None
    too_few = _too_few(measured, config)
    return [
        _quality_wish(
            TriggerName.QUALITY,
            measured.entropy_change if measured else None,
            config.quality_effect,
            "normalized entropy {:+.1%} against the reference",
            too_few,
            config,
        ),
        _quality_wish(
            TriggerName.CALIBRATION,
            _either_way(measured.calibration_change) if measured else None,
            config.calibration_effect,
            "predicted and actual clicks are {:+.1%} further apart than in the reference",
            too_few,
            config,
        ),
    ]


def _quality_wish(
    name: TriggerName, change: Estimate | None, effect: float, words: str, too_few: str | None, config: DecisionConfig
) -> Wish:
    value = change.value if change is not None and too_few is None else None
    low = change.low if change is not None and value is not None else None
    raised = value is not None and low is not None and value >= effect and low > 0
    if change is None or value is None or low is None:
        reason = too_few or (change.reason if change is not None else None) or "not measured"
    else:
        reason = words.format(value) + f", at least {low:+.1%}"
    return Wish(
        name=name,
        value=value,
        threshold=effect,
        raised=raised,
        reason=reason,
        windows=config.quality_windows,
        severe=raised and low is not None and low >= config.severe_factor * effect,
        may_be_season=True,
        too_few=too_few,
    )


def _either_way(change: Estimate) -> Estimate:
    """Promising a third too few is as bad as half too many: the change, turned upwards."""
    if change.value is None or change.low is None or change.high is None or change.value >= 0:
        return change
    return Estimate(value=1 / (1 + change.value) - 1, low=1 / (1 + change.high) - 1, high=1 / (1 + change.low) - 1)


def _too_few(measured: ModelQuality | None, config: DecisionConfig) -> str | None:
    """Why the window cannot tell how good the model is; None: it can."""
    if measured is None:
        return "no matured impressions of this model"
    figures = measured.figures
    for what, have, need in (
        ("matured rows", figures.rows, config.min_rows),
        ("clicks", figures.clicks, config.min_clicks),
        ("users", figures.users, config.min_users),
    ):
        if have < need:
            return f"{have} {what}, {need} are needed to judge"
    return None


def drift_wishes(report: MonitoringReport, config: DecisionConfig) -> list[Wish]:
    """Is the model asked about another world?"""
    drift = report.feature_drift
    score = drift.score if drift.status is not DriftStatus.UNKNOWN else None
    (items,) = report.signals_of(SignalKind.UNKNOWN_ITEMS)[:1] or (None,)
    share, usual = (items.value, items.reference or 0.0) if items else (None, 0.0)
    too_few = items is not None and items.rows < config.min_signal_rows
    return [
        Wish(
            name=TriggerName.DRIFT,
            value=score,
            threshold=config.drift_score,
            # What is as on the same weekday is in the training data: a model cannot learn more of it.
            raised=drift.status is DriftStatus.DRIFTED and score is not None and score >= config.drift_score,
            reason=drift.reason,
            windows=config.drift_windows,
            needs_agreement=True,
            agreement=_agreement(report, config),
        ),
        Wish(
            name=TriggerName.NEW_ITEMS,
            value=share,
            threshold=usual + config.new_items_increase,
            raised=share is not None and not too_few and share >= usual + config.new_items_increase,
            reason=items.reason if items else "not measured",
            windows=config.new_items_windows,
            too_few=f"{items.rows} rows, {config.min_signal_rows} are needed" if items and too_few else None,
        ),
    ]


def _agreement(report: MonitoringReport, config: DecisionConfig) -> str | None:
    """What of quality says the same as drift does."""
    if report.quality is None:
        return None
    measured, estimated = report.quality.model(report.model_version), report.quality.estimated
    changes = {}
    if measured is not None and _too_few(measured, config) is None:
        changes["measured"] = measured.entropy_change
    if estimated is not None and estimated.model_version == report.model_version:
        changes["estimated"] = estimated.entropy_change
    for how, change in changes.items():
        if change.value is None or change.low is None:
            continue
        if change.value >= config.agreement_effect and change.low > 0:
            return f"quality agrees: {how} normalized entropy {change.value:+.1%}"
    return None


def time_wishes(report: MonitoringReport, past: Past, config: DecisionConfig) -> list[Wish]:
    """Is the model old, or has it seen little of what there is?"""
    age = past.as_of - report.trained_as_of if report.trained_as_of is not None else None
    unseen, words = _share_unseen(report, past, config)
    return [
        Wish(
            name=TriggerName.SCHEDULE,
            value=age / _DAY if age is not None else None,
            threshold=config.max_age / _DAY,
            raised=age is not None and age >= config.max_age,
            reason=f"the model knows the world until {report.trained_as_of}"
            if age is not None
            else "the model's age is not known",
        ),
        Wish(
            name=TriggerName.NEW_ROWS,
            value=unseen,
            threshold=config.new_rows_factor,
            raised=unseen is not None and unseen >= config.new_rows_factor,
            reason=words,
        ),
    ]


def _share_unseen(report: MonitoringReport, past: Past, config: DecisionConfig) -> tuple[float | None, str]:
    """How much more a training would have than the model has seen, as a multiple of that; and in words.

    Where quality has collapsed, it has seen what came then: rows of the world before teach what is no longer so.
    """
    collapsed, trained = past.collapsed, report.trained_as_of
    if collapsed is not None and trained is not None and trained > collapsed:
        share = (past.as_of - trained) / (trained - collapsed)
        return share, f"the model knows {trained - collapsed} of the {past.as_of - collapsed} since quality collapsed"
    new_rows = report.quality.new_matured_rows if report.quality else None
    train_rows = past.model.train_rows if past.model else None
    if new_rows is None or not train_rows:
        return None, "not known how many rows the model was trained on, or how many are new"
    age, there = (past.as_of - trained if trained is not None else None), train_rows + new_rows
    if config.training_window is not None and age:
        there = min(there, round(new_rows * (config.training_window / age)))
    words = f"{new_rows} rows have matured since, it was trained on {train_rows}, a training would have {there}"
    return max(there / train_rows - 1, 0.0), words
