"""The decision: keep, retrain, alarm or roll back, with all that it was made of, so that it can be made again.

    decision.json   RetrainDecision

`monitoring.decision.decide` is a pure function of a report, a history and a moment; the file holds all three, and the
configuration. What of the history matters is held in short, so that files do not grow with each decision.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.monitoring_report import MonitoringReport

SCHEMA_VERSION = 1


class Verdict(StrEnum):
    """What to do."""

    KEEP = "keep"
    RETRAIN = "retrain"
    ALARM = "alarm"  # the data is broken: a person must look, and nothing may learn from it
    ROLLBACK = "rollback"  # to the model before


class TriggerName(StrEnum):
    """What may call for a verdict other than keep."""

    BROKEN_FEATURE = "broken_feature"
    STALE_FEATURES = "stale_features"
    VOLUME_CHANGE = "volume_change"
    SCHEMA_CHANGE = "schema_change"
    SKEW = "skew"
    DEGRADED = "degraded"
    SUSPICIOUS = "suspicious"
    WORSE_RELEASE = "worse_release"
    QUALITY = "quality"
    CALIBRATION = "calibration"
    DRIFT = "drift"
    NEW_ITEMS = "new_items"
    SCHEDULE = "schedule"
    NEW_ROWS = "new_rows"


OF_QUALITY = frozenset({TriggerName.QUALITY, TriggerName.CALIBRATION})
"""What says that the model has become worse."""


class GuardName(StrEnum):
    """What may hold a trigger back. An alarm is never held back."""

    MINIMUM_SAMPLES = "minimum_samples"
    PERSISTENCE = "persistence"
    AGREEMENT = "agreement"
    SEASON = "season"
    NEW_DATA = "new_data"
    ONE_RUN = "one_run"
    COOLDOWN = "cooldown"
    BUDGET = "budget"


class DecisionConfig(JsonModel):
    """Thresholds of the decision. A value at its threshold counts as beyond it."""

    # Is the data whole?
    min_signal_rows: int = Field(default=200, ge=1)
    """A signal of fewer rows raises no alarm: at 200 a share of 0.2 is known to within 0.06, which no threshold below
    is nearer than to what is usual."""
    nulls_increase: float = Field(default=0.2, gt=0, le=1)
    """A feature that is missing in so much more of the rows than in the training data is broken. What new users and
    items explain is taken off: they lack features, and break none. Holes of a tenth come and go with the catalogue."""
    constant_share: float = Field(default=0.95, gt=0, le=1)
    """A feature with one value in so many rows says nothing; a pipeline that writes zeros gives 1.0 …"""
    constant_increase: float = Field(default=0.2, gt=0, le=1)
    """… unless it was nearly so when the model was trained: many counters are mostly 0 …"""
    constant_usual: float = Field(default=0.9, gt=0, le=1)
    """… but up to this usual share, one value in all rows is not chance."""
    stale_factor: float = Field(default=3.0, gt=1)
    """Features so many times older than in the training data are stale. An hourly batch that missed a run is at 2."""
    stale_seconds: float = Field(default=6 * 3600.0, gt=0)
    """… and at least so old: what is usually seconds old may well be minutes old."""
    volume_low: float = Field(default=0.5, ge=0, lt=1)
    """Fewer requests than this part of the expected: an outage of the log. Holidays halve traffic at most."""
    volume_high: float = Field(default=4.0, gt=1)
    """More requests than so many times the expected: a bot, or a log written twice. Campaigns double traffic."""
    schema_changes: int = Field(default=1, ge=1)
    """Any change of the logged columns that no release explains."""
    skew_increase: float = Field(default=0.1, gt=0, le=1)
    """Share of rows in which a feature differs from the offline store's, above what is usual: features that move within
    the hour differ in a few per cent, a second definition in nearly all."""
    degraded_increase: float = Field(default=0.2, gt=0, le=1)
    """Share of answers made of defaults, above what is usual. They are rows to be served, not to be learned from."""
    suspicious_increase: float = Field(default=0.1, gt=0, le=1)
    """Share of rows that no person made, above what is usual. At a tenth a model learns the bots' taste."""

    # Is the model that was released last worse?
    probation: timedelta = timedelta(days=3)
    """How long after its release a model may be taken back. Later it is the world that has changed."""
    rollback_effect: float = Field(default=0.05, gt=0, lt=1)
    """Relative loss of click rate against the model before, when both served in the same hours …"""
    rollback_effect_apart: float = Field(default=0.2, gt=0, lt=1)
    """… and when they did not: from a weekday to a weekend the click rate alone moves by a tenth and more. It may
    be the world even then, so …"""
    rollback_effect_replayed: float = Field(default=0.05, gt=0, lt=1)
    """… the model before must also be better by so much, in normalized entropy, on what the new one has shown."""

    # Has the model become worse?
    min_rows: int = Field(default=1000, ge=1)
    """Matured rows of the window below which nothing is said of quality."""
    min_clicks: int = Field(default=50, ge=1)
    """With 50 clicks the click rate is known to within 28 %; with fewer nothing is."""
    min_users: int = Field(default=30, ge=2)
    """Users are what the bootstrap draws; with fewer its intervals are too short."""
    quality_effect: float = Field(default=0.02, gt=0)
    """Relative increase of normalized entropy over the reference. A week without training costs about 1 % (Facebook,
    He et al. 2014), which is the schedule's to mend; the double of it is not age."""
    calibration_effect: float = Field(default=0.15, gt=0)
    """Relative increase of predicted over actual clicks. A model shows what it overrates, so a few per cent are always
    there; a change of taste gives a third and more."""
    quality_windows: int = Field(default=2, ge=1)
    """Windows in a row in which quality must be worse: one bad day is not worth a training."""
    severe_factor: float = Field(default=10.0, ge=1)
    """… unless the whole interval lies beyond so many times the effect: then one window is enough. A day may be harder
    than others by a tenth; when people's tastes turn, normalized entropy all but doubles."""
    season: timedelta = timedelta(days=7)
    """What was raised one season ago, and was gone in between, comes and goes: retraining is not the answer."""

    # Is the world another one?
    drift_score: float = Field(default=0.2, gt=0, le=1)
    """Importance of the features that drifted: below a fifth the model leans on others."""
    drift_windows: int = Field(default=2, ge=1)
    """Windows in a row."""
    agreement_effect: float = Field(default=0.01, gt=0)
    """Drift retrains only if quality, as measured or as estimated, is worse by this: features may move without harm."""
    new_items_increase: float = Field(default=0.2, gt=0, le=1)
    """Share of shown items that the model does not know, above what is usual: for them it knows no taste."""
    new_items_windows: int = Field(default=2, ge=1)
    """Windows in a row."""

    # Is it time?
    max_age: timedelta = timedelta(days=7)
    """Of what the model knows. Weekly is the common schedule; the other triggers are there to be faster than it."""
    new_rows_factor: float = Field(default=1.0, gt=0)
    """A training would have so many times more rows than the model was trained on: it has seen half of what there is.
    After a collapse of quality what came before it does not count; then it is time, not rows."""
    training_window: timedelta | None = None
    """How far back a training reaches: what is older is not there to be learned. Null: all of the log."""

    # May we?
    min_new_rows: int = Field(default=1000, ge=0)
    """Matured rows that the model has not seen, without which there is nothing to learn."""
    cooldown: timedelta = timedelta(days=1)
    """Since the last run began and the last release: a new model must be measured before it is judged."""
    max_run_time: timedelta = timedelta(hours=12)
    """A run that has not ended by then is taken for dead; else a crash would end all retraining."""
    budget: int = Field(default=3, ge=1)
    """Runs in seven days, or since quality collapsed if that is less: below half of what daily retraining costs,
    whatever the triggers say. What was spent on a world that is gone does not stand against learning the new one."""


class Trigger(JsonModel):
    """One reason to act, whether it holds or not."""

    name: TriggerName
    calls_for: Verdict
    subject: str = ""
    """A feature or a model version; empty for the whole."""
    value: float | None
    """Null: unknown, and then it is not raised."""
    threshold: float | None
    raised: bool
    """The value is at or beyond the threshold in this window, and not by chance."""
    windows: int = 0
    """Windows in a row in which it is, this one included; those that overlap count once."""
    severe: bool = False
    """Raised, and so far beyond the threshold that one window is enough."""
    fired: bool
    """Raised, and no guard of its own holds it back."""
    reason: str


class Guard(JsonModel):
    """One reason not to act."""

    name: GuardName
    triggers: tuple[TriggerName, ...]
    """What it is about."""
    value: float | None
    threshold: float | None
    blocks: bool
    reason: str


class PastDecision(JsonModel):
    """What later decisions need of a decision."""

    kind: Literal["decision"] = "decision"
    as_of: AwareDatetime
    start: AwareDatetime
    end: AwareDatetime
    """The window that it was about."""
    model_version: str
    verdict: Verdict
    raised: tuple[TriggerName, ...]
    """Triggers, fired or not."""
    severe: tuple[TriggerName, ...] = ()
    """Of these the ones that need no second window to be believed."""


class RunRecord(JsonModel):
    """A training run, successful or not. Times are those of the loop, which may be virtual."""

    kind: Literal["run"] = "run"
    run_id: str
    started_at: AwareDatetime
    finished_at: AwareDatetime | None = None
    """Null: not yet, or it was killed."""


class ReleaseRecord(JsonModel):
    """A model that was put before users, by a run or by hand."""

    kind: Literal["release"] = "release"
    model_version: str
    released_at: AwareDatetime
    replaced: str | None = None
    """The version that served before; null: the first."""
    is_rollback: bool = False
    train_rows: int | None = None


HistoryRecord = Annotated[PastDecision | RunRecord | ReleaseRecord, Field(discriminator="kind")]


class Window(JsonModel):
    """A half-open range of event_timestamp."""

    start: AwareDatetime
    end: AwareDatetime


class RetrainDecision(JsonModel):
    """decision.json."""

    schema_version: int = SCHEMA_VERSION
    as_of: AwareDatetime
    verdict: Verdict
    reason: str
    """For people, in a sentence or two."""
    triggers: tuple[Trigger, ...]
    guards: tuple[Guard, ...]
    investigate: tuple[str, ...]
    """What a person should look at, though nothing follows from it by itself."""
    broken_windows: tuple[Window, ...]
    """Where the data was broken since the model was trained, this window included: leave them out of a training."""
    rollback_to: str | None
    """The version to go back to; null unless that is the verdict."""
    config: DecisionConfig
    history: tuple[HistoryRecord, ...]
    """What of the history it rests on."""
    report: MonitoringReport

    def trigger(self, name: TriggerName) -> Trigger | None:
        """The trigger of that name that went furthest: fired, then raised, then known; None: there is none."""
        found = [trigger for trigger in self.triggers if trigger.name is name]
        return max(found, key=lambda t: (t.fired, t.raised, t.value is not None), default=None)

    def record(self) -> PastDecision:
        """What later decisions need of it."""
        return PastDecision(
            as_of=self.as_of,
            start=self.report.start,
            end=self.report.end,
            model_version=self.report.model_version,
            verdict=self.verdict,
            raised=tuple(sorted({trigger.name for trigger in self.triggers if trigger.raised})),
            severe=tuple(sorted({trigger.name for trigger in self.triggers if trigger.severe})),
        )


def happened_at(record: HistoryRecord) -> datetime:
    """When a record came into being."""
    if isinstance(record, PastDecision):
        return record.as_of
    return record.started_at if isinstance(record, RunRecord) else record.released_at
