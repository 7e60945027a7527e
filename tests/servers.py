"""Real servers for tests: started on a free loopback port with a folder of their own, and ended by their process id."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_SECONDS = 20.0


def free_port() -> int:
    """A port of the loopback address that nobody listens on, low enough for a Redis cluster to add 10,000 to it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_536:
            return port


class RedisServer:
    """A redis-server without persistence: what restarts, restarts empty."""

    def __init__(self, folder: Path, port: int, options: tuple[str, ...]) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        arguments = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder), "--save", ""]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["redis-server", *arguments, *self._options], stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"redis-server did not start: {(self._folder / 'redis.log').read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End this server's own process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def cpu_seconds(self) -> float:
        """CPU that the server has used so far."""
        import psutil

        assert self._process is not None
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(7) in (b"+PONG\r\n", b"-NOAUTH")
        except OSError:
            return False


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """A running redis-server.

    Args:
        options: of its command line, for example "--cluster-enabled", "yes".
    """
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on this machine: apt-get install -y redis-server")
    with tempfile.TemporaryDirectory(prefix="evergreen-redis-") as folder:
        server = RedisServer(Path(folder), free_port(), options)
        try:
            server.start()
            yield server
        finally:
            server.stop()
