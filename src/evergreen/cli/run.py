"""`evergreen run`: the training pipeline on this machine, and a first question to the model that it chose."""

from __future__ import annotations

import json
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from evergreen.cli.options import INSTANT
from evergreen.cli.recommend import echo_recommendations
from evergreen.contracts.errors import EvergreenError
from evergreen.contracts.mapping import Mapping

_MARKER = ".evergreen-run"


@click.command()
@click.option("--mapping", "mapping_reference", required=True, help="A shipped mapping's name, or a TOML file.")
@click.option("--data", required=True, help="The log: a file, a folder, or an fsspec URL.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--as-of", type=INSTANT, default=None, help="Read the log up to this time only.  [default: all of it]")
@click.option("--models", default=None, help="Comma-separated names.  [default: all models]")
@click.option("--latency-budget-ms", type=click.FloatRange(min=0, min_open=True), default=50.0, show_default=True)
@click.option(
    "--feature-batch-hours",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="How often serving features are made; 0: streamed.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--ask/--no-ask", default=True, show_default=True, help="Serve the champion and ask it at the end.")
def run(
    mapping_reference: str,
    data: str,
    out: Path,
    as_of: datetime | None,
    models: str | None,
    latency_budget_ms: float,
    feature_batch_hours: float,
    seed: int,
    ask: bool,
) -> None:
    """Go from a click log to a served recommendation.

    Runs the same pipeline as a cluster does, by kfp.local. OUT gets summary.json, report.html, drift.html,
    suspicious.html, the champion's package (model/), the two towers that find candidates for it, if they were trained
    (retriever/), its features (feature_store/) and every artifact (pipeline/).
    """
    start = time.perf_counter()
    mapping = Mapping.load(mapping_reference)
    click.echo(f"mapping {mapping.name}: a log of {mapping.kind}")

    from pipelines.local import run_locally
    from pipelines.training import MODELS, training_pipeline

    arguments: dict[str, Any] = {
        "mapping": mapping_reference if mapping_reference in Mapping.shipped() else mapping_text(mapping_reference),
        "log_uri": data if "://" in data else str(Path(data).resolve()),
        "as_of": as_of.isoformat() if as_of else "",
        "models": model_names(models, MODELS),
        "latency_budget_ms": latency_budget_ms,
        "feature_batch_hours": feature_batch_hours,
        "seed": seed,
        # No loop and no cluster: the artifacts are the end of it.
        "state": "",
        "store_config": "feature_store.yaml",
        "server_token_file": "",
        "inference_service": "",
        "model_store": "",
    }
    _claim(out)

    def tell(line: str) -> None:
        click.echo(f"[{time.perf_counter() - start:6.1f} s] {line}", file=sys.__stdout__)

    try:
        outputs = run_locally(
            training_pipeline, arguments, root=out.resolve() / "pipeline", log=out / "run.log", on_progress=tell
        )
    except RuntimeError as error:
        raise EvergreenError(str(error)) from error
    summary = _collect(outputs, out, wall_seconds=time.perf_counter() - start)
    _echo_summary(summary)
    if ask:
        _ask(out, datetime.fromisoformat(summary["snapshot"]["as_of"]))
    click.echo(f"\nreport:  {out / 'report.html'}\nsummary: {out / 'summary.json'}")
    click.echo(f"serve:   evergreen serve --model {out / 'model'} --port 8080")
    click.echo(f"took {time.perf_counter() - start:.0f} s")


def mapping_text(reference: str) -> str:
    """The TOML text of a mapping file: a step on another machine cannot read this machine's file."""
    import fsspec

    with fsspec.open(reference, "rt", encoding="utf-8") as file:
        return str(file.read()) + "\n"


def model_names(chosen: str | None, known: list[str]) -> list[str]:
    """Names of an option, comma-separated; all that are known where it is not given."""
    names = [name.strip() for name in chosen.split(",") if name.strip()] if chosen else list(known)
    for name in names:
        if name not in known:
            raise click.UsageError(f"--models {name!r}: no such model; choose among {', '.join(known)}")
    if not names or len(set(names)) != len(names):
        raise click.UsageError(f"--models {chosen!r}: name at least one model, each once")
    return names


def _claim(out: Path) -> None:
    """Make `out` ours: new, empty, or the folder of an earlier run, whose results are removed."""
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise click.UsageError(f"--out {out}: the folder holds something else; name a new or empty one")
    if out.exists():
        for old in out.iterdir():
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


def _collect(outputs: dict[str, Any], out: Path, *, wall_seconds: float) -> dict[str, Any]:
    """Put what a person looks for at the top of the output folder."""
    shutil.copytree(outputs["champion"].path, out / "model")
    if any(Path(outputs["retriever"].path).glob("*")):  # nothing where two_tower was not trained
        shutil.copytree(outputs["retriever"].path, out / "retriever")
    shutil.copytree(outputs["feature_store"].path, out / "feature_store")
    shutil.copyfile(outputs["report"].path, out / "report.html")
    shutil.copyfile(outputs["drift_report"].path, out / "drift.html")
    shutil.copyfile(outputs["filter_report"].path, out / "suspicious.html")
    summary: dict[str, Any] = json.loads(Path(outputs["summary"].path).read_bytes())
    compute = sum(step["compute_seconds"] for step in summary["steps"])
    summary["pipeline"] = {"wall_seconds": round(wall_seconds, 1), "compute_seconds": round(compute, 1)}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _echo_summary(summary: dict[str, Any]) -> None:
    click.echo()
    primary = summary["primary_metric"]
    for name, model in summary["models"].items():
        estimate, latency = model["metrics"].get(primary), model["latency"]
        figures = _figures(estimate) if estimate else "not measured"
        speed = f"p99 {latency['p99_ms']:.1f} ms for {latency['rows']} candidates" if latency else ""
        mark = "*" if name == summary["champion"]["model"] else " "
        click.echo(f" {mark} {name:<22} {primary} {figures:<26} {speed}")
    click.echo(f"champion: {summary['champion']['reason']}\n")


def _figures(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return str(estimate["reason"])
    if estimate["low"] is None:
        return f"{estimate['value']:.4f}"
    return f"{estimate['value']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}]"


def _ask(out: Path, as_of: datetime) -> None:
    """Serve the champion as `evergreen serve` does, and ask it as `evergreen recommend` does."""
    from evergreen.serving.client import RecommenderClient
    from evergreen.serving.process import served

    with served(out / "model", log=out / "serve.log") as url:
        client = RecommenderClient(url)
        for user_id in _latest_users(out / "feature_store" / "data" / "user_activity.parquet", count=2):
            echo_recommendations(client.recommend(user_id, k=5, event_timestamp=as_of))


def _latest_users(user_activity: Path, *, count: int) -> list[str | None]:
    """The users who were active last; for a log without users, nobody in particular."""
    import pyarrow.parquet as pq

    table = pq.read_table(user_activity, columns=["user_id", "event_timestamp"])
    users = table.sort_by([("event_timestamp", "descending"), ("user_id", "ascending")])["user_id"].unique().to_pylist()
    return users[:count] or [None]
