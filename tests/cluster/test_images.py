"""Both images in a namespace that is `restricted`: what they can do as any user without a place to write but /tmp."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from tests.e2e.cluster import explain_namespace, kubectl, wait_until, why_not_here

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "evergreen-images-test"
SERVER, PIPELINE = "evergreen-server", "evergreen-pipeline-python"
START_SECONDS, RUN_SECONDS = 120.0, 180.0

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or ""),
]


@pytest.fixture(scope="module", autouse=True)
def namespace() -> Iterator[None]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
    kubectl("apply", "-f", "-", stdin=json.dumps(made))
    yield
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def name_of(image: str) -> str:
    """What the image is really called; skips where it was never built."""
    written = yaml.safe_load((ROOT / "manifests" / "images" / "kustomization.yaml").read_text())["images"]
    (entry,) = [entry for entry in written if entry["name"] == image]
    if entry["newTag"] == "0.1.0":
        pytest.skip(f"{image} was never built: make images")
    return f"{entry['newName']}:{entry['newTag']}"


def run_in(image: str, command: list[str], *, user: int = 65532, environment: dict[str, str] | None = None) -> str:
    """The output of a command in a pod of this image; an error if it fails."""
    name = f"try-{uuid4().hex[:8]}"
    container = {
        "name": "main",
        "image": name_of(image),
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "env": [{"name": key, "value": value} for key, value in (environment or {}).items()],
        "resources": {"limits": {"cpu": "2", "memory": "3Gi"}, "requests": {"cpu": "100m", "memory": "256Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}
    kubectl("apply", "-f", "-", stdin=json.dumps(pod))

    def ended() -> str | None:
        phase = kubectl("-n", NAMESPACE, "get", "pod", name, "-o", "jsonpath={.status.phase}")
        return phase if phase in ("Succeeded", "Failed") else None

    try:
        phase = wait_until(
            f"pod {name}",
            ended,
            limit=START_SECONDS + RUN_SECONDS,
            explain=lambda: explain_namespace(NAMESPACE),
            every=1.0,
        )
        output = kubectl("-n", NAMESPACE, "logs", name)
    finally:
        kubectl("-n", NAMESPACE, "delete", "pod", name, "--wait=false", "--ignore-not-found")
    assert phase == "Succeeded", f"{shlex.join(command)} failed in {image}:\n{output}"
    return output


def python(code: str) -> list[str]:
    return ["python", "-c", code]


@pytest.mark.parametrize("image", [SERVER, PIPELINE])
def test_an_image_has_the_command_line_and_no_installer(image: str) -> None:
    output = run_in(
        image, ["sh", "-c", "evergreen --version; id -u; for t in pip uv gcc cc strip; do command -v $t; done; true"]
    )
    assert output.split() == ["evergreen,", "version", "0.1.0", "65532"]


@pytest.mark.parametrize("image", [SERVER, PIPELINE])
def test_everything_is_compiled_and_compiled_for_good(image: str) -> None:
    # The flags of PEP 552 after the magic number: 1 is unchecked, so a copy with another date is still good.
    output = run_in(
        image,
        python(
            "import pathlib, evergreen, torch, feast\n"
            "for module in (evergreen, torch, feast):\n"
            "    for file in pathlib.Path(module.__file__).parent.rglob('*.py'):\n"
            "        compiled = file.parent / '__pycache__' / f'{file.stem}.cpython-311.pyc'\n"
            "        if not compiled.exists() or compiled.read_bytes()[4:8] != b'\\x01\\0\\0\\0': print(file)"
        ),
    )
    # A few files of others cannot be compiled: Feast's templates, torch's for a later Python.
    assert "/site-packages/evergreen/" not in output
    assert len(output.splitlines()) < 20, output


@pytest.mark.parametrize("user", [65532, 12345])
def test_the_server_says_what_is_wrong_as_any_user(user: int) -> None:
    command = ["sh", "-c", "evergreen serve --model /mnt/models/model 2>&1; test $? -eq 1"]
    assert "/mnt/models/model" in run_in(SERVER, command, user=user)


@pytest.mark.parametrize("user", [65532, 12345])
def test_the_pipelines_image_runs_a_step_as_kubeflow_does(user: int, tmp_path: Path) -> None:
    step = (
        "from kfp import dsl\n\n@dsl.component\ndef probe(number: int) -> int:\n"
        "    import evergreen, components, pipelines, feature_repo\n    return number + 1\n"
    )
    arguments = {
        "inputs": {"parameterValues": {"number": 41}},
        "outputs": {"parameters": {"Output": {"outputFile": "/tmp/out"}}, "outputFile": "/tmp/metadata.json"},
    }
    program = (
        'program=$(mktemp -d) && printf "%s" "$STEP" > "$program/step.py" && '
        'python3 -m kfp.dsl.executor_main --component_module_path "$program/step.py" '
        '--executor_input "$INPUT" --function_to_execute probe && cat /tmp/metadata.json'
    )
    environment = {"STEP": step, "INPUT": json.dumps(arguments)}
    output = run_in(PIPELINE, ["sh", "-c", program], user=user, environment=environment)
    assert json.loads(output.splitlines()[-1])["parameterValues"] == {"Output": 42}


def test_the_pipelines_image_has_what_every_step_imports() -> None:
    modules = "evidently, matplotlib, pyod.models.ecod, scipy.stats, duckdb, s3fs, opentelemetry.sdk, kfp.kubernetes"
    assert run_in(PIPELINE, python(f"import {modules}; print('all')")).endswith("all\n")


def test_spark_runs_in_the_pipelines_image_as_its_own_user() -> None:
    code = (
        "from pyspark.sql import SparkSession\n"
        "spark = SparkSession.builder.master('local[1]').config('spark.ui.enabled', 'false').getOrCreate()\n"
        "print('sum', spark.range(10).groupBy().sum().collect()[0][0])"
    )
    assert "sum 45" in run_in(PIPELINE, python(code), user=185)
