"""An HTTP server that speaks as much of Kubeflow Pipelines' v2beta1 API as submitting and waiting needs.

Kubeflow Pipelines' own server needs a cluster; this one lets the SDK's real client, and whoever uses it, be tested over
a real connection. It keeps what it is given: experiments, recurring runs, and runs that end in the state that their
test chose.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

ROOT = "/apis/v2beta1"


class KfpServer(ThreadingHTTPServer):
    """State of the server; `token`, if given, is what every request has to bring."""

    daemon_threads = True

    def __init__(self, token: str = "", address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, _Handler)
        self.token = token
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.recurring_runs: list[dict[str, Any]] = []
        self.page_size = 1
        """Of recurring runs: whoever reads one page alone does not see them all."""
        self.terminated: list[str] = []
        self.outcome = "SUCCEEDED"
        """State in which runs end, at the third look at them; an empty one: they go on."""
        self.task_details: list[dict[str, Any]] = []
        self._looks: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add_experiment(self, body: dict[str, Any]) -> dict[str, Any]:
        made = {"experiment_id": str(uuid4()), **body}
        self.experiments.append(made)
        return made

    def add_run(self, body: dict[str, Any], *, state: str = "PENDING", created_at: datetime | None = None) -> dict:
        created = (created_at or datetime.now(UTC)).isoformat()
        self.runs.append({**body, "run_id": str(uuid4()), "state": state, "created_at": created})
        return self.runs[-1]

    def add_recurring_run(self, body: dict[str, Any]) -> dict[str, Any]:
        self.recurring_runs.append({**body, "recurring_run_id": str(uuid4()), "status": "ENABLED"})
        return self.recurring_runs[-1]

    def page_of_recurring_runs(self, experiment_id: str, start: int) -> dict[str, Any]:
        found = [run for run in self.recurring_runs if run["experiment_id"] == experiment_id]
        end = start + self.page_size
        return {"recurringRuns": found[start:end], "next_page_token": str(end) if end < len(found) else ""}

    def look_at(self, run_id: str) -> dict[str, Any]:
        """A run, one state further with each look."""
        run = next(run for run in self.runs if run["run_id"] == run_id)
        self._looks[run_id] = self._looks.get(run_id, 0) + 1
        if run["state"] == "PENDING":
            run["state"] = "RUNNING"
        elif run["state"] == "RUNNING" and self.outcome and self._looks[run_id] >= 3:
            run["state"] = self.outcome
            run["run_details"] = {"task_details": self.task_details}
        return run

    def terminate(self, run_id: str) -> dict[str, Any]:
        self.look_at(run_id)["state"] = "CANCELED"
        self.terminated.append(run_id)
        return {}


class _Handler(BaseHTTPRequestHandler):
    server: KfpServer

    def do_GET(self) -> None:
        path, query = self._path()
        match path:
            case ["healthz"]:
                self._answer({"multi_user": False})
            case ["experiments"]:
                self._answer({"experiments": _filtered(self.server.experiments, query)})
            case ["runs"]:
                runs = [run for run in self.server.runs if run["experiment_id"] == query.get("experiment_id")]
                self._answer({"runs": _filtered(runs, query)[::-1]})
            case ["runs", run_id]:
                self._answer(self.server.look_at(run_id))
            case ["recurringruns"]:
                start = int(query.get("page_token") or 0)
                self._answer(self.server.page_of_recurring_runs(query.get("experiment_id", ""), start))
            case _:
                self._answer({"error": f"no {self.path}"}, status=404)

    def do_POST(self) -> None:
        path, _ = self._path()
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        match path:
            case ["experiments"]:
                self._answer(self.server.add_experiment(body))
            case ["runs"]:
                self._answer(self.server.add_run(body))
            case ["recurringruns"]:
                self._answer(self.server.add_recurring_run(body))
            case ["runs", action] if action.endswith(":terminate"):
                self._answer(self.server.terminate(action.removesuffix(":terminate")))
            case _:
                self._answer({"error": f"no {self.path}"}, status=404)

    def do_DELETE(self) -> None:
        path, _ = self._path()
        kept = [run for run in self.server.recurring_runs if path != ["recurringruns", run["recurring_run_id"]]]
        gone = len(kept) < len(self.server.recurring_runs)
        self.server.recurring_runs = kept
        self._answer({} if gone else {"error": f"no {self.path}"}, status=200 if gone else 404)

    def _path(self) -> tuple[list[str], dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path.removeprefix(ROOT).strip("/").split("/"), {
            name: values[0] for name, values in parse_qs(parts.query).items()
        }

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            body, status = {"error": "Unauthorized"}, 401
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests have no use for the access log."""


def _filtered(objects: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    predicates = json.loads(query.get("filter") or "{}").get("predicates", [])
    wanted = {predicate["key"]: predicate["stringValue"] for predicate in predicates}
    return [found for found in objects if all(found.get(key) == value for key, value in wanted.items())]


@contextmanager
def kfp_server(token: str = "") -> Iterator[KfpServer]:
    """A server on a free loopback port, for the time of a test."""
    with KfpServer(token) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":  # in a pod
    with KfpServer(address=("", 8888)) as _server:
        _server.serve_forever()
