"""Step: the moment that a recurring run is about."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def read_clock(as_of: str, window_hours: float) -> str:
    """The moment that was asked for, or else the end of the last whole window: the one place where a clock is read.

    Kubeflow Pipelines puts no scheduled time into the parameters of a recurring v2 run (kubeflow/pipelines#12494), so
    the run asks what time it is, once, and every other step is told. A run that starts late is about its own window as
    long as the next one has not ended.

    Args:
        as_of: ISO 8601 time, in whole seconds; empty: the clock.
        window_hours: time between two runs.

    Returns:
        ISO 8601 time.
    """
    from datetime import UTC, datetime, timedelta

    from evergreen.contracts.errors import InputError
    from evergreen.contracts.instant import from_text, last_end
    from evergreen.step import pipeline_step

    with pipeline_step("read_clock"):
        moment = from_text(as_of) if as_of else last_end(datetime.now(UTC), timedelta(hours=window_hours))
        if moment.microsecond:
            raise InputError(f"as_of={as_of!r}: has a fraction of a second; {moment.replace(microsecond=0)} has not")
    return moment.isoformat()
