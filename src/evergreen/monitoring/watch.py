"""A window of a loop is watched: what the state knows goes into the report, and the report into the state.

Pipelines and loops in virtual time call the same two functions: `watch` for the window that has just ended, and
`loop_history` for what `decision.decide` is told of the past.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.decision import OF_QUALITY, DecisionConfig, HistoryRecord, ReleaseRecord, Verdict
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.impressions import read_impressions
from evergreen.contracts.loop_state import LoopState, put
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.monitoring_report import MonitoringReport
from evergreen.contracts.outcomes import OUTCOME_FIELDS, Outcomes
from evergreen.contracts.quality import Comparison as QualityComparison
from evergreen.contracts.quality import QualityReport, Reference
from evergreen.contracts.release import Release, ReleaseKind
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.point_in_time import join_features
from evergreen.models.package import ModelInfo, ModelPackage
from evergreen.monitoring.evidently_report import rows_of_impressions, rows_of_reference, write_evidently_report
from evergreen.monitoring.importance import permutation_importance
from evergreen.monitoring.monitors import MonitorConfig, monitor_window
from evergreen.monitoring.quality import QualityConfig, measure_quality, reference_in_service
from evergreen.monitoring.reference import MonitoringReference, make_reference
from evergreen.monitoring.replay import replayed_change
from evergreen.monitoring.skew import Comparison, SkewReport

_SHORTEST_REFERENCE = 0.5
_EQUAL_WITHIN = 1e-6


class WatchConfig(JsonModel):
    """How a window is watched."""

    quality_window: timedelta | None = None
    """Length of the matured impressions on which quality is measured; None: as long as the window."""
    reference_window: timedelta = Field(default=timedelta(days=3), gt=timedelta(0))
    """A model's first days in service, which later ones are compared with: long enough to say something, short enough
    to be over before most changes. Until half a quality window of them has matured nothing is expected of the model."""
    probation: timedelta = DecisionConfig().probation
    """How long after a release the model before it is measured beside it."""
    monitor: MonitorConfig = MonitorConfig()
    quality: QualityConfig = QualityConfig()


def keep_reference(
    state: LoopState, training_set: TrainingSet, package: ModelPackage, *, seed: int = 0
) -> MonitoringReference:
    """Write what windows of a model are compared with. Must be there before the model serves; written once.

    Args:
        state: of the loop.
        training_set: that the model was trained on.
        package: the model.
        seed: of the samples.

    Raises:
        ArtifactError: the test split has no rows, or the rows are not the model's.
    """
    path = state.reference(package.version)
    if path.is_file():
        return MonitoringReference.read(path)
    importance = permutation_importance(package, training_set.read("validation"), seed=seed)
    reference = make_reference(training_set, package, importance, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{package.version}.partial"
    pq.write_table(rows_of_reference(training_set, package, seed=seed), scratch)
    scratch.replace(state.reference_rows(package.version))
    put(path, reference)
    return reference


def watch(
    state: LoopState,
    impressions: str,
    package: ModelPackage,
    *,
    as_of: datetime,
    window: timedelta,
    page: bool = True,
    suspicious_share: float | None = None,
    tables: FeatureTables | None = None,
    materialized_at: datetime | None = None,
    served_since: datetime | None = None,
    config: WatchConfig | None = None,
) -> MonitoringReport:
    """Measure the window [as_of - window, as_of) and put the report into the state. A report that is there stays.

    Quality is measured on outcomes as far as they were joined, on the newest that may have matured; against the model's
    first days in service as soon as they have, or where it was found worse, against the same as then. Within a
    release's probation, the model before is compared with it over the days before the release too.

    Args:
        state: of the loop; holds the reference of the model, and outcomes up to `as_of`.
        impressions: folder or fsspec URL of the impression log.
        package: the model that serves at the end of the window.
        as_of: the moment of the report.
        window: its length.
        page: also write Evidently's page.
        suspicious_share: see `monitor_window`.
        tables: features as they are known now, which those that served are compared with; None: skew is not known.
        materialized_at: the moment whose features served in the window; None: those of each request's own.
        served_since: what the server wrote before is not read: for a server whose requests are about the present. In
            virtual time: None.
        config: how to measure.

    Raises:
        ArtifactError: no reference of the model, or the impression log is broken.
    """
    config = config or WatchConfig()
    start = as_of - window
    if not state.reference(package.version).is_file():
        raise ArtifactError(
            f"{state.reference(package.version)}: no reference of the model that serves: write it with keep_reference "
            "before the model is released"
        )
    file = state.report(as_of)
    if file.is_file():
        report = MonitoringReport.read(file)
    else:
        outcomes = Outcomes.load(state.outcomes) if (state.outcomes / Outcomes.MANIFEST).exists() else None
        report = monitor_window(
            read_impressions(impressions, start=served_since),
            _reference(state, impressions, outcomes, package.version, start, window, served_since),
            start=start,
            end=as_of,
            as_of=as_of,
            outcomes=_matured(outcomes, as_of, window) if outcomes is not None else None,
            quality=_quality(
                state, outcomes, package, impressions, as_of, config.quality_window or window, served_since, config
            )
            if outcomes is not None and package.info.kind is not LogKind.RATINGS
            else None,
            skew=_skew(read_impressions(impressions, start=served_since), tables, materialized_at, start, as_of)
            if tables is not None
            else None,
            suspicious_share=suspicious_share,
            earlier=state.reports(as_of, since=start - timedelta(days=config.monitor.volume.days) - window),
            config=config.monitor,
        )
    if page and not state.page(as_of).is_file():
        _write_page(state, impressions, package, report, served_since)
    # Last: where there is a report, there is all that belongs to it.
    put(file, report)
    return report


def _reference(
    state: LoopState,
    impressions: str,
    outcomes: Outcomes | None,
    version: str,
    start: datetime,
    window: timedelta,
    served_since: datetime | None,
) -> MonitoringReference:
    """Of a model, with its first window in service as soon as that is over when another one starts.

    What was broken in that window would be what is usual, so after an alarm the training rows stay the reference.
    """
    reference = MonitoringReference.read(state.reference(version))
    released = next((release.released_at for release in state.released(start) if release.version == version), None)
    if reference.in_service is not None or released is None or released + window > start:
        return reference
    first = released + window
    alarms = (d for d in state.decisions(start + window, since=released) if d.verdict is Verdict.ALARM)
    if any(d.report.start < first and d.report.end > released for d in alarms):
        return reference
    matured = outcomes.rows(start=released, end=first, mature=True) if outcomes is not None else iter(())
    since = served_since and min(served_since, released - timedelta(hours=1))
    with_service = reference.with_service(
        read_impressions(impressions, start=since), matured, start=released, end=first
    )
    if with_service is None:
        return reference
    put(state.reference(version), with_service)
    return with_service


def loop_history(state: LoopState) -> list[HistoryRecord]:
    """Decisions, runs and releases of a loop, in any order; `decide` takes of them what was before its moment."""
    releases = [
        ReleaseRecord(
            model_version=release.version,
            released_at=release.released_at,
            replaced=release.previous,
            is_rollback=release.kind is ReleaseKind.ROLLBACK,
            train_rows=ModelInfo.read(state.package(release.version) / ModelPackage.MODEL).train_rows,
        )
        for release in state.released()
    ]
    return [*(decision.record() for decision in state.decisions()), *state.runs(), *releases]


def _skew(
    impressions: Iterator[pa.Table],
    tables: FeatureTables,
    materialized_at: datetime | None,
    start: datetime,
    end: datetime,
) -> SkewReport:
    """Of the answers of a window that had all features."""
    comparison = Comparison(partial(join_features, tables=tables), known_at=materialized_at, tolerance=_EQUAL_WITHIN)
    moment = pc.field("event_timestamp")
    for table in impressions:
        comparison.add(table.filter((moment >= start) & (moment < end) & ~pc.field("degraded")))
    return comparison.report({})


def _matured(outcomes: Outcomes, as_of: datetime, window: timedelta) -> Iterator[pa.Table]:
    start = as_of - outcomes.manifest.window - window
    return outcomes.rows(as_of=as_of, start=start, mature=True, columns=[field.name for field in OUTCOME_FIELDS])


def _quality(
    state: LoopState,
    outcomes: Outcomes,
    package: ModelPackage,
    impressions: str,
    as_of: datetime,
    length: timedelta,
    served_since: datetime | None,
    config: WatchConfig,
) -> QualityReport:
    start = as_of - outcomes.manifest.window - length
    releases = state.released(as_of)
    reference = _yardstick_of_a_doubt(state, package.version, as_of, start) or _quality_reference(
        state, outcomes, package, releases, as_of, start, length, config
    )
    report = measure_quality(
        outcomes,
        as_of=as_of,
        start=start,
        end=as_of,
        models={package.version: package},
        references={package.version: reference} if reference is not None else None,
        trained_as_of=package.info.as_of,
        config=config.quality,
    )
    last = releases[-1] if releases else None
    if last is None or last.previous is None or as_of - last.released_at > config.probation:
        return report
    beside = measure_quality(
        outcomes, as_of=as_of, start=last.released_at - config.probation, end=as_of, config=config.quality
    )
    comparison = beside.comparison(last.version, last.previous)
    if comparison is None or last.kind is ReleaseKind.ROLLBACK or not _is_fewer_clicks_apart(comparison):
        return report.model_copy(update={"comparisons": beside.comparisons})
    since = served_since and min(served_since, last.released_at - timedelta(hours=1))
    change = replayed_change(
        read_impressions(impressions, start=since),
        outcomes,
        newer=package if package.version == last.version else ModelPackage.load(state.package(last.version)),
        older=ModelPackage.load(state.package(last.previous)),
        as_of=as_of,
        start=last.released_at,
        end=as_of,
        config=config.quality,
    )
    pair = {last.version, last.previous}
    others = [other for other in beside.comparisons if {other.model_version, other.against} != pair]
    replayed = comparison.model_copy(update={"replayed_change": change})
    return report.model_copy(update={"comparisons": (*others, replayed)})


def _is_fewer_clicks_apart(comparison: QualityComparison) -> bool:
    """Whether the newer model is clicked less, but at another time: then it may be the world."""
    change = comparison.click_rate_change.value
    return not comparison.side_by_side and change is not None and change < 0


def _yardstick_of_a_doubt(state: LoopState, version: str, as_of: datetime, start: datetime) -> Reference | None:
    """What the window before was held against, if by that the model was worse and it was waited for a second window.

    The doubtful window may be its first day in service: held against that, it would be fine for ever.
    """
    before = state.decisions(as_of, since=start)
    if not before or before[-1].verdict is not Verdict.KEEP or OF_QUALITY.isdisjoint(before[-1].record().raised):
        return None
    quality = before[-1].report.quality
    model = quality.model(version) if quality is not None else None
    return model.reference if model is not None else None


def _quality_reference(
    state: LoopState,
    outcomes: Outcomes,
    package: ModelPackage,
    releases: Sequence[Release],
    as_of: datetime,
    end: datetime,
    length: timedelta,
    config: WatchConfig,
) -> Reference | None:
    """What is expected of a model: its own first days in service, or, as long as these are not over, those of the model
    that served before. A release is to be no worse; and a world that changes on the very next day is not to be taken
    for what the new model is able to.
    """
    ends = [*(release.released_at for release in releases[1:]), end]
    service = [(r.version, r.released_at, min(stop, end)) for r, stop in zip(releases, ends, strict=True)]
    for version, released, stop in reversed(service):
        stop = min(stop, released + config.reference_window)
        if stop - released < _SHORTEST_REFERENCE * length:
            continue
        model = package if version == package.version else ModelPackage.load(state.package(version))
        found = reference_in_service(
            outcomes, version, as_of=as_of, start=released, end=stop, model=model, config=config.quality
        )
        if found is not None:
            return found
    return None


def _write_page(
    state: LoopState, impressions: str, package: ModelPackage, report: MonitoringReport, served_since: datetime | None
) -> None:
    rows = rows_of_impressions(
        read_impressions(impressions, start=served_since),
        model_version=package.version,
        start=report.start,
        end=report.end,
    )
    reference = pq.read_table(state.reference_rows(package.version))
    page = state.page(report.as_of)
    page.parent.mkdir(parents=True, exist_ok=True)
    scratch = page.with_name(f".{page.name}.partial")
    with tempfile.TemporaryDirectory() as elsewhere:
        write_evidently_report(rows, reference, report, scratch, Path(elsewhere) / "figures.json")
    scratch.replace(page)
