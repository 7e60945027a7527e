"""The compiled pipeline is a reviewed file: a change of the graph shows up as a diff of tests/contract/golden/."""

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from evergreen.cli import cli

GOLDEN = Path(__file__).parent / "golden" / "training.yaml"


def _masked(text: str) -> str:
    return re.sub(r"(image: ).*", r"\1MASKED", text)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("compiled")
    result = CliRunner().invoke(cli, ["compile", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return (out / "training.yaml").read_text()


def test_compiled_spec_is_the_reviewed_one(compiled: str) -> None:
    assert _masked(compiled) == _masked(GOLDEN.read_text()), (
        "the pipeline changed: if you meant it, run `evergreen compile --out tests/contract/golden` and review the diff"
    )


def test_spec_parses_as_what_a_server_takes(compiled: str) -> None:
    spec = json_format.ParseDict(next(yaml.safe_load_all(compiled)), pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == "evergreen-training"
    assert spec.schema_version == "2.1.0"
    assert spec.sdk_version == "kfp-2.17.0"
    assert {"champion", "feature_store", "report", "drift_report", "filter_report", "summary"} <= set(
        spec.root.output_definitions.artifacts
    )


def test_models_train_in_a_parallel_for_of_two(compiled: str) -> None:
    tasks = next(yaml.safe_load_all(compiled))["root"]["dag"]["tasks"]
    loops = [task for task in tasks.values() if "parameterIterator" in task or "artifactIterator" in task]
    assert len(loops) == 1
    assert loops[0]["iteratorPolicy"]["parallelismLimit"] == 2


def test_artifacts_have_the_types_that_the_ui_draws(compiled: str) -> None:
    components = next(yaml.safe_load_all(compiled))["components"]

    def types(component: str) -> dict[str, str]:
        artifacts = components[f"comp-{component}"]["outputDefinitions"]["artifacts"]
        return {name: artifact["artifactType"]["schemaTitle"] for name, artifact in artifacts.items()}

    assert types("ingest-log") == {"snapshot": "system.Dataset"}
    assert types("train-model") == {"package": "system.Model", "metrics": "system.Metrics"}
    assert types("evaluate-models")["report"] == "system.HTML"
    assert types("evaluate-models")["roc"] == "system.ClassificationMetrics"


def test_steps_install_nothing_when_they_start(compiled: str) -> None:
    assert "pip install" not in compiled
    assert "pip3 install" not in compiled
