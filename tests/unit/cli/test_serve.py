"""`evergreen serve`: every option reaches the server, and what cannot be is told before anything is loaded."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click import Context
from click.testing import CliRunner

from evergreen.cli.serve import serve
from evergreen.contracts.errors import ArtifactError, EvergreenError
from evergreen.serving.settings import ServeSettings


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.getLogger("evergreen").level
    yield
    root.level, root.handlers, logging.getLogger("evergreen").level = before


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Options with what looks like a model package and a feature store from outside."""
    for file in (tmp_path / "model" / "model.json", tmp_path / "feature_store" / "feature_store.yaml"):
        file.parent.mkdir()
        file.touch()
    return ["--model", str(tmp_path / "model")]


def test_every_setting_has_an_option_with_the_same_default() -> None:
    options = {option.name: option for option in serve.params}
    assert options.keys() == ServeSettings.model_fields.keys()
    defaults = {name: field.default for name, field in ServeSettings.model_fields.items() if not field.is_required()}
    assert {name: options[name].get_default(Context(serve)) for name in defaults} == defaults


def test_options_reach_the_server(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServeSettings] = []
    monkeypatch.setattr("evergreen.serving.server.serve", seen.append)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    options = ["--grpc-port", "0", "--allow-reload", "--drain-seconds", "5", "--log-format", "json", "--threads", "2"]
    result = CliRunner().invoke(serve, [*folders, *options], catch_exceptions=False)
    assert result.exit_code == 0
    (settings,) = seen
    assert settings == ServeSettings(
        model=tmp_path / "model",
        feature_store=tmp_path / "feature_store",
        grpc_port=0,
        allow_reload=True,
        drain_seconds=5,
        log_format="json",
        threads=2,
        otlp_endpoint="http://collector:4318",
    )


def test_port_in_use_is_told_before_anything_is_loaded(folders: list[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EvergreenError, match=f"port {port} is in use: choose another with --port"):
            options = [*folders, "--host", "127.0.0.1", "--port", str(port)]
            CliRunner().invoke(serve, options, catch_exceptions=False)


def test_unknown_host_is_named(folders: list[str]) -> None:
    with pytest.raises(EvergreenError, match=r"host 'no.such.host.invalid' cannot be resolved"):
        CliRunner().invoke(serve, [*folders, "--host", "no.such.host.invalid"], catch_exceptions=False)


def test_missing_model_is_told_before_anything_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from evergreen.cli.serve import serve\n"
        f"try: serve(['--model', {str(tmp_path / 'absent')!r}], standalone_mode=False)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print([m for m in ('kserve', 'torch', 'feast', 'pyarrow', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    told, imported = done.stdout.splitlines()
    assert told.startswith(ArtifactError.__name__) and "absent: no such directory" in told
    assert imported == "[]"


def test_operators_guide_names_every_option_and_every_metric() -> None:
    import importlib
    import pkgutil

    from prometheus_client import REGISTRY

    import evergreen.serving

    guide = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    for option in serve.params:
        assert f"`{option.opts[0]}`" in guide, option.opts[0]
    for module in pkgutil.iter_modules(evergreen.serving.__path__):
        importlib.import_module(f"evergreen.serving.{module.name}")
    suffixes = {"counter": "_total", "info": "_info"}
    # Tests beside this one may have imported the stream, which is another process with metrics of its own.
    ours = [m for m in REGISTRY.collect() if m.name.startswith("evergreen_") and "_stream_" not in m.name]
    for metric in ours:
        assert f"`{metric.name}{suffixes.get(metric.type, '')}`" in guide, metric.name
    assert len(ours) > 15
