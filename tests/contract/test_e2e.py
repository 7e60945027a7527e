"""What the end-to-end test gives the pipelines, they take: it runs where nobody looks every day."""

from evergreen.contracts.decision import DecisionConfig
from evergreen.models.registry import MODEL_NAMES
from pipelines.monitoring import monitoring_pipeline
from pipelines.training import training_pipeline
from tests.e2e.test_cluster import FIRST, MODELS, WINDOW

PLACES = {"log_uri", "as_of"}


def test_its_parameters_are_the_pipelines() -> None:
    assert PLACES | {"models"} | set(FIRST) <= set(training_pipeline.component_spec.inputs)
    assert PLACES | {"clicks", "impressions"} | set(WINDOW) <= set(monitoring_pipeline.component_spec.inputs)


def test_its_models_and_thresholds_exist() -> None:
    assert {*MODELS, *WINDOW["models"]} <= set(MODEL_NAMES)
    assert DecisionConfig.model_validate(WINDOW["decision_config"]).quality_windows == 1
