"""Step: what was shown is joined with the clicks that came since."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def join_outcomes(
    mapping: str,
    impressions: str,
    clicks: str,
    state: str,
    as_of: str,
    late_days: int,
    live: bool,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", [("usage", dict)]):
    """Bring the outcomes of the loop up to `as_of`; labels are mature when the mapping's attribution window is over.

    Args:
        mapping: of the log that the models are trained on; its features are kept as served.
        impressions: folder or fsspec URL of the impression log.
        clicks: file, folder or fsspec URL of the clicks.
        state: folder of the loop.
        as_of: ISO 8601 time; later impressions and clicks are not looked at.
        late_days: dates older than this are final; a click that comes still later is counted, and left out.
        live: the server's clock is the log's, so that what it wrote before those days need not be read.
        metrics: what was joined, and what not.
    """
    from collections import namedtuple
    from datetime import datetime, timedelta
    from pathlib import Path

    from evergreen.contracts.loop_state import LoopState
    from evergreen.contracts.mapping import Mapping
    from evergreen.contracts.outcomes import Outcomes
    from evergreen.monitoring.outcomes import join_outcomes
    from evergreen.step import pipeline_step

    with pipeline_step("join_outcomes") as usage:
        log = Mapping.load(mapping)
        window, moment = log.split.attribution_window, datetime.fromisoformat(as_of)
        outcomes = LoopState(Path(state)).outcomes
        known = Outcomes.load(outcomes).as_of if (outcomes / Outcomes.MANIFEST).exists() else None
        start = min(moment - timedelta(days=late_days), known or moment)
        outcomes.parent.mkdir(parents=True, exist_ok=True)
        manifest = join_outcomes(
            impressions,
            clicks,
            outcomes,
            window=window,
            as_of=moment,
            start=start,
            # Whole dates are joined: what is not read of one of them would be lost.
            served_since=start - 2 * window - timedelta(days=1) if live else None,
            mapping=log,
        )
    join = manifest.joins[-1]
    metrics.log_metric("impressions", join.impressions)
    metrics.log_metric("clicks_attributed", join.attributed)
    metrics.log_metric("clicks_quarantined", sum(join.quarantined.values()))
    metrics.log_metric("files_written", join.written)
    return namedtuple("Outputs", ["usage"])(usage)
