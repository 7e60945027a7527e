"""`evergreen monitor`: the monitoring pipeline on this machine, its history, and each decision made again."""

from __future__ import annotations

import json
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from evergreen.cli.options import INSTANT
from evergreen.contracts.errors import ArtifactError, EvergreenError

_STATE = click.option(
    "--state", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the loop."
)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def monitor() -> None:
    """The loop: watch what a model served, decide, and retrain, release or roll back if it is called for."""


@monitor.command()
@click.argument("run", type=_FOLDER)
@_STATE
@click.option("--as-of", type=INSTANT, default=None, help="From when it serves.  [default: the end of its log]")
def begin(run: Path, state: Path, as_of: datetime | None) -> None:
    """Begin a loop with the champion of RUN, the output folder of `evergreen run`.

    Serve STATE/releases/current with --feature-store STATE/feature_store from then on.
    """
    from evergreen.contracts.loop_state import LoopState
    from evergreen.contracts.training_set import TrainingSet
    from evergreen.models.package import ModelPackage
    from evergreen.monitoring.watch import keep_reference
    from evergreen.release.store import ReleaseStore

    loop, package = LoopState(state), ModelPackage.load(run / "model")
    if loop.released():
        raise EvergreenError(f"{loop.releases}: a loop has begun here: name a new folder, or release by its pipeline")
    found = sorted(run.glob("pipeline/*/build-training-set/training_set"))
    if len(found) != 1:
        raise ArtifactError(f"{run}: {len(found)} training sets under pipeline/: is it the output of `evergreen run`?")
    keep_reference(loop, TrainingSet.load(found[0]), package)
    if not loop.feature_store.exists():
        shutil.copytree(run / "feature_store", loop.feature_store)
    done = ReleaseStore(loop.releases).release(
        package.path, package.version, as_of=as_of or package.info.as_of, reason="the first model of the loop"
    )
    click.echo(f"{done.version} serves from {done.released_at:%Y-%m-%d %H:%M:%S} on")
    click.echo(
        f"serve: evergreen serve --model {loop.releases / 'current'} --feature-store {loop.feature_store} "
        "--allow-reload --impressions DIR"
    )


@monitor.command("run", context_settings={"show_default": True})
@click.option("--mapping", "mapping_reference", required=True, help="A shipped mapping's name, or a TOML file.")
@click.option("--data", required=True, help="The click log, with what was served since: a path or an fsspec URL.")
@click.option("--impressions", required=True, help="The server's impression log: a folder or an fsspec URL.")
@click.option("--clicks", required=True, help="Clicks on what it served: a file, a folder or an fsspec URL.")
@_STATE
@click.option("--as-of", type=INSTANT, default=None, show_default="now", help="End of the window.")
@click.option("--window-hours", type=click.FloatRange(min=0, min_open=True), default=24.0, help="Its length.")
@click.option("--training-days", type=click.IntRange(min=1), default=28, help="That a training learns from.")
@click.option("--test-hours", type=click.FloatRange(min=0), default=24.0, help="Of these the newest, to test on.")
@click.option("--feature-batch-hours", type=click.FloatRange(min=0), default=24.0, help="0: features are streamed.")
@click.option("--late-days", type=click.IntRange(min=0), default=7, help="After them outcomes are final.")
@click.option("--models", default=None, show_default="the one that serves", help="Comma-separated names.")
@click.option("--decision-config", type=_FILE, default=None, help="JSON file of thresholds that are not the defaults.")
@click.option("--latency-budget-ms", type=click.FloatRange(min=0, min_open=True), default=50.0)
@click.option("--canary-requests", type=click.IntRange(min=1), default=500)
@click.option("--url", default="", help="Server that serves STATE/releases/current with --allow-reload.")
@click.option("--token-file", type=_FILE, default=None, help="Its bearer token.")
@click.option("--live", is_flag=True, help="The server's clock is the log's: old impressions need not be read.")
@click.option("--seed", type=int, default=0)
def run_window(
    mapping_reference: str,
    data: str,
    impressions: str,
    clicks: str,
    state: Path,
    as_of: datetime | None,
    models: str | None,
    decision_config: Path | None,
    url: str,
    token_file: Path | None,
    **settings: Any,
) -> None:
    """Watch the window that has just ended, and do what follows from it.

    Runs the same pipeline as a cluster does, by kfp.local. Artifacts and logs go to STATE/pipeline.
    """
    from evergreen.contracts.loop_state import LoopState, name_of
    from evergreen.contracts.mapping import Mapping

    started = time.perf_counter()
    Mapping.load(mapping_reference)  # tells what is wrong with it before seconds of imports
    loop = LoopState(state.resolve())
    moment = (as_of or datetime.now(UTC)).replace(microsecond=0)

    from evergreen.cli.run import mapping_text, model_names
    from pipelines.local import run_locally
    from pipelines.monitoring import monitoring_pipeline
    from pipelines.training import MODELS

    arguments = {
        "mapping": mapping_reference if mapping_reference in Mapping.shipped() else mapping_text(mapping_reference),
        **{
            name: _absolute(place)
            for name, place in (("log_uri", data), ("impressions", impressions), ("clicks", clicks))
        },
        "state": str(loop.path),
        "as_of": moment.isoformat(),
        "models": model_names(models, MODELS) if models else [],
        "decision_config": json.loads(decision_config.read_bytes()) if decision_config else {},
        "server_url": url,
        "server_token_file": str(token_file.resolve()) if token_file else "",
        "store_config": "feature_store.yaml",
        "inference_service": "",
        "model_store": "",
        **settings,
    }
    root = loop.path / "pipeline"
    root.mkdir(parents=True, exist_ok=True)

    def tell(line: str) -> None:
        # Not to sys.stdout, which is the log of the steps meanwhile.
        click.echo(f"[{time.perf_counter() - started:6.1f} s] {line}", file=sys.__stdout__)

    try:
        run_locally(monitoring_pipeline, arguments, root=root, log=root / f"{name_of(moment)}.log", on_progress=tell)
    except RuntimeError as error:
        raise EvergreenError(str(error)) from error
    click.echo()
    _echo(loop, moment)
    click.echo(f"report:   {loop.page(moment)}\ndecision: {loop.decision(moment)}")
    click.echo(f"took {time.perf_counter() - started:.0f} s")


@monitor.command()
@_STATE
def history(state: Path) -> None:
    """Show every decision, why, and what came of it."""
    from evergreen.contracts.loop_state import LoopState

    loop = LoopState(state)
    decisions = loop.decisions()
    for decision in decisions:
        _echo(loop, decision.as_of)
    if not decisions:
        click.echo(f"{state}: nothing was decided yet")


@monitor.command()
@click.argument("decision", type=_FILE)
@click.pass_context
def replay(context: click.Context, decision: Path) -> None:
    """Make the decision of a file again, from what the file holds. Exit code 1 if it comes out otherwise."""
    from evergreen.contracts.decision import RetrainDecision
    from evergreen.monitoring import decision as rules

    before, again = RetrainDecision.read(decision), rules.replay(decision)
    if again == before:
        click.echo(f"the same: {again.verdict.value}: {again.reason}")
        return
    click.echo(f"was: {before.verdict.value}: {before.reason}\nis:  {again.verdict.value}: {again.reason}")
    if (again.verdict, again.reason) == (before.verdict, before.reason):
        old, new = ({(t.name, t.subject): t for t in one.triggers} for one in (before, again))
        for key in sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
            click.echo(f"  {' of '.join(filter(None, key))}: was {old.get(key)}, is {new.get(key)}")
    context.exit(1)


def _echo(loop: Any, as_of: datetime) -> None:
    """A decision as one line, and what came of it as others."""
    from evergreen.contracts.decision import RetrainDecision
    from evergreen.contracts.gate import GateReport
    from evergreen.contracts.release import CanaryReport, ReleaseKind

    decision = RetrainDecision.read(loop.decision(as_of))
    click.echo(f"{as_of:%Y-%m-%d %H:%M:%S}  {decision.verdict.value:<8}  {decision.reason}")
    for note in decision.investigate:
        click.echo(f"    look into: {note}")
    if loop.gate(as_of).is_file():
        gate = GateReport.read(loop.gate(as_of))
        click.echo(f"    gate:   {'passed' if gate.passed else 'refused'} {gate.challenger}: {gate.reason}")
    if loop.canary(as_of).is_file():
        canary = CanaryReport.read(loop.canary(as_of))
        words = canary.failures if not canary.passed else f"{canary.num_requests} requests"
        words += f" ({canary.way})" if canary.way else ""
        click.echo(f"    canary: {'passed' if canary.passed else 'taken back'} {canary.challenger}: {words}")
    for release in loop.released():
        if release.released_at == as_of:
            verb = "serves again" if release.kind is ReleaseKind.ROLLBACK else "serves"
            click.echo(f"    {release.version} {verb}, after {release.previous}")


def _absolute(place: str) -> str:
    """Steps run in folders of their own."""
    return place if "://" in place else str(Path(place).resolve())
