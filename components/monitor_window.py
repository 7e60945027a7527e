"""Step: the window that has just ended is measured."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def monitor_window(
    snapshot: dsl.Input[dsl.Dataset],
    suspicious: dsl.Input[dsl.Dataset],
    impressions: str,
    state: str,
    as_of: str,
    window_hours: float,
    batch_hours: float,
    live: bool,
    report: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Compare the window with what its model was made for, and measure quality on the outcomes that have matured.

    Args:
        snapshot: the log as it was judged by `filter_events`.
        suspicious: the labels of that log.
        impressions: folder or fsspec URL of the impression log.
        state: folder of the loop, with the outcomes up to `as_of`; gets the report.
        as_of: ISO 8601 end of the window.
        window_hours: its length.
        batch_hours: how often features are materialized; those that served are compared with the tables that the loop's
            store still holds. 0: they are streamed, and not compared.
        live: the server's clock is the log's, so that what it wrote before the window need not be read.
        report: MonitoringReport.
        page: Evidently's page on the window, for people.
        metrics: the findings in numbers.
    """
    import shutil
    from collections import namedtuple
    from datetime import datetime, timedelta
    from pathlib import Path

    from evergreen.contracts.errors import ArtifactError
    from evergreen.contracts.feature_tables import FeatureTables
    from evergreen.contracts.loop_state import LoopState
    from evergreen.contracts.snapshot import Snapshot
    from evergreen.fraud.labels import SuspiciousEvents
    from evergreen.fraud.share import suspicious_share
    from evergreen.models.package import ModelPackage
    from evergreen.monitoring.watch import watch
    from evergreen.step import pipeline_step

    with pipeline_step("monitor_window") as usage:
        loop, end, window = LoopState(Path(state)), datetime.fromisoformat(as_of), timedelta(hours=window_hours)
        releases = loop.released(before=end)
        if not releases:
            raise ArtifactError(f"{loop.releases}: nothing served before {end}: begin with `evergreen monitor begin`")
        # As they were materialized for this window: computed anew, they leave out what only now looks suspicious.
        tables = FeatureTables.load(loop.feature_store / "data") if batch_hours else None
        found = watch(
            loop,
            impressions,
            ModelPackage.load(loop.package(releases[-1].version)),
            as_of=end,
            window=window,
            suspicious_share=suspicious_share(
                Snapshot.load(Path(snapshot.path)),
                SuspiciousEvents.load(Path(suspicious.path)),
                start=end - window,
                end=end,
            ),
            tables=tables,
            materialized_at=tables.manifest.as_of if tables is not None else None,
            served_since=end - window - timedelta(hours=1) if live else None,
        )
        shutil.copyfile(loop.report(end), report.path)
        shutil.copyfile(loop.page(end), page.path)
    metrics.log_metric("requests", found.requests)
    if found.feature_drift.score is not None:
        metrics.log_metric("feature_drift_score", found.feature_drift.score)
    measured = found.quality.model(found.model_version) if found.quality else None
    if measured is not None and measured.figures.normalized_entropy.value is not None:
        metrics.log_metric("normalized_entropy", measured.figures.normalized_entropy.value)
        metrics.log_metric("click_rate", measured.figures.click_rate.value)
    return namedtuple("Outputs", ["usage"])(usage)
