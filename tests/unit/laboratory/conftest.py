"""A finished loop, written down by hand: tastes shift on day 5, on day 6 the loop answers, from day 7 on it works."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from evergreen.contracts.decision import TriggerName, Verdict
from evergreen.contracts.evaluation import Estimate, Latency
from evergreen.contracts.evaluation import Verdict as Comparison
from evergreen.contracts.gate import GateReport
from evergreen.contracts.monitoring_report import DriftStatus
from evergreen.contracts.release import CanaryCheck, CanaryReport
from evergreen.laboratory.results import ArmResults, LoopDay, LoopResults, Retraining

_START = datetime(2025, 1, 31, tzinfo=UTC)
_ORACLE = 0.08
_SHARES = {
    "ours": [0.75] * 5 + [0.50, 0.45] + [0.72] * 7,
    "never": [0.75] * 5 + [0.50] * 9,
    "daily": [0.75] * 5 + [0.50, 0.60] + [0.74] * 7,
}


def _retraining(policy: str, day: int, *, passed: bool) -> Retraining:
    """A training of an evening; schedules have neither gate nor canary."""
    bare = policy != "ours"
    version = f"dlrm-{day:012x}"
    gate = GateReport(
        challenger=version,
        incumbent="dlrm-000000000000",
        test_start=_START + timedelta(days=day - 1),
        test_end=_START + timedelta(days=day),
        rows=8_123,
        positives=431,
        metric="normalized_entropy",
        challenger_value=Estimate(value=0.86, low=0.84, high=0.88),
        incumbent_value=Estimate(value=0.97, low=0.95, high=0.99),
        difference=Estimate(value=-0.11, low=-0.13, high=-0.09),
        verdict=Comparison.BETTER,
        click_rate_ratio=Estimate(value=1.04, low=0.95, high=1.13),
        latency=Latency(rows=500, repetitions=50, p50_ms=2.0, p99_ms=4.2, within_budget=True),
        passed=passed,
        reason="normalized_entropy differs by -0.1100: better outside the interval" if passed else "<b>no better</b>",
    )
    checks = (
        CanaryCheck(name="error_rate", value=0.0, limit="at most 0", passed=True),
        CanaryCheck(name="p99_ms", value=12.5, limit="at most 50", passed=True),
    )
    canary = CanaryReport(challenger=version, champion="dlrm-000000000000", num_requests=200, checks=checks)
    return Retraining(
        as_of=_START + timedelta(days=day + 1),
        model_version=version,
        train_rows=41_250,
        way="scratch",
        cpu_seconds=10.0,
        gate=None if bare else gate,
        canary=canary if passed and not bare else None,
        released=passed,
        package=f"{policy}/state/releases/packages/{version}" if passed else None,
    )


def _day(policy: str, day: int) -> LoopDay:
    share = _SHARES[policy][day]
    ours = policy == "ours"
    trained = {"ours": {2: False, 6: True}, "daily": dict.fromkeys(range(14), True), "never": {}}[policy]
    serves = max((d for d, passed in trained.items() if passed and d < day), default=0)
    drifted = ours and day in (5, 6)
    verdict, reason = Verdict.KEEP, "No trigger is raised."
    raised: tuple[TriggerName, ...] = ()
    if ours and day == 2:
        verdict, reason, raised = Verdict.RETRAIN, "schedule: the model is old.", (TriggerName.SCHEDULE,)
    if ours and day == 5:
        raised = (TriggerName.CALIBRATION, TriggerName.DRIFT)
        reason = "calibration raised, held back: persistence (1 window, 2 are needed)."
    if ours and day == 6:
        verdict, raised = Verdict.RETRAIN, (TriggerName.QUALITY, TriggerName.CALIBRATION, TriggerName.DRIFT)
        reason = "quality: normalized entropy +12 % <script>alert(1)</script>."
    as_of = (_START + timedelta(days=day + 1)).strftime("%Y-%m-%dT%H%M%SZ")
    return LoopDay(
        day=day,
        date=(_START + timedelta(days=day)).date(),
        model_versions={f"dlrm-{serves:012x}": 1_000},
        requests=1_000,
        click_rate=share * _ORACLE + 0.001,
        expected_rate=share * _ORACLE,
        oracle_rate=_ORACLE,
        random_rate=0.02,
        failures=0,
        verdict=verdict if policy != "never" else None,
        reason=reason,
        raised=raised,
        drift={
            "features": DriftStatus.DRIFTED if drifted else DriftStatus.STABLE,
            "predictions": DriftStatus.SEASONAL if day == 8 else DriftStatus.STABLE,
            "labels": DriftStatus.UNKNOWN if day == 0 else DriftStatus.STABLE,
        }
        if ours
        else {},
        entropy_change=None if day == 0 or not ours else 0.12 if drifted else -0.004,
        calibration_change=None if day == 0 or not ours else 0.31 if drifted else 0.02,
        retraining=_retraining(policy, day, passed=trained[day]) if day in trained else None,
        report=f"ours/state/reports/{as_of}.json" if ours else None,
        page=f"ours/state/reports/{as_of}.html" if ours else None,
        decision=f"ours/state/decisions/{as_of}.json" if ours else None,
    )


@pytest.fixture(scope="session")
def make_results() -> Callable[..., LoopResults]:
    """`make_results(scenario=…, policies=…)`."""

    def make(scenario: str = "taste-shift", policies: tuple[str, ...] = ("ours", "never", "daily")) -> LoopResults:
        return LoopResults(
            scenario=scenario,
            begins=5,
            seed=0,
            requests_per_day=1_000,
            model="dlrm",
            arms=tuple(
                ArmResults(
                    policy=policy,
                    days=tuple(_day(policy, day) for day in range(14)),
                    wall_seconds=60.0,
                    logs={"click log": f"{policy}/world/events"},
                )
                for policy in policies
            ),
            wall_seconds=180.0,
        )

    return make


@pytest.fixture(scope="session")
def results(make_results: Callable[..., LoopResults]) -> LoopResults:
    """Three policies, fourteen days."""
    return make_results()
