"""Step: what follows from a report."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def decide_retraining(
    report: dsl.Input[dsl.Artifact],
    state: str,
    as_of: str,
    training_days: int,
    config: dict,
    decision: dsl.Output[dsl.Artifact],
) -> str:
    """Keep, retrain, alarm or roll back: a pure function of the report, the history and the moment.

    The one output without a name is the verdict: kfp.local reads no named one in a condition.

    Args:
        report: of the window.
        state: folder of the loop; its history is read, and the decision is added.
        as_of: ISO 8601 time of the decision.
        training_days: how many days before `as_of` a training would learn from.
        config: thresholds of `DecisionConfig` that are not its defaults.
        decision: RetrainDecision.
    """
    import logging
    import shutil
    from datetime import datetime, timedelta
    from pathlib import Path

    from evergreen.contracts.decision import DecisionConfig
    from evergreen.contracts.loop_state import LoopState, put
    from evergreen.contracts.monitoring_report import MonitoringReport
    from evergreen.monitoring.decision import decide
    from evergreen.monitoring.watch import loop_history
    from evergreen.step import pipeline_step

    with pipeline_step("decide_retraining"):
        loop, moment = LoopState(Path(state)), datetime.fromisoformat(as_of)
        made = decide(
            MonitoringReport.read(Path(report.path)),
            loop_history(loop),
            as_of=moment,
            config=DecisionConfig.model_validate({"training_window": timedelta(days=training_days), **config}),
        )
        put(loop.decision(moment), made)
        shutil.copyfile(loop.decision(moment), decision.path)
        logging.getLogger("evergreen").info("%s: %s", made.verdict.value, made.reason)
    decision.metadata["verdict"] = made.verdict.value
    decision.metadata["reason"] = made.reason
    return made.verdict.value
