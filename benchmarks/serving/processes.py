"""Servers as processes of their own, and what they cost."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.serving.load import MODEL_NAME
from tests.servers import free_port

_START_SECONDS = 180.0
_STOP_SECONDS = 30.0
_STAGE = re.compile(r'^evergreen_stage_seconds_sum\{stage="(\w+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        name: in reports.
        port: on the loopback address.
        process: psutil's view of it.
        log: what it wrote.
    """

    name: str
    port: int
    process: psutil.Process
    log: Path

    @property
    def cpu_seconds(self) -> float:
        """CPU that it has used so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    @property
    def rss_mib(self) -> float:
        """Resident memory."""
        return float(self.process.memory_info().rss) / 2**20

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE

    def is_ready(self) -> bool:
        """Whether it says that its model is ready."""
        try:
            return self._get(f"/v2/models/{MODEL_NAME}/ready")[0] == 200
        except OSError:
            return False

    def stage_seconds(self) -> dict[str, float]:
        """Seconds spent so far by stage, of `evergreen serve`; nothing of another server."""
        _, text = self._get("/metrics")
        return {stage: float(seconds) for stage, seconds in _STAGE.findall(text)}

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


@contextmanager
def running(name: str, arguments: Sequence[str | Path], folder: Path) -> Iterator[Server]:
    """`python -m` with these arguments and `--port`, once it is ready; ended with the block.

    Raises:
        RuntimeError: it ends before that, or takes too long; with the end of what it wrote.
    """
    port = free_port()
    log = folder / f"{name.replace(' ', '_')}.log"
    command = [sys.executable, "-m", *map(str, arguments), "--port", str(port)]
    # One thread each: what is compared is CPU, and the machine is shared with the load.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    server = Server(name, port, psutil.Process(process.pid), log)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not server.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not get ready:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def evergreen_serve(model: Path, feature_store: Path, *more: str | Path) -> list[str | Path]:
    """Arguments of `evergreen serve`."""
    return ["evergreen.cli", "serve", "--model", model, "--feature-store", feature_store, "--name", MODEL_NAME, *more]
