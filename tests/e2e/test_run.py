"""The main job as a user runs it: from a log on disk to the served model's answer, in one command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evergreen.contracts.snapshot import Snapshot
from evergreen.models.package import ModelPackage

pytestmark = pytest.mark.slow

SIMULATE = ["--num-users", "150", "--num-items", "60", "--num-days", "8", "--events-per-day", "1500", "--seed", "5"]

MODELS = "popularity,logistic_regression,two_tower,deepfm,transformer"


def _evergreen(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evergreen.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("e2e") / "log"
    assert _evergreen("simulate", "log", "--out", str(out), *SIMULATE).returncode == 0
    return out


@pytest.fixture(scope="module")
def done(log: Path) -> tuple[Path, str]:
    out = log.parent / "run"
    ran = _evergreen("run", "--mapping", "simulated", "--data", str(log), "--out", str(out), "--models", MODELS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out, ran.stdout


@pytest.fixture(scope="module")
def summary(done: tuple[Path, str]) -> dict:
    return json.loads((done[0] / "summary.json").read_text())


def test_the_run_ends_with_recommendations_and_the_path_of_the_report(done: tuple[Path, str], summary: dict) -> None:
    out, printed = done
    assert f"model {summary['champion']['version']}" in printed
    assert printed.count("p = 0.") >= 5
    assert f"report:  {out / 'report.html'}" in printed


def test_the_summary_tells_snapshot_and_splits(done: tuple[Path, str], summary: dict) -> None:
    suspicious = sum(summary["snapshot"]["left_out"].values())
    assert summary["snapshot"]["rows"] + suspicious == 8 * 1500
    assert 0 < suspicious < 0.1 * 8 * 1500, "the simulated log has a crawler and a silent bot"
    assert len(summary["snapshot"]["id"]) == 64
    assert summary["splits"]["train"]["end"] < summary["splits"]["validation"]["start"]
    assert summary["splits"]["validation"]["end"] < summary["splits"]["test"]["start"]
    assert summary["embargo_seconds"] == 600


def test_the_summary_tells_every_model_with_intervals_and_latency(summary: dict) -> None:
    models = summary["models"]
    assert set(models) == {"base_rate", "popularity", "logistic_regression", "two_tower", "deepfm", "transformer"}
    for name, model in models.items():
        for metric in ("log_loss", "normalized_entropy"):
            estimate = model["metrics"][metric]
            assert estimate["low"] <= estimate["value"] <= estimate["high"], f"{name} {metric}"
        if name != "base_rate":
            assert model["latency"]["p50_ms"] <= model["latency"]["p99_ms"]
    assert summary["champion"]["model"] in models
    assert summary["champion"]["reason"]


def test_the_summary_tells_time_and_memory_of_each_step(summary: dict) -> None:
    steps = {step["step"] for step in summary["steps"]}
    assert {"ingest_log", "build_feature_tables", "build_training_set", "evaluate_models", "report_drift"} <= steps
    assert {"materialize_features", "train_model[deepfm]", "train_model[popularity]"} <= steps
    for step in summary["steps"]:
        assert step["wall_seconds"] >= step["compute_seconds"] > 0
        assert step["peak_memory_mb"] > 10


def test_what_a_person_looks_for_lies_on_top(done: tuple[Path, str], summary: dict) -> None:
    out, _ = done
    assert "<html" in (out / "report.html").read_text()[:500].lower()
    assert "<html" in (out / "drift.html").read_text()[:5000].lower()
    assert ModelPackage.load(out / "model").version == summary["champion"]["version"]
    assert ModelPackage.load(out / "retriever").info.name == "two_tower"
    assert "<html" in (out / "suspicious.html").read_text()[:500].lower()
    (snapshot,) = (out / "pipeline").glob("*/filter-events/filtered")
    assert Snapshot.load(snapshot, verify=True).id == summary["snapshot"]["id"]


@pytest.mark.heavy
def test_a_second_run_over_one_model_gives_the_same_snapshot_and_package(
    done: tuple[Path, str], summary: dict, log: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    ran = _evergreen(
        "run",
        "--mapping",
        "simulated",
        "--data",
        str(log),
        "--out",
        str(out),
        "--models",
        "logistic_regression",
        "--no-ask",
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    again = json.loads((out / "summary.json").read_text())
    assert again["snapshot"]["id"] == summary["snapshot"]["id"]
    assert again["models"]["logistic_regression"] | {"latency": None, "against_champion": None} == (
        summary["models"]["logistic_regression"] | {"latency": None, "against_champion": None}
    )


def test_a_log_that_does_not_fit_stops_with_a_sentence(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("when,who,what\n2025-01-01T00:00:00Z,u1,i1\n")
    mapping = tmp_path / "mapping.toml"
    mapping.write_text(
        'name = "bad"\nkind = "interactions"\ntimestamp = { column = "whem" }\n'
        'columns = { user_id = "who", item_id = "what" }\n'
    )
    ran = _evergreen("run", "--mapping", str(mapping), "--data", str(log), "--out", str(tmp_path / "out"))
    assert ran.returncode == 1
    assert "whem" in ran.stderr
    assert "when" in ran.stderr
    assert "Traceback" not in ran.stderr
