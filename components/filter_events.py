"""Step: label the events that no person made, and hand on the log without them."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def filter_events(
    snapshot: dsl.Input[dsl.Dataset],
    false_positive_share: float,
    suspicious: dsl.Output[dsl.Dataset],
    filtered: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Judge every event by rules and by a detector over users' windows; nothing is deleted from the snapshot itself.

    Args:
        snapshot: the log.
        false_positive_share: share of people's windows that the detector may label wrongly; 0: rules alone.
        suspicious: the labels with their reasons.
        filtered: the snapshot without the labelled events, which features and training read.
        report: the page for people.
        metrics: how many events and users are suspicious.
    """
    import shutil
    from collections import namedtuple
    from pathlib import Path

    from evergreen.contracts.snapshot import Snapshot
    from evergreen.fraud.filter import FilterConfig, filter_events, without_suspicious
    from evergreen.step import pipeline_step

    with pipeline_step("filter_events") as usage:
        log = Snapshot.load(Path(snapshot.path))
        config = FilterConfig(false_positive_share=false_positive_share)
        labels = filter_events(log, Path(suspicious.path), config=config)
        without_suspicious(log, labels, Path(filtered.path))
        Path(report.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(labels.path / labels.REPORT, report.path)
    metrics.log_metric("suspicious_events", labels.manifest.suspicious_events)
    metrics.log_metric("suspicious_users", labels.manifest.suspicious_users)
    metrics.log_metric("suspicious_event_share", labels.manifest.suspicious_events / labels.manifest.events)
    return namedtuple("Outputs", ["usage"])(usage)
