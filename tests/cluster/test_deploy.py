"""`manifests/kind/cluster deploy` on a cluster that has Kubeflow: what is missing is made, what is there stays."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.cluster import get, secret, why_not_here

SCRIPT = Path(__file__).resolve().parents[2] / "manifests" / "kind" / "cluster"
NAMESPACES = ("evergreen", "kubeflow")

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or ""),
]


def deploy() -> str:
    done = subprocess.run([SCRIPT, "deploy"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_deploying_again_changes_nothing_and_shows_no_secret() -> None:
    for namespace in ("kserve", "kubeflow"):
        if get("namespace", namespace, "default") is None:
            pytest.skip(f"no namespace {namespace} in this cluster: deploy wants KServe and Kubeflow Pipelines")
    first = deploy()
    passwords = {secret("evergreen-redis", namespace)["password"] for namespace in NAMESPACES}
    assert len(passwords) == 1, "servers and steps reach the same Redis"
    second = deploy()
    assert {secret("evergreen-redis", namespace)["password"] for namespace in NAMESPACES} == passwords
    (password,) = passwords
    assert password not in first + second
    applied = [
        line for line in second.splitlines() if line.rsplit(" ", 1)[-1] in ("unchanged", "configured", "created")
    ]
    assert len(applied) > 10, second
    # kubectl sends a budget's selector with every patch, which then changes nothing.
    assert [line for line in applied if not line.endswith(" unchanged") and "poddisruptionbudget" not in line] == []
