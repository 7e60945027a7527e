"""The compiled pipelines are reviewed files: a change of a graph shows up as a diff of tests/contract/golden/."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from evergreen.cli import cli

GOLDEN = Path(__file__).parent / "golden"
OUTPUTS = {
    "training": {"champion", "feature_store", "report", "drift_report", "filter_report", "summary"},
    "monitoring": {"report", "page", "decision"},
}


def _masked(text: str) -> str:
    return re.sub(r"(image: ).*", r"\1MASKED", text)


def _spec(text: str) -> dict[str, Any]:
    return next(yaml.safe_load_all(text))


def _tasks(spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every task of every graph, with its name there."""
    graphs = [spec["root"], *spec["components"].values()]
    return [task for graph in graphs for task in graph.get("dag", {"tasks": {}})["tasks"].items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled")
    result = CliRunner().invoke(cli, ["compile", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module", params=OUTPUTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiled(folder: Path, name: str) -> str:
    return (folder / f"{name}.yaml").read_text()


@pytest.fixture(scope="module")
def monitoring(folder: Path) -> dict[str, Any]:
    return _spec((folder / "monitoring.yaml").read_text())


def test_compiled_spec_is_the_reviewed_one(compiled: str, name: str) -> None:
    assert _masked(compiled) == _masked((GOLDEN / f"{name}.yaml").read_text()), (
        "the pipeline changed: if you meant it, run `evergreen compile --out tests/contract/golden` and review the diff"
    )


def test_spec_parses_as_what_a_server_takes(compiled: str, name: str) -> None:
    spec = json_format.ParseDict(_spec(compiled), pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == f"evergreen-{name}"
    assert spec.schema_version == "2.1.0"
    assert spec.sdk_version == "kfp-2.17.0"
    assert OUTPUTS[name] <= set(spec.root.output_definitions.artifacts)


def test_models_train_in_a_parallel_for_of_two(compiled: str) -> None:
    tasks = _tasks(_spec(compiled))
    loops = [task for _, task in tasks if "parameterIterator" in task or "artifactIterator" in task]
    assert len(loops) == 1
    assert loops[0]["iteratorPolicy"]["parallelismLimit"] == 2


def test_artifacts_have_the_types_that_the_ui_draws(compiled: str, name: str) -> None:
    components = _spec(compiled)["components"]

    def types(component: str) -> dict[str, str]:
        artifacts = components[f"comp-{component}"]["outputDefinitions"]["artifacts"]
        return {name: artifact["artifactType"]["schemaTitle"] for name, artifact in artifacts.items()}

    if name == "monitoring":
        assert types("monitor-window")["page"] == "system.HTML"
    assert types("ingest-log") == {"snapshot": "system.Dataset"}
    assert types("train-model") == {"package": "system.Model", "metrics": "system.Metrics"}
    assert types("evaluate-models")["report"] == "system.HTML"
    assert types("evaluate-models")["roc"] == "system.ClassificationMetrics"


def test_steps_install_nothing_when_they_start(compiled: str) -> None:
    assert "pip install" not in compiled
    assert "pip3 install" not in compiled


def test_trainer_is_a_sub_pipeline_under_the_verdict(monitoring: dict[str, Any]) -> None:
    conditions = [task["triggerPolicy"]["condition"] for _, task in _tasks(monitoring) if "triggerPolicy" in task]
    verdict = "inputs.parameter_values['pipelinechannel--decide-retraining-Output']"
    assert {words for words in conditions if verdict in words} == {
        f"{verdict} == 'retrain'",
        f"{verdict} == 'rollback'",
    }
    under = {name: set(part["dag"]["tasks"]) for name, part in monitoring["components"].items() if "dag" in part}
    [retrain] = [name for name, tasks in under.items() if "start-run" in tasks]
    assert under[retrain] == {"start-run", "evergreen-retraining", "finish-run"}
    assert {"build-training-set", "evaluate-models", "gate-challenger"} <= under["comp-evergreen-retraining"]
    assert {"release-model"} in under.values() and {"roll-back-model"} in under.values()


def test_conditions_read_the_output_without_a_name(compiled: str) -> None:
    """Of a task's outputs kfp.local knows only this one in a condition; for any other it skips the branch."""
    for _, task in _tasks(_spec(compiled)):
        for read in re.findall(r"\['([^']*)'\]", task.get("triggerPolicy", {}).get("condition", "")):
            assert read.endswith("-Output")


def test_no_two_steps_share_a_name(compiled: str) -> None:
    """kfp.local puts what a step writes under its name, however deep in sub-pipelines the step is."""
    spec = _spec(compiled)
    steps = {name for name, component in spec["components"].items() if "executorLabel" in component}
    names = [name for name, task in _tasks(spec) if task["componentRef"]["name"] in steps]
    assert len(names) == len(set(names)) > 5
