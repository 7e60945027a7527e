"""The monitoring pipeline on a lived world: what is watched, what follows, and steps that are killed and run again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from kfp import dsl

from components.build_feature_tables import build_feature_tables
from components.build_training_set import build_training_set
from components.decide_retraining import decide_retraining
from components.filter_events import filter_events
from components.finish_run import finish_run
from components.gate_challenger import gate_challenger
from components.ingest_log import ingest_log
from components.join_outcomes import join_outcomes
from components.monitor_window import monitor_window
from components.release_model import release_model
from components.roll_back_model import roll_back_model
from components.start_run import start_run
from evergreen.cli import cli
from evergreen.contracts.decision import Verdict, Window
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.gate import GateReport
from evergreen.contracts.loop_state import LoopState, put
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.monitoring_report import MonitoringReport, SignalKind
from evergreen.contracts.outcomes import Outcomes
from evergreen.contracts.release import CanaryReport, Release, ReleaseKind
from evergreen.contracts.training_set import SPLITS, TrainingSet
from evergreen.features.store import FeatureStore
from evergreen.models.package import ModelPackage
from evergreen.monitoring import outcomes
from evergreen.monitoring.decision import decide
from evergreen.monitoring.watch import loop_history, watch
from evergreen.training.config import TrainingConfig
from evergreen.training.trainer import train_model
from tests.loop import DAY, LivedLoop, live_loop

POINTS = 20
EAGER = {"max_age": "PT12H", "min_new_rows": 500}  # calls for a retraining on the first evening
# No server to be told, and no cluster.
ONE_MACHINE = dict.fromkeys(
    ("server_url", "server_token_file", "inference_service", "namespace", "model_store", "model_store_path"), ""
)
_WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate"}


@dataclass(frozen=True)
class Made:
    """What the steps read: all of it is there before the first of them is killed."""

    root: Path
    state: Path
    """As it is before the evening."""
    impressions: str
    clicks: str
    as_of: datetime


def _artifact(kind: type[dsl.Artifact], path: Path) -> Any:
    return kind(path.name, uri=str(path))


def run_evening(made: Made, state: Path, out: Path) -> None:
    """The steps of an evening that write to the state, one after the other."""
    out.mkdir(exist_ok=True)
    at = {"state": str(state), "as_of": made.as_of.isoformat()}
    decision, rows = _artifact(dsl.Artifact, out / "decision"), _artifact(dsl.Dataset, made.root / "training_set")
    challenger, incumbent = (_artifact(dsl.Model, path) for path in (made.root / "challenger", out / "incumbent"))
    report = _artifact(dsl.Artifact, out / "report")
    join_outcomes.python_func(
        mapping="simulated",
        impressions=made.impressions,
        clicks=made.clicks,
        late_days=7,
        live=False,
        metrics=dsl.Metrics("metrics"),
        **at,
    )
    monitor_window.python_func(
        snapshot=_artifact(dsl.Dataset, made.root / "snapshot"),
        suspicious=_artifact(dsl.Dataset, made.root / "suspicious"),
        impressions=made.impressions,
        window_hours=24.0,
        batch_hours=24.0,
        live=False,
        report=report,
        page=_artifact(dsl.HTML, out / "page"),
        metrics=dsl.Metrics("metrics"),
        **at,
    )
    verdict = decide_retraining.python_func(report=report, training_days=28, config=EAGER, decision=decision, **at)
    assert verdict == "retrain"
    start_run.python_func(decision=decision, training_days=28, models=[], incumbent=incumbent, **at)
    passed = gate_challenger.python_func(
        training_set=rows,
        challenger=challenger,
        incumbent=incumbent,
        impressions=made.impressions,
        latency_budget_ms=1e6,
        seed=0,
        report=_artifact(dsl.Artifact, out / "gate"),
        metrics=dsl.Metrics("metrics"),
        **at,
    )
    assert passed
    released = release_model.python_func(
        training_set=rows,
        challenger=challenger,
        retriever=_artifact(dsl.Model, out / "no_retriever"),
        incumbent=incumbent,
        decision=decision,
        impressions=made.impressions,
        canary_requests=100,
        latency_budget_ms=1e6,
        **ONE_MACHINE,
        report=_artifact(dsl.Artifact, out / "canary"),
        **at,
    )
    assert released
    finish_run.python_func(**at)


def go_back(made: Made, state: Path, out: Path) -> None:
    """The step of the evening after, if the release turns out worse."""
    roll_back_model.python_func(
        decision=_artifact(dsl.Artifact, LoopState(state).decision(made.as_of)),
        reason="",
        state=str(state),
        as_of=(made.as_of + DAY).isoformat(),
        **ONE_MACHINE,
    )


def _child(
    steps: Callable[[Made, Path, Path], None], made: Made, state: Path, out: Path, kill_at: int, told: Any
) -> None:
    """Run some steps; at the `kill_at`-th write to the state the process is gone. Tells how many writes there were."""
    writes = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal writes
        if event == "open":
            path, _, flags = arguments
            is_write = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
        elif event in _WRITES:
            path, is_write = arguments[0], True
        else:
            return
        if is_write and str(state) in str(path):
            writes += 1
            if writes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        steps(made, state, out)
    told.put(writes)


def run_in_child(
    steps: Callable[[Made, Path, Path], None], made: Made, state: Path, out: Path, kill_at: int = 0
) -> int | None:
    """How many writes there were; None: it was killed."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "evergreen.monitoring.watch", "evergreen.training.trainer"])
    told = context.SimpleQueue()
    child = context.Process(target=_child, args=(steps, made, state, out, kill_at, told))
    child.start()
    child.join(120)
    if child.exitcode == -signal.SIGKILL:
        return None
    assert child.exitcode == 0
    return told.get()


def contents(state: Path) -> dict[str, str]:
    """Every file and link of a state by name, with a digest of what must be the same whenever it was written."""
    found = {}
    for path in sorted(state.rglob("*")):
        name = str(path.relative_to(state))
        if name.startswith("feature_store/") or path.is_dir():
            continue
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif name.startswith("gates/"):
            found[name] = json.dumps(json.loads(path.read_bytes()) | {"latency": None})  # another one each time
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> LivedLoop:
    """Three days with a model that has hardly learned anything, so that a fresh one is better."""
    hardly = dict.fromkeys(("learning_rate", "embedding_learning_rate", "bin_learning_rate"), 1e-6)
    return live_loop(tmp_path_factory.mktemp("lived"), days=3, max_epochs=1, **hardly)


@pytest.fixture(scope="module")
def made(lived: LivedLoop) -> Made:
    return prepare(lived, lived.root / "steps")


def prepare(lived: LivedLoop, root: Path) -> Made:
    """What the steps before and beside those of the state leave behind, and a challenger that passes."""
    root.mkdir()
    as_of = lived.evening(0)
    snapshot, suspicious, filtered = (root / name for name in ("snapshot", "suspicious", "filtered"))
    ingest_log.python_func(
        mapping="simulated",
        log_uri=str(lived.data),
        as_of=as_of.isoformat(),
        test_hours=24.0,
        snapshot=_artifact(dsl.Dataset, snapshot),
    )
    filter_events.python_func(
        snapshot=_artifact(dsl.Dataset, snapshot),
        false_positive_share=0.005,
        suspicious=_artifact(dsl.Dataset, suspicious),
        filtered=_artifact(dsl.Dataset, filtered),
        report=_artifact(dsl.HTML, root / "suspicious.html"),
        metrics=dsl.Metrics("metrics"),
    )
    build_feature_tables.python_func(
        snapshot=_artifact(dsl.Dataset, filtered),
        check_leakage=False,
        feature_tables=_artifact(dsl.Dataset, root / "tables"),
    )
    build_training_set.python_func(
        snapshot=_artifact(dsl.Dataset, filtered),
        feature_tables=_artifact(dsl.Dataset, root / "tables"),
        start="",
        leave_out=[],
        changed_at="",
        batch_hours=24.0,
        seed=0,
        training_set=_artifact(dsl.Dataset, root / "training_set"),
    )
    rows = TrainingSet.load(root / "training_set")
    config = TrainingConfig(model="logistic_regression", max_epochs=2, export_program=False)
    package = train_model(rows, root / "challenger", config=config)
    # Drawn, and seen, before the point at which a step is killed: servers and pages take most of an evening's time.
    state = lived.fresh_state(root / "state")
    put(
        state.canary(as_of),
        CanaryReport(challenger=package.version, champion=lived.package.version, num_requests=100, checks=()),
    )
    state.page(as_of).parent.mkdir()
    state.page(as_of).write_text("<html></html>")
    return Made(root, state.path, lived.impressions, lived.clicks, as_of)


@dataclass(frozen=True)
class Quiet:
    """An evening on which nothing was killed."""

    state: Path
    writes: int
    """That it took."""


@pytest.fixture(scope="module")
def quiet(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    folder = tmp_path_factory.mktemp("quiet")
    shutil.copytree(made.state, folder / "state", symlinks=True)
    writes = run_in_child(run_evening, made, folder / "state", folder / "out")
    assert writes is not None and writes > POINTS
    state = LoopState(folder / "state")
    assert [release.version for release in state.released()][1:] == [
        ModelPackage.load(made.root / "challenger").version
    ]
    assert [run.finished_at for run in state.runs()] == [made.as_of]
    return Quiet(state.path, writes)


def assert_same_after_a_kill(made: Made, quiet: Quiet, folder: Path, kill_at: int) -> None:
    shutil.copytree(made.state, folder / "state", symlinks=True)
    assert run_in_child(run_evening, made, folder / "state", folder / "out", kill_at) is None
    assert run_in_child(run_evening, made, folder / "state", folder / "out") is not None
    assert contents(folder / "state") == contents(quiet.state)
    assert len(LoopState(folder / "state").released()) == 2


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_evening_that_was_killed_ends_the_same(made: Made, quiet: Quiet, tmp_path: Path, part: float) -> None:
    assert_same_after_a_kill(made, quiet, tmp_path, 1 + int(part * (quiet.writes - 1)))


@pytest.mark.heavy
@pytest.mark.parametrize("point", range(POINTS))
def test_evening_that_was_killed_anywhere_ends_the_same(made: Made, quiet: Quiet, tmp_path: Path, point: int) -> None:
    """One point in each twentieth of the writes."""
    width = quiet.writes / POINTS
    kill_at = 1 + int(point * width + random.Random(point).random() * width)
    assert_same_after_a_kill(made, quiet, tmp_path, min(kill_at, quiet.writes))


def test_rollback_that_was_killed_goes_back_once(made: Made, quiet: Quiet, tmp_path: Path) -> None:
    shutil.copytree(quiet.state, tmp_path / "whole", symlinks=True)
    writes = run_in_child(go_back, made, tmp_path / "whole", tmp_path)
    assert writes is not None and writes > 2
    for kill_at in range(1, writes + 1):
        state = LoopState(tmp_path / f"killed-{kill_at}")
        shutil.copytree(quiet.state, state.path, symlinks=True)
        assert run_in_child(go_back, made, state.path, tmp_path, kill_at) is None
        assert run_in_child(go_back, made, state.path, tmp_path) is not None
        assert contents(state.path) == contents(tmp_path / "whole")
        assert [release.kind for release in state.released()] == [
            ReleaseKind.RELEASE,
            ReleaseKind.RELEASE,
            ReleaseKind.ROLLBACK,
        ]


def watch_evening(lived: LivedLoop, state: LoopState, day: int, **options: Any) -> MonitoringReport:
    evening = lived.evening(day)
    join(lived, state, evening)
    return watch(state, lived.impressions, lived.package, as_of=evening, window=DAY, page=False, **options)


def join(lived: LivedLoop, state: LoopState, as_of: datetime) -> None:
    mapping = Mapping.load("simulated")
    window = mapping.split.attribution_window
    outcomes.join_outcomes(lived.impressions, lived.clicks, state.outcomes, window=window, as_of=as_of, mapping=mapping)


def test_quality_is_compared_with_the_first_days_in_service_once_they_have_matured(
    lived: LivedLoop, tmp_path: Path
) -> None:
    state = lived.fresh_state(tmp_path / "state")
    reports = [watch_evening(lived, state, day) for day in range(3)]
    measured = [report.quality.model(lived.package.version) for report in reports if report.quality]
    assert measured[0].reference is None
    for day in (1, 2):
        assert measured[day].reference.source.startswith(f"first days in service, {lived.plan.date(0)} to ")
        assert measured[day].entropy_change.value is not None
    assert measured[2].figures.rows == pytest.approx(reports[2].rows, rel=0.05)
    assert reports[2].quality.new_matured_rows == pytest.approx(sum(report.rows for report in reports), rel=0.02)


def test_report_that_is_there_stays_and_its_page_can_follow(lived: LivedLoop, tmp_path: Path) -> None:
    state = lived.fresh_state(tmp_path / "state")
    first = watch_evening(lived, state, 0, suspicious_share=0.03)
    again = watch_evening(lived, state, 0, suspicious_share=0.5)
    assert again == first
    assert [s.value for s in again.signals_of(SignalKind.SUSPICIOUS)] == [0.03]


def test_model_without_a_reference_is_not_watched(lived: LivedLoop, tmp_path: Path) -> None:
    state = LoopState(tmp_path)
    with pytest.raises(ArtifactError, match="keep_reference before the model is released"):
        watch(state, lived.impressions, lived.package, as_of=lived.evening(0), window=DAY)


def test_new_release_is_compared_with_the_model_before(lived: LivedLoop, tmp_path: Path) -> None:
    """As if the package of the first day had replaced another on its second evening."""
    state = lived.fresh_state(tmp_path / "state")
    before = impressions_of(lived, tmp_path / "log", first_version="older-1", until=lived.evening(0))
    history = [
        Release(version="older-1", kind=ReleaseKind.RELEASE, released_at=lived.plan.date(0), reason="r", previous=None),
        Release(
            version=lived.package.version,
            kind=ReleaseKind.RELEASE,
            released_at=lived.evening(0),
            reason="r",
            previous="older-1",
        ),
    ]
    lines = "".join(release.model_dump_json() + "\n" for release in history)
    (state.releases / "history.jsonl").write_text(lines)
    shutil.copytree(state.package(lived.package.version), state.package("older-1"))
    evening = lived.evening(1)
    mapping = Mapping.load("simulated")
    outcomes.join_outcomes(
        before, lived.clicks, state.outcomes, window=mapping.split.attribution_window, as_of=evening, mapping=mapping
    )
    report = watch(state, before, lived.package, as_of=evening, window=DAY, page=False)
    found = report.quality.comparison(lived.package.version, "older-1")
    assert found is not None and not found.side_by_side
    assert found.against_rows > 1_000 and found.rows > 1_000
    assert report.quality.model("older-1") is None, "its day is not the window's"


def impressions_of(
    lived: LivedLoop, folder: Path, *, first_version: str, until: datetime, served_in_time: bool = False
) -> str:
    """The impression log, in which another model answered at first; with the world's clock for the server's own."""
    for file in Path(lived.impressions).rglob("*.parquet"):
        table = pq.read_table(file)
        is_first = pc.less(table["event_timestamp"], pa.scalar(until, table.schema.field("event_timestamp").type))
        versions = pc.if_else(is_first, first_version, table["model_version"])
        place = table.schema.get_field_index("model_version")
        out = folder / file.relative_to(lived.impressions)
        out.parent.mkdir(parents=True, exist_ok=True)
        table = table.set_column(place, table.schema.field(place), versions.cast(table.schema.field(place).type))
        if served_in_time:
            place = table.schema.get_field_index("served_at")
            table = table.set_column(place, table.schema.field(place), table["event_timestamp"])
        pq.write_table(table, out)
    return str(folder)


def test_server_in_real_time_has_old_impressions_unread_and_none_lost(lived: LivedLoop, tmp_path: Path) -> None:
    """The second join comes two days after the first, as when a run was missed."""
    live = impressions_of(lived, tmp_path / "log", first_version="older-1", until=lived.evening(0), served_in_time=True)
    found = {}
    for is_live in (False, True):
        state = LoopState(tmp_path / f"live-{is_live}")
        for day in (0, 2):
            join_outcomes.python_func(
                mapping="simulated",
                impressions=live,
                clicks=lived.clicks,
                state=str(state.path),
                as_of=lived.evening(day).isoformat(),
                late_days=0,
                live=is_live,
                metrics=dsl.Metrics("metrics"),
            )
        manifest = Outcomes.load(state.outcomes).manifest
        found[is_live] = [(r.date, r.rows, r.clicks) for r in manifest.latest()]
    assert found[True] == found[False]
    assert len(found[True]) == 3 and all(rows > 1_000 for _, rows, _ in found[True])


def test_loop_begins_with_what_a_run_left_behind(lived: LivedLoop, tmp_path: Path) -> None:
    run, state = tmp_path / "run", LoopState(tmp_path / "state")
    shutil.copytree(lived.package.path, run / "model")
    shutil.copytree(lived.state.feature_store, run / "feature_store")
    shutil.copytree(lived.training_set.path, run / "pipeline" / "training-1" / "build-training-set" / "training_set")
    arguments = ["monitor", "begin", str(run), "--state", str(state.path)]
    begun = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert f"{lived.package.version} serves from 2025-01-07 00:00:00 on" in begun.output
    assert state.reference(lived.package.version).is_file() and (state.feature_store / "items.parquet").is_file()
    assert (state.releases / "current" / "model.json").is_file()
    [release] = loop_history(state)
    assert release.train_rows == lived.package.info.train_rows and release.replaced is None
    twice = CliRunner().invoke(cli, arguments)
    assert "a loop has begun here" in str(twice.exception)


def test_run_learns_from_the_last_days_without_those_that_were_broken(
    made: Made, lived: LivedLoop, tmp_path: Path
) -> None:
    state = lived.fresh_state(tmp_path / "state")
    decision = decide(watch_evening(lived, state, 0), loop_history(state), as_of=made.as_of)
    broken = Window(start=made.as_of - 3 * DAY, end=made.as_of - 2 * DAY)
    decision.model_copy(update={"broken_windows": (broken,)}).write(tmp_path / "decision")
    started = start_run.python_func(
        decision=_artifact(dsl.Artifact, tmp_path / "decision"),
        state=str(state.path),
        as_of=made.as_of.isoformat(),
        training_days=5,
        models=[],
        incumbent=_artifact(dsl.Model, tmp_path / "incumbent"),
    )
    assert ModelPackage.load(tmp_path / "incumbent").version == lived.package.version
    assert started.models == ["logistic_regression"] and started.changed_at == ""
    assert [run.finished_at for run in state.runs()] == [None]
    build_training_set.python_func(
        snapshot=_artifact(dsl.Dataset, made.root / "filtered"),
        feature_tables=_artifact(dsl.Dataset, made.root / "tables"),
        start=started.start,
        leave_out=started.leave_out,
        changed_at=started.changed_at,
        batch_hours=24.0,
        seed=0,
        training_set=_artifact(dsl.Dataset, tmp_path / "rows"),
    )
    rows = TrainingSet.load(tmp_path / "rows")
    times = [time for split in SPLITS for time in rows.read(split, ["event_timestamp"])["event_timestamp"].to_pylist()]
    assert min(times) >= made.as_of - 5 * DAY
    assert not [time for time in times if broken.start <= time < broken.end]
    assert len({time.date() for time in times}) == 4


def run_command(lived: LivedLoop, state: LoopState, day: int, *options: str) -> str:
    arguments = ["monitor", "run", "--mapping", "simulated", "--state", str(state.path), "--seed", "1"]
    arguments += ["--data", str(lived.data), "--impressions", lived.impressions, "--clicks", lived.clicks]
    arguments += ["--as-of", lived.evening(day).isoformat(), *options]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False).output


@pytest.mark.slow
def test_quiet_window_is_watched_kept_and_told(lived: LivedLoop, tmp_path: Path) -> None:
    state = lived.fresh_state(tmp_path / "state")
    evening = lived.evening(0)
    printed = run_command(lived, state, 0)
    assert "2025-01-08 00:00:00  keep      No trigger is raised." in printed
    assert f"decision: {state.decision(evening)}" in printed
    assert "<html" in state.page(evening).read_text()[:5000].lower()
    [suspicious] = state.reports()[0].signals_of(SignalKind.SUSPICIOUS)
    assert suspicious.value is not None and suspicious.value < 0.05, "the filter's labels reach the monitors"
    [skew] = state.reports()[0].signals_of(SignalKind.SKEW)
    assert skew.value == 0 and skew.rows > 1_000, "what was served is what is known of that moment"
    assert state.runs() == [] and len(state.released()) == 1
    store = FeatureStore.open(state.feature_store)
    assert store.tables.manifest.snapshot_id != FeatureStore.open(lived.state.feature_store).tables.manifest.snapshot_id
    told = CliRunner().invoke(cli, ["monitor", "history", "--state", str(state.path)]).output
    assert told.startswith("2025-01-08 00:00:00  keep")
    replayed = CliRunner().invoke(cli, ["monitor", "replay", str(state.decision(evening))])
    assert replayed.exit_code == 0 and replayed.output.startswith("the same: keep")


@pytest.mark.heavy
def test_retraining_goes_past_gate_and_canary_to_users(lived: LivedLoop, tmp_path: Path) -> None:
    """The whole graph by kfp.local: sub-pipeline, conditions, and two servers for the canary."""
    state = lived.fresh_state(tmp_path / "state")
    thresholds = tmp_path / "thresholds.json"
    thresholds.write_text(json.dumps(EAGER))
    options = ("--decision-config", str(thresholds), "--latency-budget-ms", "5000", "--canary-requests", "120")
    printed = run_command(lived, state, 0, *options)
    before, after = state.released()
    assert before.version == lived.package.version == after.previous
    assert f"{after.version} serves, after {before.version}" in printed
    assert after.canary is not None and after.canary.passed and after.canary.num_requests == 120
    assert GateReport.read(state.gate(lived.evening(0))).passed
    assert [run.finished_at for run in state.runs()] == [lived.evening(0)]
    assert ModelPackage.load(state.releases / "current").version == after.version
    assert state.reference(after.version).is_file()
    # The evening after, the new model is what is watched.
    assert "2025-01-09 00:00:00" in run_command(lived, state, 1)
    assert [report.model_version for report in state.reports()] == [before.version, before.version]


def test_decision_that_comes_out_otherwise_is_told(lived: LivedLoop, tmp_path: Path) -> None:
    state = lived.fresh_state(tmp_path / "state")
    evening = lived.evening(0)
    decision = decide(watch_evening(lived, state, 0), loop_history(state), as_of=evening)
    tampered = decision.model_copy(update={"verdict": Verdict.RETRAIN, "reason": "because"})
    put(state.decision(evening), tampered)
    replayed = CliRunner().invoke(cli, ["monitor", "replay", str(state.decision(evening))])
    assert replayed.exit_code == 1
    assert "was: retrain: because" in replayed.output and "is:  keep: " in replayed.output
