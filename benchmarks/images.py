"""What is in the images, how long a server takes from nothing to Ready, and how long a step takes to its first line.

Runs on the cluster of KUBECONFIG, with the images that manifests/images names, in a namespace of its own:

    python -m benchmarks.images --bundle FOLDER --out benchmarks/images.md

FOLDER holds a model and a feature store on SQLite, as `evergreen run` leaves them (OUT/model, OUT/feature_store).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.cluster import explain_namespace, kubectl, wait_until

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "evergreen-images"
SERVER, PIPELINE = "evergreen-server", "evergreen-pipeline-python"
NUM_STARTS = 5
LIMIT_SECONDS = 300.0

# Prints bytes by what they belong to. Files of one inode count once, as they do in a layer.
SIZES = r"""
import json, os, re
from collections import Counter
site = "/opt/evergreen/lib/python3.11/site-packages/"
cuda = re.compile(r"(nvidia|cuda|triton)(/|_|-)|torch/lib/[^/]*(cuda|nvshmem|nvrtc)")
sizes, seen = Counter(), set()
for folder, folders, files in os.walk("/", followlinks=False):
    folders[:] = [f for f in folders if os.path.join(folder, f) not in ("/proc", "/sys", "/dev", "/tmp", "/mnt")]
    for file in files:
        path = os.path.join(folder, file)
        status = os.lstat(path)
        if status.st_ino in seen and status.st_nlink > 1:
            continue
        seen.add(status.st_ino)
        name = path.removeprefix(site)
        if name == path:
            part = "Java" if "/jvm/" in path else "the base image" if not path.startswith("/opt") else "other"
        elif cuda.match(name):
            part = "CUDA"
        else:
            part = re.split(r"[/.]", name)[0].removeprefix("_").removesuffix("_libs")
        sizes[part] += status.st_size
        if name.endswith(".pyc") and part != "CUDA":
            sizes["of it, byte-code"] += status.st_size
print(json.dumps(sizes))
"""

STEP = """
from kfp import dsl

@dsl.component
def probe() -> str:
    import os, time
    print("FIRST LINE", time.time() - float(os.environ["START"]))
    import evergreen.step
    return "done"
"""
STEP_INPUT = {
    "inputs": {},
    "outputs": {"parameters": {"Output": {"outputFile": "/tmp/output"}}, "outputFile": "/tmp/metadata.json"},
}
STEPS = f"""
printf '%s' "$STEP" > /tmp/step.py
for run in $(seq {NUM_STARTS}); do
  START=$(date +%s.%N) python3 -m kfp.dsl.executor_main --component_module_path /tmp/step.py \
    --executor_input "$STEP_INPUT" --function_to_execute probe
done
"""


@dataclass(frozen=True)
class Start:
    """One start of a server, in seconds."""

    apply_to_ready: float
    created_to_started: float
    imports: float
    loading: float
    listening: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="folder with model/ and feature_store/")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    names = image_names()
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    try:
        load_bundle(names[SERVER], arguments.bundle)
        sizes = {name: json.loads(run_pod(names[name], ["python", "-c", SIZES])) for name in (SERVER, PIPELINE)}
        starts = [cold_start(names[SERVER]) for _ in range(NUM_STARTS)]
        environment = {"STEP": STEP, "STEP_INPUT": json.dumps(STEP_INPUT)}
        output = run_pod(names[PIPELINE], ["sh", "-c", STEPS], environment=environment)
        steps = [float(seconds) for seconds in re.findall(r"FIRST LINE ([\d.]+)", output)]
    finally:
        kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    assert len(steps) == NUM_STARTS, output
    arguments.out.write_text(report(names, sizes, starts, steps))


def image_names() -> dict[str, str]:
    written = yaml.safe_load((ROOT / "manifests" / "images" / "kustomization.yaml").read_text())["images"]
    return {image["name"]: f"{image['newName']}:{image['newTag']}" for image in written}


def apply(*objects: dict[str, Any]) -> None:
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))


def pod(
    name: str, image: str, command: list[str], environment: dict[str, str], *, writes_models: bool
) -> dict[str, Any]:
    mounts, volumes = [{"name": "tmp", "mountPath": "/tmp"}], [{"name": "tmp", "emptyDir": {}}]
    if writes_models:
        mounts.append({"name": "models", "mountPath": "/models"})
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": "models"}})
    container = {
        "name": "main",
        "image": image,
        "command": command,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    security = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    spec = {"restartPolicy": "Never", "securityContext": security, "containers": [container], "volumes": volumes}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}


def wait(what: str, look: Callable[[], Any]) -> Any:
    return wait_until(what, look, limit=LIMIT_SECONDS, explain=lambda: explain_namespace(NAMESPACE), every=0.2)


def run_pod(image: str, command: list[str], *, environment: dict[str, str] | None = None) -> str:
    """The output of a command in a pod of this image."""
    apply(pod("probe", image, command, environment or {}, writes_models=False))
    phase = ["-n", NAMESPACE, "get", "pod", "probe", "-o", "jsonpath={.status.phase}"]
    wait(f"a pod of {image}", lambda: True if kubectl(*phase) in ("Succeeded", "Failed") else None)
    output = kubectl("-n", NAMESPACE, "logs", "probe")
    assert kubectl(*phase) == "Succeeded", output
    kubectl("-n", NAMESPACE, "delete", "pod", "probe")
    return output


def load_bundle(image: str, bundle: Path) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    metadata = {"name": "models", "namespace": NAMESPACE}
    if "true" not in kubectl("get", "storageclass", "-o", "jsonpath={.items[*].metadata.annotations}"):
        claim["storageClassName"] = ""  # no default class: a volume without one
    apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": claim})
    apply(pod("loader", image, ["sleep", "600"], {}, writes_models=True))
    kubectl("-n", NAMESPACE, "wait", "--for=condition=Ready", "pod/loader", "--timeout=120s", limit=150)
    packed = subprocess.run(
        ["tar", "-C", str(bundle), "-cf", "-", "model", "feature_store"], check=True, capture_output=True
    ).stdout
    command = ["kubectl", "-n", NAMESPACE, "exec", "-i", "loader", "--"]
    script = "rm -rf /models/v1 && mkdir /models/v1 && tar -C /models/v1 --no-same-owner -xf -"
    subprocess.run([*command, "sh", "-c", script], input=packed, check=True)
    kubectl("-n", NAMESPACE, "delete", "pod", "loader", "--now")


def serving_objects(image: str) -> list[dict[str, Any]]:
    """The ServingRuntime and the InferenceService of manifests/base, with SQLite for Redis and this bundle."""
    base = ROOT / "manifests" / "base"
    runtime, service = (
        yaml.safe_load((base / name).read_text()) for name in ("serving-runtime.yaml", "inference-service.yaml")
    )
    for made in (runtime, service):
        made["metadata"]["namespace"] = NAMESPACE
    container = runtime["spec"]["containers"][0]
    container["image"] = image
    container["args"] = [word for word in container["args"] if "$(" not in word]
    container["envFrom"] = []
    container["env"] = [entry for entry in container["env"] if "valueFrom" not in entry]
    predictor = service["spec"]["predictor"]
    del predictor["serviceAccountName"]
    predictor["model"] |= {"runtime": "evergreen", "storageUri": "pvc://models/v1"}
    return [runtime, service]


def cold_start(image: str) -> Start:
    """From `kubectl apply` of an InferenceService to Ready, with the image on the node."""
    started = time.monotonic()
    apply(*serving_objects(image))
    ready = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
    wait(
        "the InferenceService",
        lambda: kubectl("-n", NAMESPACE, "get", "isvc", "evergreen", "-o", ready) == "True" or None,
    )
    seconds = time.monotonic() - started
    (found,) = json.loads(kubectl("-n", NAMESPACE, "get", "pods", "-o", "json"))["items"]
    log = kubectl("-n", NAMESPACE, "logs", found["metadata"]["name"])
    # Time of a CPU is the same whatever else the machine does.
    fields = (
        kubectl("-n", NAMESPACE, "exec", found["metadata"]["name"], "--", "cat", "/proc/1/stat")
        .rsplit(")", 1)[1]
        .split()
    )
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    kubectl("-n", NAMESPACE, "delete", "isvc", "evergreen")
    kubectl("-n", NAMESPACE, "wait", "--for=delete", f"pod/{found['metadata']['name']}", "--timeout=120s", limit=150)
    times = re.search(r"imports took ([\d.]+) s, loading ([\d.]+) s", log)
    listening = re.search(r"after ([\d.]+) s", log)
    assert times and listening, log
    begun = found["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
    until_started = instant(begun) - instant(found["metadata"]["creationTimestamp"])
    return Start(seconds, until_started, float(times[1]), float(times[2]), float(listening[1]), cpu)


def instant(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


def report(names: dict[str, str], sizes: dict[str, dict[str, int]], starts: list[Start], steps: list[float]) -> str:
    lines = [
        f"# Images: {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} of other work",
        "",
        f"`{names[SERVER]}`, `{names[PIPELINE]}`. MB are 10⁶ bytes of files, not compressed.",
        "",
    ]
    for name, parts in sizes.items():
        total = sum(size for part, size in parts.items() if part != "of it, byte-code")
        without = total - parts.get("CUDA", 0)
        lines += [
            f"## {name}: {without / 1e6:,.0f} MB without CUDA, {total / 1e6:,.0f} MB with it",
            "",
            "| part | MB |",
            "|---|---:|",
        ]
        largest = sorted(parts.items(), key=lambda item: -item[1])
        shown = [(part, size) for part, size in largest if size > 8e6]
        lines += [f"| {part} | {size / 1e6:,.0f} |" for part, size in shown]
        rest = sum(size for part, size in largest if size <= 8e6)
        lines += [f"| {len(largest) - len(shown)} others | {rest / 1e6:,.0f} |", ""]
    lines += [
        "## A server from `kubectl apply` of its InferenceService to Ready, seconds",
        "",
        "| | median | slowest |",
        "|---|---:|---:|",
    ]
    for label, values in (
        ("apply to Ready", [start.apply_to_ready for start in starts]),
        ("pod made to container started", [start.created_to_started for start in starts]),
        ("imports (torch, KServe, Feast)", [start.imports for start in starts]),
        ("loading the package and the items", [start.loading for start in starts]),
        ("start of Python to listening", [start.listening for start in starts]),
        ("CPU of it all", [start.cpu for start in starts]),
    ):
        lines.append(f"| {label} | {statistics.median(values):.1f} | {max(values):.1f} |")
    lines += [
        "",
        "## A step from the start of Python to its first line, seconds",
        "",
        f"first {steps[0]:.2f}, median {statistics.median(steps):.2f} of {len(steps)}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
