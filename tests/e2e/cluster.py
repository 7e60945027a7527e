"""What an end-to-end test needs of a cluster: kubectl, forwarded ports, and waiting that explains itself in vain."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Found = TypeVar("Found")

_CALL_SECONDS = 120.0
_FORWARD_SECONDS = 30.0
_NUM_EVENTS, _NUM_LOG_LINES = 25, 40


class ClusterError(Exception):
    """The cluster did not do what was asked, with all that it says about it."""


def kubectl(*arguments: str, stdin: str | None = None, limit: float = _CALL_SECONDS) -> str:
    """Run kubectl on the cluster of KUBECONFIG; what it prints.

    Raises:
        ClusterError: it failed, or took longer than `limit` seconds.
    """
    command = ["kubectl", *arguments]
    try:
        ran = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{' '.join(command)}: nothing after {limit:g} s") from error
    if ran.returncode != 0:
        raise ClusterError(f"{' '.join(command)}: {ran.stderr.strip()}")
    return ran.stdout


def get(kind: str, name: str, namespace: str) -> dict[str, Any] | None:
    """An object; None where there is none."""
    found = kubectl("-n", namespace, "get", kind, name, "--ignore-not-found", "-o", "json")
    return json.loads(found) if found.strip() else None


def wait_until(
    what: str, look: Callable[[], Found | None], *, limit: float, explain: Callable[[], str], every: float = 2.0
) -> Found:
    """Look until there is something, and return it.

    Args:
        what: is waited for, in words.
        look: None: not yet. An AssertionError or ClusterError of it is final.
        limit: seconds.
        explain: what to say when it was in vain; see `explain_namespace`.
        every: seconds between two looks.

    Raises:
        ClusterError: it was in vain.
    """
    deadline = time.monotonic() + limit
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {limit:g} s for {what}, in vain\n{explain()}")
        time.sleep(every)
    return found


def explain_namespace(namespace: str, selector: str = "") -> str:
    """Pods, the newest events, and the last lines of every container that failed or is not ready.

    Args:
        namespace: to explain.
        selector: of labels; pods and logs of these alone.
    """
    chosen = ["-n", namespace, *(["-l", selector] if selector else [])]
    parts = [f"-- pods of {namespace}", _told(*chosen, "get", "pods", "-o", "wide", "--no-headers")]
    events = _told("-n", namespace, "get", "events", "--sort-by=.lastTimestamp", "--no-headers").splitlines()
    parts += [f"-- newest events of {namespace}", *events[-_NUM_EVENTS:]]
    for pod, container in _unwell(chosen):
        tail = ["-n", namespace, "logs", pod, "-c", container, f"--tail={_NUM_LOG_LINES}"]
        parts += [f"-- log of {pod}, container {container}", _told(*tail)]
        if not (before := _told(*tail, "--previous")).startswith("("):
            parts += ["-- and before its last restart", before]
    return "\n".join(parts)


def _told(*arguments: str) -> str:
    """What kubectl says, be it an error: an explanation must not fail."""
    try:
        return kubectl(*arguments).rstrip()
    except ClusterError as error:
        return f"({error})"


def _unwell(chosen: list[str]) -> Iterator[tuple[str, str]]:
    try:
        pods = json.loads(kubectl(*chosen, "get", "pods", "-o", "json"))["items"]
    except ClusterError:
        return
    for pod in pods:
        status = pod["status"]
        for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            ended = container["state"].get("terminated")
            well = container["ready"] if ended is None else ended["exitCode"] == 0
            if (not well and "waiting" not in container["state"]) or container["restartCount"]:
                yield pod["metadata"]["name"], container["name"]


@contextmanager
def port_forward(namespace: str, target: str, port: int) -> Iterator[str]:
    """Reach a port of a Service or pod from here, for the time of a block.

    Args:
        namespace: of the target.
        target: e.g. `svc/evergreen-predictor`. The pod behind it is chosen once: forward again after a roll-out.
        port: of the target.

    Yields:
        The base URL, of a free local port.

    Raises:
        ClusterError: there is no such target, or no pod behind it.
    """
    command = ["kubectl", "-n", namespace, "port-forward", "--address", "127.0.0.1", target, f":{port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watchdog = threading.Timer(_FORWARD_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"Forwarding from (127\.0\.0\.1:\d+)", line):
                break
        else:
            raise ClusterError(f"{' '.join(command)}: {said.strip()}\n{explain_namespace(namespace)}")
        watchdog.cancel()
        # Its further lines, one a connection, would fill the pipe.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield f"http://{found[1]}"
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def secret(name: str, namespace: str) -> dict[str, str]:
    """The values of a Secret.

    Raises:
        ClusterError: there is none.
    """
    template = '{{range $key, $value := .data}}{{$key}} {{$value | base64decode}}{{"\\n"}}{{end}}'
    told = kubectl("-n", namespace, "get", "secret", name, "-o", f"go-template={template}")
    return dict(line.split(" ", 1) for line in told.splitlines() if line)


def delete_namespace(name: str) -> None:
    """Delete a namespace, and let others claim the volumes that were claimed in it, which a cluster may retain."""
    kubectl("delete", "namespace", name, "--ignore-not-found", limit=180)
    for volume in json.loads(kubectl("get", "persistentvolumes", "-o", "json"))["items"]:
        if volume["spec"].get("claimRef", {}).get("namespace") == name:
            change = json.dumps({"spec": {"claimRef": None}})
            kubectl("patch", "persistentvolume", volume["metadata"]["name"], "--type=merge", "-p", change)


def why_not_here() -> str | None:
    """Why no cluster can be tested; None: there is one."""
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG names no cluster"
    try:
        kubectl("get", "--raw", "/readyz", limit=20)
    except (ClusterError, FileNotFoundError) as error:
        return f"no cluster answers: {error}"
    return None
