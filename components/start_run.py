"""Step: a training run of the loop begins: what it may learn from, and against which model."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def start_run(
    decision: dsl.Input[dsl.Artifact],
    state: str,
    as_of: str,
    training_days: int,
    models: list,
    incumbent: dsl.Output[dsl.Model],
) -> NamedTuple("Outputs", [("start", str), ("leave_out", list), ("changed_at", str), ("models", list)]):
    """Put down that a run begins, so that no other does, and hand on what it is about.

    Args:
        decision: that called for it; the windows in which the data was broken are left out.
        state: folder of the loop.
        as_of: ISO 8601 time; names the run.
        training_days: how many days before it are learned from.
        models: names of the model registry to train; empty: the one that serves.
        incumbent: the package that serves.
    """
    import shutil
    from collections import namedtuple
    from datetime import datetime, timedelta
    from pathlib import Path

    from evergreen.contracts.decision import RetrainDecision
    from evergreen.contracts.loop_state import LoopState, name_of
    from evergreen.models.package import ModelPackage
    from evergreen.monitoring.decision import changed_at
    from evergreen.step import pipeline_step

    with pipeline_step("start_run"):
        loop, moment = LoopState(Path(state)), datetime.fromisoformat(as_of)
        # What served in the window: in a run that is repeated after its release, something else serves by now.
        serving = ModelPackage.load(loop.package(loop.released(before=moment)[-1].version))
        shutil.copytree(serving.path, incumbent.path, dirs_exist_ok=True)
        made = RetrainDecision.read(Path(decision.path))
        changed = changed_at(made)
        loop.start_run(name_of(moment), moment)
    incumbent.metadata["version"] = serving.version
    outputs = namedtuple("Outputs", ["start", "leave_out", "changed_at", "models"])
    return outputs(
        (moment - timedelta(days=training_days)).isoformat(),
        [[window.start.isoformat(), window.end.isoformat()] for window in made.broken_windows],
        changed.isoformat() if changed is not None else "",
        models or [serving.info.name],
    )
