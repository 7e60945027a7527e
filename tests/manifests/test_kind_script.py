"""manifests/kind/cluster: what it would do, in which order, and that a dry run does nothing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "manifests" / "kind" / "cluster"


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script where every program that could change something only leaves a trace."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("kubectl", "kind", "docker", "podman", "buildah"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\nexit 1\n')
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    return subprocess.run(
        [SCRIPT, *arguments], env={"PATH": path, **environment}, capture_output=True, text=True, cwd=tmp_path
    )


def commands(output: str) -> list[str]:
    return [line.removeprefix("+ ") for line in output.splitlines() if line.startswith("+ ")]


def test_the_script_parses() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.parametrize("command", ["up", "deploy", "down"])
def test_a_dry_run_says_all_and_calls_nothing(tmp_path: Path, command: str) -> None:
    done = run(tmp_path, command, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert commands(done.stdout)
    assert not (tmp_path / "called").exists(), (tmp_path / "called").read_text()


def test_up_installs_each_part_after_what_it_needs(tmp_path: Path) -> None:
    said = commands(run(tmp_path, "up", "--dry-run").stdout)
    order = [
        "kind create cluster",
        "images/build --load-kind evergreen",
        "/cert-manager.yaml",
        "-n cert-manager wait",
        "/kserve.yaml",
        "patch configmap inferenceservice-config",
        "rollout status deployment/kserve-controller-manager",
        "/cluster-scoped-resources?ref=",
        "crd/applications.app.k8s.io",
        "/env/platform-agnostic?ref=",
        "-n kubeflow wait --for=condition=Available",
        "apply -k manifests/overlays/kind",
        "create secret generic evergreen-redis",
        "create secret generic evergreen-s3",
        "-n evergreen rollout status",
    ]
    places = [next((i for i, line in enumerate(said) if part in line), None) for part in order]
    assert None not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)  # type: ignore[type-var]
    assert all("--context kind-evergreen" in line for line in said if line.startswith("kubectl ")), "no other cluster"


def test_every_wait_has_a_limit(tmp_path: Path) -> None:
    waits = [
        line
        for line in commands(run(tmp_path, "up", "--dry-run").stdout)
        if " wait" in line or "rollout status" in line
    ]
    assert len(waits) >= 5
    for line in waits:
        assert re.search(r"(--timeout=|--wait )\d+s", line), line


def test_what_comes_from_elsewhere_is_pinned(tmp_path: Path) -> None:
    output = run(tmp_path, "up", "--dry-run").stdout
    sources = re.findall(r"github\.com/[^\s']+", output)
    assert len(sources) >= 4
    for source in sources:
        assert re.search(r"/v\d+\.\d+\.\d+/|\?ref=\d+\.\d+\.\d+$", source), source
    assert re.search(r"--image kindest/node:v1\.34\.\d+@sha256:[0-9a-f]{64} ", output)


def test_deploy_takes_another_overlay_and_other_namespaces(tmp_path: Path) -> None:
    output = run(tmp_path, "deploy", "--dry-run", OVERLAY="production", NAMESPACE="shop", STEPS_NAMESPACE="team").stdout
    said = commands(output)
    assert "kubectl apply -k manifests/overlays/production" in said
    assert any(
        line.startswith("kubectl -n shop get secret evergreen-redis ") and "-n team create" in line for line in said
    )
    assert not any("seaweedfs" in line for line in said), "another store has its own address"
    assert not any(word in output for word in ("kind-", "cert-manager", "-n kubeflow"))


def test_deploy_on_a_cluster_without_kubeflow_says_what_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, "deploy")
    assert done.returncode == 1
    assert "no namespace kserve in this cluster: install KServe" in done.stderr
    assert "apply" not in (tmp_path / "called").read_text()


@pytest.mark.parametrize("arguments", [(), ("away",), ("up", "--force")])
def test_another_command_is_answered_with_the_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "usage: manifests/kind/cluster up|deploy|down" in done.stderr
    assert not (tmp_path / "called").exists()


def test_kserve_is_told_standard_mode_without_an_ingress() -> None:
    configuration = yaml.safe_load((SCRIPT.parent / "inferenceservice-config.yaml").read_text())["data"]
    assert yaml.safe_load(configuration["deploy"]) == {"defaultDeploymentMode": "Standard"}
    ingress = yaml.safe_load(configuration["ingress"])
    assert ingress["disableIngressCreation"] is True
    assert ingress["enableGatewayApi"] is False
