"""Step: a training run of the loop has ended, whatever came of it."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def finish_run(state: str, as_of: str) -> None:
    """Put down that the run has ended. One that was killed has no end, and counts as dead after a while.

    Args:
        state: folder of the loop.
        as_of: ISO 8601 time that names the run.
    """
    from datetime import datetime
    from pathlib import Path

    from evergreen.contracts.loop_state import LoopState, name_of
    from evergreen.step import pipeline_step

    with pipeline_step("finish_run"):
        moment = datetime.fromisoformat(as_of)
        LoopState(Path(state)).finish_run(name_of(moment), moment)
