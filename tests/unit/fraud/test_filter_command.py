"""`evergreen filter`: what it writes and says, and mistakes in its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from evergreen.cli.filter import filter_command, filter_config
from evergreen.contracts.snapshot import Snapshot
from evergreen.fraud.filter import FilterConfig


@pytest.fixture
def snapshot(ingest: Callable[..., Snapshot]) -> Snapshot:
    rows = [{"at": 1.0 * n, "user_id": "bot", "item_id": f"i{n}", "request_id": f"b{n}"} for n in range(50)]
    rows += [{"at": 700.0 * n, "user_id": "u", "item_id": f"i{n}", "request_id": f"r{n}"} for n in range(30)]
    return ingest(rows)


def test_labels_and_the_filtered_snapshot_are_written_and_counted(snapshot: Snapshot, tmp_path: Path) -> None:
    arguments = [str(snapshot.path), "--out", str(tmp_path / "labels"), "--filtered", str(tmp_path / "filtered")]
    result = CliRunner().invoke(filter_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "50 of 80 events, by 1 of 2 users, are suspicious" in result.output
    assert "velocity" in result.output
    assert Snapshot.load(tmp_path / "filtered").manifest.rows == 30


def test_settings_come_from_a_file(snapshot: Snapshot, tmp_path: Path) -> None:
    file = tmp_path / "strict.toml"
    file.write_text("false_positive_share = 0\n[limits]\nrequests_per_minute = 100\nrequests_per_hour = 100\n")
    arguments = [str(snapshot.path), "--out", str(tmp_path / "labels"), "--config", str(file)]
    result = CliRunner().invoke(filter_command, arguments, catch_exceptions=False)
    assert "0 of 80 events" in result.output


def test_without_a_file_settings_are_the_defaults() -> None:
    assert filter_config(None) == FilterConfig()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("window = 3", "window: no such setting; choose from limits, false_positive_share"),
        ("[limits]\nalfa = 3", "limits.alfa: no such setting; choose from requests_per_minute"),
        ("false_positive_share = 2", "false_positive_share=2: input should be less than or equal to 0.2"),
        ("strict", "not TOML"),
    ],
)
def test_mistakes_in_the_file_are_named(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(click.UsageError) as error:
        filter_config(tmp_path / "bad.toml")
    assert told in str(error.value)
