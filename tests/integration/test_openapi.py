"""Schemathesis holds a running server to its own OpenAPI document, with every check that it has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evergreen.serving.server import serving_in_background
from evergreen.serving.settings import ServeSettings
from tests.unit.serving.conftest import parts  # noqa: F401  (a fixture)

CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "phases", "num_examples"),
    [("impressions", "coverage,fuzzing", 15), pytest.param("context_only", "fuzzing", 5, marks=pytest.mark.heavy)],
)
def test_schemathesis_finds_nothing(
    parts: Callable[[str], Any],  # noqa: F811
    tmp_path: Path,
    kind: str,
    phases: str,
    num_examples: int,
) -> None:
    recommender = parts(kind).other()  # closed with the server

    async def open_model(path: Path) -> Any:
        return recommender

    settings = ServeSettings(model=Path("model"), feature_store=Path("store"), host="127.0.0.1", port=0)
    with serving_in_background(settings, open_model) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "--no-color"]
        command += ["run", f"{server.url}/openapi.json", "--continue-on-failure", "--no-shrink"]
        command += ["--phases", phases, "-n", str(num_examples), "--seed", "20261123", "--warnings", "off"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 selected / 18 total" in done.stdout
