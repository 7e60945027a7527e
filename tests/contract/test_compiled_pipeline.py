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
from evergreen.contracts.errors import EvergreenError

GOLDEN = Path(__file__).parent / "golden"
OUTPUTS = {
    "training": {"champion", "feature_store", "report", "drift_report", "filter_report", "summary"},
    "monitoring": {"report", "page", "decision"},
    "rollback": set(),
}
IMAGE = "registry.example/evergreen-pipeline-python:c0ffee"


def _masked(text: str) -> str:
    return re.sub(r"(image: ).*", r"\1MASKED", text)


def _spec(text: str) -> dict[str, Any]:
    return next(yaml.safe_load_all(text))


def _pods(text: str) -> dict[str, dict[str, Any]]:
    """What kfp-kubernetes says of each step, by the name of the step."""
    platform = list(yaml.safe_load_all(text))[1]
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): pod for name, pod in executors.items()}


def _steps(text: str) -> dict[str, dict[str, Any]]:
    """Parameters that each step takes, by its name."""
    components = _spec(text)["components"]
    return {
        name.removeprefix("comp-"): part.get("inputDefinitions", {}).get("parameters", {})
        for name, part in components.items()
        if "executorLabel" in part
    }


def _tasks(spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every task of every graph, with its name there."""
    graphs = [spec["root"], *spec["components"].values()]
    return [task for graph in graphs for task in graph.get("dag", {"tasks": {}})["tasks"].items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled")
    result = CliRunner().invoke(cli, ["compile", "--out", str(out), "--image", IMAGE], catch_exceptions=False)
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


def test_models_train_in_a_parallel_for_of_two(compiled: str, name: str) -> None:
    if name == "rollback":
        pytest.skip("trains nothing")
    tasks = _tasks(_spec(compiled))
    loops = [task for _, task in tasks if "parameterIterator" in task or "artifactIterator" in task]
    assert len(loops) == 1
    assert loops[0]["iteratorPolicy"]["parallelismLimit"] == 2


def test_artifacts_have_the_types_that_the_ui_draws(compiled: str, name: str) -> None:
    components = _spec(compiled)["components"]

    if name == "rollback":
        pytest.skip("has no artifacts")

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
    spec = _spec(compiled)
    parameters = {f"pipelinechannel--{name}" for name in spec["root"]["inputDefinitions"]["parameters"]}
    for _, task in _tasks(spec):
        for read in re.findall(r"\['([^']*)'\]", task.get("triggerPolicy", {}).get("condition", "")):
            assert read.endswith("-Output") or read in parameters


def test_no_two_steps_share_a_name(compiled: str) -> None:
    """kfp.local puts what a step writes under its name, however deep in sub-pipelines the step is."""
    spec = _spec(compiled)
    steps = {name for name, component in spec["components"].items() if "executorLabel" in component}
    names = [name for name, task in _tasks(spec) if task["componentRef"]["name"] in steps]
    assert len(names) == len(set(names)) > 1


def test_person_types_the_log_alone(compiled: str, name: str) -> None:
    parameters = _spec(compiled)["root"]["inputDefinitions"]["parameters"]
    required = {parameter for parameter, of in parameters.items() if not of.get("isOptional")}
    assert required == ({"reason"} if name == "rollback" else {"log_uri"})


def test_no_secret_is_a_parameter(compiled: str) -> None:
    """What a run was given stays in the server's database, for everybody who may look at runs."""
    names = set(_spec(compiled)["root"]["inputDefinitions"]["parameters"]).union(*_steps(compiled).values())
    assert {name for name in names if re.search("token|password|secret|key", name)} <= {"server_token_file"}


def test_every_step_runs_in_the_image_that_was_named(compiled: str) -> None:
    executors = _spec(compiled)["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {IMAGE}


def test_every_step_has_limits_retries_a_timeout_and_the_label_of_network_policies(compiled: str) -> None:
    spec, pods, steps = _spec(compiled), _pods(compiled), _steps(compiled)
    for executor in spec["deploymentSpec"]["executors"].values():
        resources = executor["container"]["resources"]
        assert {f"resource{what}{how}" for what in ("Cpu", "Memory") for how in ("Request", "Limit")} <= set(resources)
    tasks = {name: task for name, task in _tasks(spec) if task["componentRef"]["name"].removeprefix("comp-") in steps}
    assert all(task["retryPolicy"]["maxRetryCount"] == 2 for task in tasks.values())
    assert all(task["retryPolicy"]["backoffFactor"] == 2.0 for task in tasks.values())
    assert pods.keys() == steps.keys()
    for pod in pods.values():
        assert 0 < int(pod["activeDeadlineSeconds"]) <= 12 * 3600
        assert pod["podMetadata"]["labels"] == {"app.kubernetes.io/name": "evergreen-step"}
        assert pod["imagePullPolicy"] == "IfNotPresent"
        assert [(mount["mountPath"], bool(mount["sizeLimit"])) for mount in pod["emptyDirMounts"]] == [("/tmp", True)]


def test_exactly_the_steps_with_a_state_have_its_volume(compiled: str) -> None:
    steps = _steps(compiled)
    for name, pod in _pods(compiled).items():
        mounts = [(mount["constant"], mount["mountPath"]) for mount in pod.get("pvcMount", [])]
        assert mounts == ([("evergreen-state", "/state")] if "state" in steps[name] else []), name


def test_secrets_reach_the_steps_that_use_them_by_reference_alone(compiled: str) -> None:
    steps = _steps(compiled)
    for name, pod in _pods(compiled).items():
        secrets = {secret["secretName"] for secret in pod.get("secretAsEnv", [])}
        expected = {"evergreen-s3"} if {"log_uri", "impressions", "clicks", "model_store"} & set(steps[name]) else set()
        expected |= {"evergreen-redis"} if "store_config" in steps[name] else set()
        assert secrets == expected, name
        volumes = {(secret["secretName"], secret["mountPath"]) for secret in pod.get("secretAsVolume", [])}
        tokens = {("evergreen-tokens", "/etc/evergreen/tokens")} if "server_token_file" in steps[name] else set()
        assert volumes == tokens, name


def test_only_steps_that_read_nothing_but_artifacts_are_cached(compiled: str) -> None:
    """KFP's key holds parameters and artifacts, not what a URL, a folder or a clock says today."""
    outside = {"log_uri", "impressions", "clicks", "state", "model_store", "server_url"}
    steps = _steps(compiled)
    for _, task in _tasks(_spec(compiled)):
        name = task["componentRef"]["name"].removeprefix("comp-")
        if task.get("cachingOptions", {}).get("enableCache") and name in steps:
            assert not outside & set(steps[name]), name
    if "train-model" in steps:
        [train] = [task for name, task in _tasks(_spec(compiled)) if name == "train-model"]
        assert train["cachingOptions"] == {"enableCache": True}


def test_gpu_is_asked_for_by_training_alone_and_only_where_it_was_chosen(folder: Path, tmp_path: Path) -> None:
    assert "nvidia.com/gpu" not in (folder / "training.yaml").read_text()
    arguments = ["compile", "--out", str(tmp_path), "--image", IMAGE, "--gpu"]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    for name in ("training", "monitoring"):
        text = (tmp_path / f"{name}.yaml").read_text()
        executors = _spec(text)["deploymentSpec"]["executors"]
        asked = {
            label: executor["container"]["resources"]["accelerator"]
            for label, executor in executors.items()
            if "accelerator" in executor["container"]["resources"]
        }
        assert asked == {"exec-train-model": {"resourceCount": "1", "resourceType": "nvidia.com/gpu"}}
        pods = _pods(text)
        assert pods["train-model"]["nodeSelector"] == {"labels": {"nvidia.com/gpu.present": "true"}}
        [toleration] = pods["train-model"]["tolerations"]
        assert (toleration["key"], toleration["operator"], toleration["effect"]) == (
            "nvidia.com/gpu",
            "Exists",
            "NoSchedule",
        )
        assert not any("tolerations" in pod for step, pod in pods.items() if step != "train-model")


def test_training_on_nodes_of_its_own_is_told_to_the_training_step_alone_which_then_needs_no_gpu(
    folder: Path, tmp_path: Path
) -> None:
    assert "evergreen-data" not in (folder / "training.yaml").read_text()
    arguments = ["compile", "--out", str(tmp_path), "--image", IMAGE, "--gpu", "--trainer-nodes", "3"]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    for name in ("training", "monitoring"):
        text = (tmp_path / f"{name}.yaml").read_text()
        containers = {
            label: executor["container"] for label, executor in _spec(text)["deploymentSpec"]["executors"].items()
        }
        told = {label: container["env"] for label, container in containers.items() if "env" in container}
        assert told == {"exec-train-model": [{"name": "EVERGREEN_TRAINER_NODES", "value": "3"}]}
        assert "nvidia.com/gpu" not in text
        claims = {step: [c["constant"] for c in pod.get("pvcMount", [])] for step, pod in _pods(text).items()}
        assert [step for step, names in claims.items() if "evergreen-data" in names] == ["train-model"]


def test_name_of_the_image_is_the_one_that_the_manifests_have(tmp_path: Path) -> None:
    images = tmp_path / "kustomization.yaml"
    given = {"name": "evergreen-pipeline-python", "newName": "kind-registry:5000/pipeline", "newTag": "abc"}
    for image, expected in (
        (given, "kind-registry:5000/pipeline:abc"),
        (given | {"digest": "sha256:1234"}, "kind-registry:5000/pipeline@sha256:1234"),
    ):
        images.write_text(yaml.safe_dump({"images": [{"name": "other", "newTag": "1"}, image]}))
        arguments = ["compile", "--out", str(tmp_path), "--images", str(images)]
        assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
        executors = _spec((tmp_path / "rollback.yaml").read_text())["deploymentSpec"]["executors"]
        assert {executor["container"]["image"] for executor in executors.values()} == {expected}


def test_images_that_are_not_named_anywhere_are_told_with_the_way_out(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing.yaml", tmp_path / "kustomization.yaml"
    empty.write_text(yaml.safe_dump({"images": []}))
    for file, words in ((missing, "give --image NAME"), (empty, "run `make images`")):
        result = CliRunner().invoke(cli, ["compile", "--out", str(tmp_path), "--images", str(file)])
        assert isinstance(result.exception, EvergreenError)
        assert str(file) in str(result.exception) and words in str(result.exception)


def test_first_model_and_later_ones_reach_the_users_under_a_condition(folder: Path) -> None:
    spec = _spec((folder / "training.yaml").read_text())
    [condition] = [task["triggerPolicy"]["condition"] for _, task in _tasks(spec) if "triggerPolicy" in task]
    assert condition == "inputs.parameter_values['pipelinechannel--inference_service'] != ''"
    [deploy] = [task for name, task in _tasks(spec) if name == "deploy-model"]
    assert deploy["taskInfo"] == {"name": "deploy-model"}


def test_images_that_were_never_built_are_told(tmp_path: Path) -> None:
    names = tmp_path / "kustomization.yaml"
    words = {}
    for tag in ("0.1.0", "0123456789ab"):
        image = {"name": "evergreen-pipeline-python", "newName": "evergreen-pipeline-python", "newTag": tag}
        names.write_text(yaml.safe_dump({"images": [image]}))
        done = CliRunner().invoke(cli, ["compile", "--out", str(tmp_path / tag), "--images", str(names)])
        assert done.exit_code == 0, done.output
        words[tag] = "make images" in done.stderr
    assert words == {"0.1.0": True, "0123456789ab": False}
