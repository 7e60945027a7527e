"""Operating a server with every real part: exchanging models under load, draining, a file system for reading only."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.impressions import read_impressions
from evergreen.models.package import ModelPackage
from evergreen.serving.server import listen_on, opener, serving_in_background
from evergreen.serving.settings import ServeSettings
from tests.small_world import SmallWorld

PREDICT, READY, LOAD = (
    "/v1/models/evergreen:predict",
    "/v2/models/evergreen/ready",
    "/v2/repository/models/evergreen/load",
)
NUM_CLIENTS = 8
NUM_LOADS = 10


@dataclass(frozen=True)
class Run:
    """A feature store, and a folder with two packages for it."""

    feature_store: Path
    models: Path
    versions: tuple[str, str]
    instance: dict[str, Any]

    def package(self, place: int) -> Path:
        return self.models / f"package-{place}"


@pytest.fixture(scope="module")
def run(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    models = tmp_path_factory.mktemp("models")
    packages = [small_world.package(model) for model in ("deepfm", "dcn_v2")]
    for place, package in enumerate(packages):
        shutil.copytree(package.path, models / f"package-{place}")
    at = small_world.snapshot.as_of
    user = pq.read_table(small_world.snapshot.files[-1], columns=["user_id"])["user_id"][-1].as_py()
    instance = {"user_id": user, "k": 5, "context": {"device": "phone"}, "event_timestamp": at.isoformat()}
    return Run(small_world.feature_store, models, (packages[0].version, packages[1].version), instance)


@dataclass
class Hammer:
    """Clients that ask again and again on connections that they keep, and note what they get."""

    url: str
    instance: dict[str, Any]
    answers: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def going(self) -> Iterator[None]:
        stop = threading.Event()
        threads = [threading.Thread(target=self._ask, args=[stop]) for _ in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _ask(self, stop: threading.Event) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=30) as http:
            while not stop.is_set():
                try:
                    response = http.post(PREDICT, json={"instances": [self.instance]})
                except httpx.TransportError as error:
                    self.failures.append(repr(error))
                    return
                if response.status_code != 200:
                    self.failures.append(response.text)
                    return
                self.answers += response.json()["predictions"]
                if response.headers.get("connection") == "close":
                    return  # told to go to another server


def shown(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(item["item_id"], item["probability"]) for item in answer["items"]]


def test_models_are_exchanged_under_load_without_a_failed_request(run: Run, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(run.package(0))
    settings = ServeSettings(
        model=link,
        feature_store=run.feature_store,
        host="127.0.0.1",
        port=0,
        allow_reload=True,
        model_repository=run.models,
        deadline_ms=5000,
    )
    with (
        serving_in_background(settings, opener(settings, None, None)) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http,
    ):

        def ask() -> dict[str, Any]:
            answer: dict[str, Any] = http.post(PREDICT, json={"instances": [run.instance]}).json()["predictions"][0]
            return answer

        expected = {}
        for version in run.versions:  # the second comes from the folder of packages
            assert http.post(LOAD, json={"parameters": {"version": version}}).json()["version"] == version
            expected[version] = shown(ask())
        assert expected[run.versions[0]] != expected[run.versions[1]]

        hammer = Hammer(server.url, run.instance)
        with hammer.going():
            for turn in range(NUM_LOADS):
                target = turn % 2
                if turn % 3:  # back to the one before, which is still in memory
                    loaded = http.post(LOAD, json={"parameters": {"version": run.versions[target]}})
                else:  # the package that the path leads to now
                    link.unlink()
                    link.symlink_to(run.package(target))
                    loaded = http.post(LOAD)
                assert loaded.json() == {"name": "evergreen", "load": True, "version": run.versions[target]}
                assert ask()["model_version"] == run.versions[target]
                time.sleep(0.05)
        assert hammer.failures == []
        assert {answer["model_version"] for answer in hammer.answers} == set(run.versions)
        for answer in hammer.answers:
            assert not answer["degraded"]
            assert [item for item, _ in shown(answer)] == [item for item, _ in expected[answer["model_version"]]]
            scores = [score for _, score in shown(answer)]
            assert scores == pytest.approx([score for _, score in expected[answer["model_version"]]], abs=1e-9)


def test_broken_package_is_refused_and_the_old_one_keeps_serving(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(run.package(0), model)
    settings = ServeSettings(
        model=model, feature_store=run.feature_store, host="127.0.0.1", port=0, allow_reload=True, deadline_ms=5000
    )
    with (
        serving_in_background(settings, opener(settings, None, None)) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http,
    ):
        weights = model / ModelPackage.WEIGHTS
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused = http.post(LOAD)
        assert refused.status_code == 422
        assert f"{run.versions[0]} keeps serving" in refused.json()["error"]
        assert str(tmp_path) not in refused.text and "Error" not in refused.text
        answer = http.post(PREDICT, json={"instances": [run.instance]}).json()["predictions"][0]
        assert answer["model_version"] == run.versions[0]
        assert 'evergreen_model_loads_total{outcome="failed"}' in http.get("/metrics").text
        shutil.rmtree(model)
        assert http.post(LOAD).status_code == 422
        shutil.copytree(run.package(1), model)
        assert http.post(LOAD).json()["version"] == run.versions[1]


@contextmanager
def served(run: Run, log: Path, *options: str, **process: Any) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server in a process of its own."""
    with listen_on("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "evergreen.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(run.package(0)), "--feature-store", str(run.feature_store), "--deadline-ms", "5000"]
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        options_ = {"stdout": output, "stderr": subprocess.STDOUT} | process
        child = stack.enter_context(subprocess.Popen([*command, *options], **options_))
        stack.callback(child.kill)
        wait_until(lambda: answers(url), 120, alive=lambda: child.poll() is None)
        yield url, child


def answers(url: str) -> bool:
    try:
        return httpx.get(url + READY, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float, *, alive: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert alive(), "the process has ended"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def test_told_to_stop_under_load_no_request_fails_and_none_is_missing_in_the_log(run: Run, tmp_path: Path) -> None:
    log, impressions = tmp_path / "serve.log", tmp_path / "impressions"
    options = ["--drain-seconds", "1", "--impressions", str(impressions), "--log-format", "json"]
    with served(run, log, *options) as (url, child), httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
        hammer = Hammer(url, run.instance)
        with hammer.going():
            wait_until(lambda: len(hammer.answers) > 4 * NUM_CLIENTS, 30)
            assert http.get(READY).status_code == 200
            child.send_signal(signal.SIGTERM)
            wait_until(lambda: http.get(READY).status_code == 503, 1)
            assert http.post(PREDICT, json={"instances": [run.instance]}).status_code == 200, "not ready, but answering"
        assert child.wait(timeout=30) == 0
    assert hammer.failures == []
    rows = pa.concat_tables(read_impressions(str(impressions)))
    logged = set(rows["request_id"].to_pylist())
    assert {answer["request_id"] for answer in hammer.answers} < logged
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(line["level"] == "INFO" for line in lines), lines
    assert [line["message"].partition(" ")[0] for line in lines][-2:] == ["told", "stopped"]


def no_writing() -> None:
    """Have every write to a file fail, as on a file system for reading only; for root, too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE")
def test_server_needs_no_place_to_write(run: Run, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PROMETHEUS", "XDG", "MPL"))
    }
    environment |= {"HOME": absent, "TMPDIR": absent, "PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(path for path in run.feature_store.rglob("*"))
    reader, writer = os.pipe()
    process = {"cwd": "/", "env": environment, "preexec_fn": no_writing, "stdout": writer, "stderr": writer}
    with served(run, tmp_path / "unused", "--allow-reload", **process) as (url, child):
        os.close(writer)
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            assert http.post(PREDICT, json={"instances": [run.instance]}).status_code == 200
            assert http.post(LOAD).status_code == 200
            assert http.get("/metrics").status_code == 200
        child.send_signal(signal.SIGTERM)
        with os.fdopen(reader, "rb") as output:
            said = output.read().decode()
        assert child.wait(timeout=30) == 0, said
    assert "Traceback" not in said and "Error" not in said, said
    assert sorted(run.feature_store.rglob("*")) == before
