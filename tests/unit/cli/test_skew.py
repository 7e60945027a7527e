"""`evergreen skew`: what it says, and the exit code that a job goes by."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from evergreen.cli.skew import skew
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.impressions import impression_schema
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.serving.impression_sinks import ParquetSink

AT = datetime(2023, 11, 17, tzinfo=UTC)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `evergreen run` leaves of its feature tables: item i1 and its category, one event every 2 hours."""
    folder = tmp_path_factory.mktemp("run")
    rows = "\n".join(f"{1_700_000_000 + 7200 * k},u{k % 3},i{k % 4},c{k % 4}" for k in range(40))
    (folder / "log.csv").write_text(f"t,u,i,c\n{rows}\n")
    mapping = Mapping.model_validate(
        {
            "name": "log",
            "kind": "interactions",
            "timestamp": {"column": "t", "unit": "s"},
            "columns": {"user_id": "u", "item_id": "i", "category": "c"},
        }
    )
    snapshot = ingest_log(mapping, str(folder / "log.csv"), folder / "snapshot")
    build_feature_tables(snapshot, folder / "pipeline" / "training-1" / "build-feature-tables" / "feature_tables")
    return folder


def tables_of(run_folder: Path) -> Path:
    return next(run_folder.glob("pipeline/*/build-feature-tables/feature_tables"))


def log_impressions(folder: Path, categories: list[str], *, degraded: bool = False) -> str:
    """Items i0, i1, … as a server showed them, each with a category that it took for the item's."""
    feature = Feature(name="item_category", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.ITEM)
    n = len(categories)
    columns: dict[str, list[Any]] = {
        "request_id": ["r1"] * n,
        "event_timestamp": [AT] * n,
        "served_at": [AT] * n,
        "user_id": ["u0"] * n,
        "known_user": [True] * n,
        "model_version": ["m"] * n,
        "degraded": [degraded] * n,
        "sampling_rate": [1.0] * n,
        "item_id": [f"i{place}" for place in range(n)],
        "category": categories,
        "position": list(range(1, n + 1)),
        "score": [0.5] * n,
        "features": [{"item_category": category} for category in categories],
    }
    sink = ParquetSink(str(folder))
    sink.write("one", pa.table(columns, impression_schema([feature])))
    return str(folder)


def ask(*options: str) -> Result:
    return CliRunner().invoke(skew, options, catch_exceptions=False)


def test_equal_features_are_said_and_exit_is_0(run_folder: Path, tmp_path: Path) -> None:
    impressions = log_impressions(tmp_path / "log", ["c0", "c1"])
    out = tmp_path / "skew.json"
    for where in (["--run", str(run_folder)], ["--feature-tables", str(tables_of(run_folder))]):
        result = ask("--impressions", impressions, *where, "--out", str(out))
        assert result.exit_code == 0, result.output
        assert "1 requests, 2 shown items" in result.output and "no skew: 2 features are equal" in result.output
    assert json.loads(out.read_bytes())["features"]["item_category"]["equal"] == 2


def test_skew_is_shown_by_feature_with_examples_and_exit_is_1(run_folder: Path, tmp_path: Path) -> None:
    impressions = log_impressions(tmp_path / "log", ["c0", "stale"])
    out = tmp_path / "skew.json"
    result = ask("--impressions", impressions, "--run", str(run_folder), "--out", str(out))
    assert result.exit_code == 1
    assert "item_category: 1 of 2 rows differ (50.0%)" in result.output
    assert "request r1, item i1: served 'stale', offline 'c1'" in result.output
    assert "skew: 2 of 2 features differ" in result.output
    assert json.loads(out.read_bytes())["features"]["item_category"]["differing"] == 1


def test_nothing_to_compare_is_told_with_the_reason(run_folder: Path, tmp_path: Path) -> None:
    impressions = log_impressions(tmp_path / "log", ["c0"], degraded=True)
    with pytest.raises(ArtifactError, match=r"no impressions to compare \(left out: \{'degraded': 1\}\)"):
        ask("--impressions", impressions, "--run", str(run_folder), "--out", str(tmp_path / "skew.json"))


def test_folder_without_feature_tables_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{tmp_path}: no feature tables in it; give the OUT of `evergreen run`"):
        ask("--impressions", "x", "--run", str(tmp_path), "--out", str(tmp_path / "skew.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --feature-tables or --run"),
        (["--run", "a", "--feature-tables", "b"], "give either --feature-tables or --run"),
        (["--run", "a", "--from", "2026-01-01"], "has no offset from UTC"),
        (["--run", "a", "--out", "absent/skew.json"], "there is no folder absent"),
    ],
)
def test_options_that_do_not_fit_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    result = ask("--impressions", "x", "--out", str(tmp_path / "skew.json"), *options)
    assert result.exit_code == 2 and message in result.output
