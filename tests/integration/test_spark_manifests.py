"""The Spark component: its run is a command that exists, and kustomize can rename all that it names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.image import PIPELINE_IMAGE
from evergreen import cli

ROOT = Path(__file__).resolve().parents[2]
COMPONENT = ROOT / "manifests" / "components" / "spark"
# Of the operator's API v1beta2, what we use: it drops a field that it does not know, without a word.
POD = {"serviceAccount", "cores", "coreLimit", "memory", "env", "podSecurityContext", "securityContext", "volumeMounts"}
FIELDS = {
    "spec": {
        *("type", "pythonVersion", "sparkVersion", "mode", "image", "imagePullPolicy", "mainApplicationFile"),
        *("arguments", "sparkConf", "restartPolicy", "timeToLiveSeconds", "volumes", "driver", "executor"),
    },
    "driver": POD,
    "executor": POD | {"instances"},
    "restartPolicy": {
        *("type", "onFailureRetries", "onFailureRetryInterval"),
        *("onSubmissionFailureRetries", "onSubmissionFailureRetryInterval"),
    },
}


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    application = yaml.safe_load((COMPONENT / "spark-application.yaml").read_text())
    assert (application["apiVersion"], application["kind"]) == ("sparkoperator.k8s.io/v1beta2", "SparkApplication")
    found: dict[str, Any] = application["spec"]
    return found


def test_run_is_a_command_with_options_that_exist(spec: dict[str, Any]) -> None:
    name, *arguments = spec["arguments"]
    command = cli.cli.get_command(cli.click.Context(cli.cli), name)
    assert command is not None
    arguments = [a.replace("/data/snapshot", str(ROOT)) for a in arguments]  # a folder that is there
    options = command.make_context(name, arguments).params
    assert (options["engine"], options["out"]) == ("spark", Path("/data/feature_tables"))


def test_main_file_is_the_command_line_of_the_package(spec: dict[str, Any]) -> None:
    _, _, inside = spec["mainApplicationFile"].partition("/site-packages/")
    assert (ROOT / "src" / inside).samefile(Path(cli.__file__).parent / "__main__.py")


def test_image_and_spark_are_those_of_the_package(spec: dict[str, Any]) -> None:
    pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed: uv sync --extra spark")
    assert spec["image"] == PIPELINE_IMAGE
    assert spec["sparkVersion"] == pyspark.__version__


def test_fields_are_those_of_the_operator(spec: dict[str, Any]) -> None:
    for part, known in FIELDS.items():
        assert set(spec if part == "spec" else spec[part]) <= known, part


def test_paths_lie_in_a_volume_that_driver_and_executors_mount(spec: dict[str, Any]) -> None:
    names = {volume["name"] for volume in spec["volumes"]}
    for pod in (spec["driver"], spec["executor"]):
        (mount,) = pod["volumeMounts"]
        assert mount["name"] in names
        paths = [a.partition("=")[2] for a in spec["arguments"] if "=/" in a]
        assert len(paths) == 2
        assert all(path.startswith(mount["mountPath"] + "/") for path in paths)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl, whose kustomize builds manifests")
def test_overlay_renames_accounts_claims_and_images(tmp_path: Path) -> None:
    shutil.copytree(COMPONENT, tmp_path / "spark")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "kustomization.yaml").write_text("resources: [claim.yaml]\n")
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "evergreen-data"}}
    (tmp_path / "base" / "claim.yaml").write_text(yaml.safe_dump(claim))
    image, _, _ = PIPELINE_IMAGE.partition(":")
    overlay = {
        "resources": ["base"],
        "components": ["spark"],
        "namePrefix": "team-",
        "namespace": "prod",
        "images": [{"name": image, "newName": "built", "newTag": "abc123"}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    run = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    objects = {entry["kind"]: entry for entry in yaml.safe_load_all(run.stdout)}
    built = objects["SparkApplication"]["spec"]
    assert built["image"] == "built:abc123"
    for pod in (built["driver"], built["executor"]):
        assert pod["serviceAccount"] == objects["ServiceAccount"]["metadata"]["name"] == "team-evergreen-spark"
    assert built["volumes"][0]["persistentVolumeClaim"]["claimName"] == "team-evergreen-data"
    assert objects["RoleBinding"]["subjects"][0] == {
        "kind": "ServiceAccount",
        "name": "team-evergreen-spark",
        "namespace": "prod",
    }
    assert {entry["metadata"]["namespace"] for entry in objects.values()} == {"prod"}
