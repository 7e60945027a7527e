"""Step: the challenger against the model that serves, on the newest matured rows."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def gate_challenger(
    training_set: dsl.Input[dsl.Dataset],
    challenger: dsl.Input[dsl.Model],
    incumbent: dsl.Input[dsl.Model],
    impressions: str,
    state: str,
    as_of: str,
    latency_budget_ms: float,
    seed: int,
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> bool:
    """Whether the challenger may go out as a canary: the one output without a name.

    Args:
        training_set: of the challenger; its test split holds the newest rows whose labels are final.
        challenger: the package that was trained.
        incumbent: the package that serves.
        impressions: folder or fsspec URL of the impression log: features as they were served.
        state: folder of the loop; gets the report.
        as_of: ISO 8601 time of the run.
        latency_budget_ms: p99 milliseconds that scoring 500 candidates may take.
        seed: of the bootstrap.
        report: GateReport.
        metrics: the difference in numbers.
    """
    import logging
    import shutil
    from datetime import datetime
    from pathlib import Path

    from evergreen.contracts.gate import GateReport
    from evergreen.contracts.impressions import read_impressions
    from evergreen.contracts.loop_state import LoopState, put
    from evergreen.contracts.training_set import TrainingSet
    from evergreen.evaluation.gate import GateConfig, gate_challenger
    from evergreen.models.package import ModelPackage
    from evergreen.step import pipeline_step

    with pipeline_step("gate_challenger"):
        package = ModelPackage.load(Path(challenger.path))
        file = LoopState(Path(state)).gate(datetime.fromisoformat(as_of))
        # Latency is another one each time; what was said of this challenger stays.
        judged = GateReport.read(file) if file.is_file() else None
        if judged is None or judged.challenger != package.version:
            judged = gate_challenger(
                TrainingSet.load(Path(training_set.path)),
                package,
                ModelPackage.load(Path(incumbent.path)),
                served=read_impressions(impressions),
                config=GateConfig(latency_budget_ms=latency_budget_ms, seed=seed),
            )
            put(file, judged)
        shutil.copyfile(file, report.path)
        logging.getLogger("evergreen").info("%s: %s", "passed" if judged.passed else "refused", judged.reason)
    report.metadata["reason"] = judged.reason
    if judged.difference is not None and judged.difference.value is not None:
        metrics.log_metric(f"{judged.metric}_difference", judged.difference.value)
    return judged.passed
