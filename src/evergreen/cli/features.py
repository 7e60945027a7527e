"""`evergreen features`: feature tables by date, on DuckDB or Spark; all of them, or a range of dates anew."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import click

_DATE = click.DateTime(formats=["%Y-%m-%d"])


@click.command()
@click.option("--snapshot", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the feature tables."
)
@click.option("--engine", type=click.Choice(["duckdb", "spark"]), default="duckdb", show_default=True)
@click.option("--from", "first", type=_DATE, help="First date to compute.  [default: of the first event]")
@click.option("--to", "last", type=_DATE, help="Last date to compute.  [default: of the snapshot's as_of]")
@click.option("--memory-limit", help="DuckDB spills to disk beyond it.  [default: 4GB]")
@click.option("--master", help="Spark's master, e.g. local[2].  [default: spark-submit's, or all cores here]")
@click.option(
    "--spark-setting",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="One of Spark's own settings; may be repeated: spark.driver.memory=8g",
)
def features(
    snapshot: Path,
    out: Path,
    engine: str,
    first: datetime | None,
    last: datetime | None,
    memory_limit: str | None,
    master: str | None,
    settings: Sequence[str],
) -> None:
    """Compute the feature tables of a snapshot, as Parquet by date.

    Repeated for a range of dates, it replaces these dates and no other. What a range holds does not depend on later
    events: it comes from the whole history before it.
    """
    if engine == "duckdb" and (master or settings):
        raise click.UsageError("--master and --spark-setting are Spark's: add --engine spark")
    if engine == "spark" and memory_limit:
        raise click.UsageError("--memory-limit is DuckDB's: write --spark-setting spark.driver.memory=8g")
    spark_settings = dict(_setting(entry) for entry in settings)

    from evergreen.contracts.snapshot import Snapshot
    from evergreen.features.engines import Engine, duckdb_engine, spark_engine
    from evergreen.features.partitions import build_feature_partitions

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("evergreen").setLevel(logging.INFO)
    log = Snapshot.load(snapshot)
    with ExitStack() as stack:
        runs: Engine
        if engine == "spark":
            runs = stack.enter_context(spark_engine(master=master, settings=spark_settings))
        else:
            spill = stack.enter_context(tempfile.TemporaryDirectory(prefix="evergreen-duckdb-"))
            runs = stack.enter_context(duckdb_engine(Path(spill), memory_limit=memory_limit or "4GB"))
        tables = build_feature_partitions(
            log, out, engine=runs, first=first.date() if first else None, last=last.date() if last else None
        )
    for name, rows in tables.manifest.rows.items():
        click.echo(f"  {name:<24} {rows:>12,} rows")
    click.echo(f"{tables.path}: features of {tables.manifest.partitions}")


def _setting(entry: str) -> tuple[str, str]:
    name, separator, value = entry.partition("=")
    if not separator or not name.startswith("spark."):
        raise click.UsageError(f"--spark-setting {entry!r}: write NAME=VALUE, e.g. spark.driver.memory=8g")
    return name, value
