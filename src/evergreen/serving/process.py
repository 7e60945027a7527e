"""`evergreen serve` as a child process, for whoever has a package and wants to ask it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from evergreen.contracts.errors import EvergreenError
from evergreen.serving.client import RecommenderClient

_START_SECONDS = 180.0
_STOP_SECONDS = 30.0


@contextmanager
def served(model: Path, *, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """Serve a package until the block ends.

    Args:
        model: directory of the package.
        log: file for what the server says.
        options: further ones of `evergreen serve`.

    Yields:
        The server's URL; it is ready.

    Raises:
        EvergreenError: it did not become ready; names the log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "evergreen.cli", "serve", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            with RecommenderClient(url) as client:
                client.wait_until_ready(timeout=_START_SECONDS, still_alive=lambda: server.poll() is None)
            yield url
        except TimeoutError as error:
            raise EvergreenError(f"the served model did not become ready: see {log}") from error
        finally:
            server.terminate()
            try:
                server.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
