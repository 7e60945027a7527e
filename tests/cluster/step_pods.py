"""Runs the steps of a pipeline as pods, as compiled, on a cluster that has no Kubeflow Pipelines.

kfp.local walks the graph and hands each step to a runner. This one makes the pod that a server would make of the
compiled pipeline: its image, command, resources, claims, secrets and labels; artifacts lie in a folder of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from kfp import local
from kfp.local import status, subprocess_task_handler

from tests.e2e.cluster import explain_namespace, get, kubectl, wait_until

_POD_SECONDS = 600.0


class StepPods:
    """Pods of one compiled pipeline."""

    def __init__(self, compiled: Path, *, namespace: str, account: str, folders: Mapping[str, Path]) -> None:
        """Read what a server would read.

        Args:
            compiled: YAML that `evergreen compile` wrote.
            namespace: of the steps.
            account: their service account.
            folders: of this machine, by where every pod sees them.
        """
        self._spec, self._platform = yaml.safe_load_all(compiled.read_text())
        self._namespace, self._account, self._folders = namespace, account, folders
        self.ran: list[str] = []
        """Steps in the order in which they began."""

    @contextmanager
    def run_the_steps(self, root: Path) -> Iterator[None]:
        """Within the block, calling a pipeline runs its steps as pods, with artifacts under `root`."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess_task_handler.SubprocessTaskHandler, "run", lambda handler: self._run(handler))
            local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
            yield

    def _run(self, handler: subprocess_task_handler.SubprocessTaskHandler) -> status.Status:
        step = handler.full_command[handler.full_command.index("--function_to_execute") + 1].replace("_", "-")
        name = f"{step}-{uuid4().hex[:6]}"
        self.ran.append(step)
        kubectl("create", "-f", "-", stdin=json.dumps(self._pod(name, step, handler)))
        pod = wait_until(
            f"the end of {name}",
            lambda: (
                (
                    (found := get("pod", name, self._namespace))
                    and found["status"].get("phase") in ("Succeeded", "Failed")
                    and found
                )
                or None
            ),
            limit=_POD_SECONDS,
            explain=lambda: explain_namespace(self._namespace),
        )
        print(kubectl("-n", self._namespace, "logs", name))
        kubectl("-n", self._namespace, "delete", "pod", name, "--wait=false")
        return status.Status.SUCCESS if pod["status"]["phase"] == "Succeeded" else status.Status.FAILURE

    def _pod(self, name: str, step: str, handler: subprocess_task_handler.SubprocessTaskHandler) -> dict[str, Any]:
        container = self._spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
        asked, of_pod = container["resources"], self._platform["platforms"]["kubernetes"]["deploymentSpec"]
        settings = of_pod["executors"][f"exec-{step}"]
        volumes, mounts = [], []

        def mount(at: str, **volume: Any) -> None:
            key = re.sub(r"[^a-z0-9]+", "-", at.lower()).strip("-")
            volumes.append({"name": key, **volume})
            mounts.append({"name": key, "mountPath": at})

        for claim in settings.get("pvcMount", []):
            mount(claim["mountPath"], persistentVolumeClaim={"claimName": claim["constant"]})
        for empty in settings.get("emptyDirMounts", []):
            mount(empty["mountPath"], emptyDir={"sizeLimit": empty["sizeLimit"]})
        for secret in settings.get("secretAsVolume", []):
            mount(secret["mountPath"], secret={"secretName": secret["secretName"], "optional": secret.get("optional")})
        for at, folder in {handler.pipeline_root: Path(handler.pipeline_root), **self._folders}.items():
            mount(at, hostPath={"path": str(folder), "type": "Directory"})
        places = [
            (source["secretName"], "secretKeyRef", key["secretKey"], key["envVar"], source.get("optional", False))
            for source in settings.get("secretAsEnv", [])
            for key in source["keyToEnv"]
        ] + [
            (source["configMapName"], "configMapKeyRef", key["configMapKey"], key["envVar"], source.get("optional"))
            for source in settings.get("configMapAsEnv", [])
            for key in source["keyToEnv"]
        ]
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": self._namespace, **settings["podMetadata"]},
            "spec": {
                "restartPolicy": "Never",
                "serviceAccountName": self._account,
                "activeDeadlineSeconds": int(settings["activeDeadlineSeconds"]),
                "containers": [
                    {
                        "name": "main",
                        "image": container["image"],
                        "imagePullPolicy": settings["imagePullPolicy"],
                        "command": handler.full_command,
                        "resources": {
                            "requests": {
                                "cpu": asked["resourceCpuRequest"],
                                "memory": asked["resourceMemoryRequest"],
                            },
                            "limits": {"cpu": asked["resourceCpuLimit"], "memory": asked["resourceMemoryLimit"]},
                        },
                        "env": container.get("env", [])
                        + [
                            {"name": variable, "valueFrom": {kind: {"name": source, "key": key, "optional": optional}}}
                            for source, kind, key, variable, optional in places
                        ],
                        # Stricter than what KFP asks for: what is written goes to volumes.
                        "securityContext": {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False},
                        "volumeMounts": mounts,
                    }
                ],
                "volumes": volumes,
            },
        }
