"""What the overlays choose, and how the manifests are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from evergreen.cli import cli
from evergreen.serving import settings
from evergreen.training.train_job import TrainJobConfig
from pipelines import recurring
from pipelines.kubernetes import DATA, DATA_CLAIM
from tests.manifests.kustomize import COMPONENTS, MANIFESTS, OVERLAYS, VARIANTS, Object, build, find, pods

KUSTOMIZATIONS = sorted(MANIFESTS.rglob("kustomization.yaml"))
IMAGES = yaml.safe_load((MANIFESTS / "images" / "kustomization.yaml").read_text())["images"]


def _runtime(variant: str) -> Object:
    found: Object = find(build(variant), "ServingRuntime", "evergreen")["spec"]["containers"][0]
    return found


def _predictor(variant: str) -> Object:
    found: Object = find(build(variant), "InferenceService", "evergreen")["spec"]["predictor"]
    return found


def _parameters(container: Object) -> dict[str, Any]:
    """What the command line makes of a container's arguments; an error if it does not know one."""
    name, *arguments = container["args"]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    for parameter in command.params:  # that a path exists is the container's business
        if isinstance(parameter.type, click.Path):
            parameter.type = click.Path(path_type=Path)
    return command.make_context(name, arguments).params


def test_every_overlay_and_component_is_built_somewhere_here() -> None:
    assert {p.name for p in (MANIFESTS / "overlays").iterdir()} == set(OVERLAYS)
    assert {p.name for p in (MANIFESTS / "components").iterdir()} == set(COMPONENTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_it_builds_has_a_namespace_and_no_two_objects_of_one_name(variant: str) -> None:
    objects = build(variant)
    places = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(set(places)) == len(places)
    without = {kind for kind, namespace, _ in places if namespace is None}
    assert without <= {"Namespace", "ClusterStorageContainer"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_image_of_ours_has_the_name_that_make_images_wrote(overlay: str) -> None:
    names = {f"{image['newName']}:{image['newTag']}" for image in IMAGES}
    ours = [
        c["image"] for pod in pods(build(f"overlays/{overlay}")) for c in pod.containers if "evergreen" in c["image"]
    ]
    assert ours
    assert set(ours) <= names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_recurring_runs_know_the_image_that_their_steps_run_in(overlay: str) -> None:
    job = find(build(f"overlays/{overlay}"), "CronJob", "evergreen-recurring-runs")
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (variable,) = (entry for entry in container["env"] if entry["name"] == "PIPELINE_IMAGE")
    assert variable["value"] == container["image"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_recurring_runs_are_given_parameters_that_the_pipelines_have(overlay: str) -> None:
    objects = build(f"overlays/{overlay}")
    (pod,) = (pod for pod in pods(objects) if pod.origin == "CronJob evergreen-recurring-runs")
    (container,) = pod.spec["containers"]
    assert container["command"] == ["python", "-m", recurring.__name__]
    options = recurring.main.make_context("recurring", list(container["args"])).params
    given = dict(text.split("=", 1) for text in options["parameters"])
    assert {"log_uri", "impressions", "clicks", "model_store"} <= set(given)
    for pipeline in recurring.with_parameters([recurring.MONITORING, recurring.TRAINING], given):
        assert pipeline.parameters["log_uri"] == "$(LOG_URI)"
    data = [
        find(objects, "ConfigMap", name, "kubeflow")["data"]
        for name in ("evergreen-recurring-runs", "evergreen-stores")
    ]
    places = {value.split("/")[2] for entry in data for value in entry.values() if value.startswith("s3://")}
    assert len(places) == 1  # one bucket: no overlay has forgotten a place of another


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_applying_it_cannot_take_a_release_back(overlay: str) -> None:
    model = _predictor(f"overlays/{overlay}")["model"]
    assert not {"storageUri", "runtime", "storage"} & set(model)
    (model_format,) = find(build(f"overlays/{overlay}"), "ServingRuntime", "evergreen")["spec"]["supportedModelFormats"]
    assert model_format["autoSelect"] is False  # else KServe starts a server that has no model
    assert {key: model_format[key] for key in ("name", "version")} == model["modelFormat"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_commands_know_their_arguments(variant: str) -> None:
    for pod in pods(build(variant)):
        for container in pod.spec["containers"]:
            if "evergreen-server" in container["image"]:
                _parameters(container)


def test_predictor_follows_the_server_s_rules() -> None:
    options = _parameters(_runtime("overlays/production"))
    assert not options["allow_reload"]
    assert options["name"] == "evergreen"
    predictor = _predictor("overlays/production")
    stopping = options["drain_seconds"] + options["grace_seconds"] + 10  # docs/serving.md
    assert predictor["terminationGracePeriodSeconds"] > stopping
    probes = _runtime("overlays/production")
    assert probes["readinessProbe"]["httpGet"]["path"] == f"/v2/models/{options['name']}/ready"
    assert probes["startupProbe"]["periodSeconds"] * probes["startupProbe"]["failureThreshold"] >= 60


def test_model_and_store_lie_where_a_bundle_has_them() -> None:
    options = _parameters(_runtime("overlays/kind"))
    assert options["model"] == Path("/mnt/models/model")
    assert options["feature_store"] is None  # beside the model
    assert {"model", "feature_store"} <= set(settings.ServeSettings.__annotations__)


def test_gpu_differs_from_kind_in_what_a_gpu_needs() -> None:
    kind, gpu = build("overlays/kind"), build("overlays/gpu")
    differ = {f"{a['kind']} {a['metadata']['name']}" for a, b in zip(kind, gpu, strict=True) if a != b}
    assert differ == {"ServingRuntime evergreen", "InferenceService evergreen", "ConfigMap evergreen-recurring-runs"}
    assert find(gpu, "ConfigMap", "evergreen-recurring-runs")["data"]["TRAIN_ON_GPU"] == "true"
    assert _parameters(_runtime("overlays/gpu"))["device"] == "cuda"
    assert "evergreen-server-cuda" in _runtime("overlays/gpu")["image"]
    predictor = _predictor("overlays/gpu")
    for part in ("requests", "limits"):
        assert predictor["model"]["resources"][part]["nvidia.com/gpu"] == "1"
    assert predictor["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert predictor["nodeSelector"]


def test_production_has_its_stores_outside_by_tls() -> None:
    objects = build("overlays/production")
    assert "StatefulSet" not in {o["kind"] for o in objects}
    for namespace in ("evergreen", "kubeflow"):
        data = find(objects, "ConfigMap", "evergreen-stores", namespace)["data"]
        assert data["AWS_ENDPOINT_URL"].startswith("https://")
        assert "ssl=true" in data["REDIS_ADDRESS"].split(",")


def test_production_scales_on_several_nodes() -> None:
    predictor = _predictor("overlays/production")
    assert 2 <= predictor["minReplicas"] < predictor["maxReplicas"]
    annotations = find(build("overlays/production"), "InferenceService", "evergreen")["metadata"]["annotations"]
    assert annotations["serving.kserve.io/autoscalerClass"] == "hpa"
    assert predictor["topologySpreadConstraints"]
    claim = find(build("overlays/production"), "PersistentVolumeClaim", "evergreen-state")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_servers_and_steps_have_the_same_stores() -> None:
    for overlay in OVERLAYS:
        objects = build(f"overlays/{overlay}")
        ours, theirs = (find(objects, "ConfigMap", "evergreen-stores", n)["data"] for n in ("evergreen", "kubeflow"))
        assert ours == theirs


def test_stream_fetches_a_feature_store_to_where_it_opens_it(tmp_path: Path) -> None:
    (pod,) = (pod for pod in pods(build("components/stream")) if pod.origin == "Deployment evergreen-stream")
    fetch, stream = pod.containers
    target = str(_parameters(stream)["store"])
    (tmp_path / "published" / "data").mkdir(parents=True)
    (tmp_path / "published" / "feature_store.yaml").write_text("project: evergreen\n")
    (tmp_path / "published" / "data" / "registry.db").write_bytes(b"registry")
    assert fetch["command"] == ["python", "-c"]
    (program,) = fetch["args"]
    assert target in program
    program = program.replace(target, str(tmp_path / "store"))
    environment = {"FEATURE_STORE_URL": str(tmp_path / "published"), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    assert (tmp_path / "store" / "feature_store.yaml").is_file()
    assert (tmp_path / "store" / "data" / "registry.db").read_bytes() == b"registry"


def test_training_on_many_nodes_runs_the_command_of_one() -> None:
    objects = build("components/distributed-training")
    (pod,) = (pod for pod in pods(objects) if pod.origin.startswith("TrainingRuntime"))
    (container,) = pod.spec["containers"]
    # As the command's own help says; the TrainJob that a step makes brings the arguments.
    assert container["command"] == ["torchrun", "--no-python", "evergreen", "train"]
    assert "args" not in container
    assert DATA in [mount["mountPath"] for mount in container["volumeMounts"]]
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod.spec["volumes"] if "emptyDir" not in volume
    ]
    assert claims == [DATA_CLAIM]
    assert find(objects, "TrainingRuntime", TrainJobConfig(num_nodes=2).runtime)["metadata"]["namespace"] == "kubeflow"


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.relative_to(MANIFESTS)))
def test_kustomizations_use_no_field_that_kustomize_gave_up_and_select_by_no_common_label(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    gone = {"bases", "commonLabels", "vars", "patchesStrategicMerge", "patchesJson6902", "helmCharts"}
    assert not gone & set(content)
    assert not any(entry.get("includeSelectors") for entry in content.get("labels", []))
    component = "components" in path.relative_to(MANIFESTS).parts[0] or path.parent.name == "images"
    assert content["kind"] == ("Component" if component else "Kustomization")
    files = {entry for entry in content.get("resources", []) if entry.endswith(".yaml")}
    files |= {entry["path"] for entry in content.get("patches", [])} | set(content.get("configurations", []))
    beside = {p.name for p in path.parent.iterdir() if p.is_file()} - {"kustomization.yaml"}
    generated = {name for entry in content.get("configMapGenerator", []) for name in entry["files"]}
    assert files | generated == beside  # nothing lies about unused


@pytest.mark.parametrize("path", sorted(MANIFESTS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(MANIFESTS)))
def test_a_file_is_one_object_and_is_named_by_its_kind(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert len(documents) == 1
    (found,) = documents
    if "kind" not in path.parts and path.name not in (
        "kustomization.yaml",
        "references.yaml",
        "stores.yaml",
        "log.yaml",
        "recurring-runs.yaml",
    ):
        kebab = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", found["kind"]).lower()
        assert path.stem.startswith(kebab)
