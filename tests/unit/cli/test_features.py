"""`evergreen features`: what it says when it cannot do what it was asked for, and that both ends fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from evergreen.cli.features import features
from evergreen.contracts.errors import ArtifactError, EvergreenError
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.features.engines import spark_engine
from evergreen.ingest.log import ingest_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder = tmp_path_factory.mktemp("log")
    rows = "\n".join(f"{1_700_000_000 + 7200 * k},u{k % 3},i{k % 4},x" for k in range(40))
    (folder / "log.csv").write_text(f"t,u,i,c\n{rows}\n")
    mapping = Mapping.model_validate(
        {
            "name": "log",
            "kind": "interactions",
            "timestamp": {"column": "t", "unit": "s"},
            "columns": {"user_id": "u", "item_id": "i", "category": "c"},
        }
    )
    return ingest_log(mapping, str(folder / "log.csv"), folder / "snapshot")


def test_range_after_range_makes_whole_tables(log: Snapshot, tmp_path: Path) -> None:
    arguments = ["--snapshot", str(log.path), "--out", str(tmp_path / "t")]
    first = CliRunner().invoke(features, [*arguments, "--to", "2023-11-15"], catch_exceptions=False)
    assert "features of 2023-11-14 to 2023-11-15" in first.output
    with pytest.raises(ArtifactError, match="compute the other dates too"):
        FeatureTables.load(tmp_path / "t")
    rest = CliRunner().invoke(features, [*arguments, "--from", "2023-11-16"], catch_exceptions=False)
    assert "features of 2023-11-14 to 2023-11-18" in rest.output
    tables = FeatureTables.load(tmp_path / "t")
    assert all(f"{rows:,} rows" in rest.output for rows in tables.manifest.rows.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--master", "local[2]"], "are Spark's: add --engine spark"),
        (["--engine", "spark", "--memory-limit", "1GB"], "--memory-limit is DuckDB's"),
        (["--engine", "spark", "--spark-setting", "memory=8g"], "'memory=8g': write NAME=VALUE"),
        (["--from", "15.11.2023"], "'15.11.2023' does not match the format"),
    ],
)
def test_option_that_does_not_fit_is_named(log: Snapshot, tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(features, ["--snapshot", str(log.path), "--out", str(tmp_path / "t"), *options])
    assert result.exit_code == 2
    assert message in result.output


def test_date_outside_the_snapshot_is_named(log: Snapshot, tmp_path: Path) -> None:
    arguments = ["--snapshot", str(log.path), "--out", str(tmp_path / "t"), "--from", "2024-01-01"]
    with pytest.raises(ArtifactError, match="the snapshot's features are of 2023-11-14 to 2023-11-18"):
        CliRunner().invoke(features, arguments, catch_exceptions=False)


@pytest.mark.parametrize(("java_home", "where"), [(None, "on the PATH"), ("jdk", "under JAVA_HOME=")])
def test_machine_without_java_is_told_what_to_install(
    java_home: str | None, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyspark", reason="pyspark is not installed: uv sync --extra spark")
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if java_home:
        monkeypatch.setenv("JAVA_HOME", str(tmp_path / java_home))
    with pytest.raises(EvergreenError, match=f"no java {where}.*openjdk-17-jre-headless"), spark_engine():
        pass
