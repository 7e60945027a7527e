"""What came of a loop that ran in virtual time: a file that the page and the benchmarks read.

loop.json   LoopResults
"""

from __future__ import annotations

import datetime as dt

from pydantic import AwareDatetime, Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.decision import Verdict
from evergreen.contracts.gate import GateReport
from evergreen.contracts.monitoring_report import DriftStatus
from evergreen.contracts.release import CanaryReport

LOOP_FILE = "loop.json"


class Retraining(JsonModel):
    """A training run of the loop, and what became of its model."""

    as_of: AwareDatetime
    model_version: str
    train_rows: int
    way: str
    """How it was trained: of several ways the one that validated best."""
    cpu_seconds: float
    """Of the training alone; features are built every day, whatever is decided."""
    gate: GateReport | None
    """None: the policy releases whatever was trained."""
    canary: CanaryReport | None
    """None: it did not come so far, or the loop has no server."""
    released: bool
    package: str | None = None
    """Path of the package, relative to the results; None: it was not released."""


class LoopDay(JsonModel):
    """One day of the world under a policy, and the decision of its evening.

    Rates are those of `simulator.days.DaySummary`: clicks for each place of the pages that were left to the server.
    """

    day: int
    """Of the world, from 0."""
    date: dt.date
    model_versions: dict[str, int]
    """Requests by the model that answered."""
    requests: int
    click_rate: float
    """What happened; the next three are free of luck."""
    expected_rate: float
    oracle_rate: float
    random_rate: float
    failures: int
    """Failed calls."""
    verdict: Verdict | None
    """Of the evening; None: the policy looks at nothing."""
    reason: str
    raised: tuple[str, ...] = ()
    """Triggers that were raised, fired or held back by a guard."""
    drift: dict[str, DriftStatus] = Field(default_factory=dict)
    """By what was compared: "features", "predictions", "labels"."""
    entropy_change: float | None = None
    """Relative change of normalized entropy against the reference; None: not known yet."""
    calibration_change: float | None = None
    """Relative change of predicted over actual clicks; None: not known yet."""
    retraining: Retraining | None = None
    report: str | None = None
    """Path of the report, relative to this file; None: there is none, as for the next two."""
    page: str | None = None
    decision: str | None = None


class ArmResults(JsonModel):
    """A world under one policy."""

    policy: str
    days: tuple[LoopDay, ...]
    wall_seconds: float
    logs: dict[str, str] = Field(default_factory=dict)
    """Path, relative to the results, of what was logged, by what it is in words."""

    @property
    def trainings(self) -> tuple[Retraining, ...]:
        """All training runs, released or not."""
        return tuple(day.retraining for day in self.days if day.retraining is not None)

    @property
    def training_cpu_seconds(self) -> float:
        """Of all trainings."""
        return sum(training.cpu_seconds for training in self.trainings)


class LoopResults(JsonModel):
    """One world under several policies; they see the same users at the same times."""

    scenario: str
    begins: int
    """Day on which the scenario begins."""
    seed: int
    requests_per_day: int
    model: str
    arms: tuple[ArmResults, ...]
    wall_seconds: float

    def arm(self, policy: str) -> ArmResults:
        """The world under a policy.

        Raises:
            KeyError: it did not run.
        """
        for arm in self.arms:
            if arm.policy == policy:
                return arm
        raise KeyError(policy)
