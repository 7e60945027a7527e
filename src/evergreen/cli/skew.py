"""`evergreen skew`: were the features that a server scored with those that training would have had?"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

import click

from evergreen.cli.options import INSTANT
from evergreen.contracts.errors import ArtifactError

_SHOWN_EXAMPLES = 2


@click.command()
@click.option("--impressions", required=True, help="The log of a server: a folder or an fsspec URL.")
@click.option("--feature-tables", type=click.Path(path_type=Path), help="Feature tables to compare with …")
@click.option("--run", "run_folder", type=click.Path(path_type=Path), help="… or the OUT of a run that made some.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON file for the whole report."
)
@click.option("--from", "start", type=INSTANT, help="Leave aside what was served before.")
@click.option("--to", "end", type=INSTANT, help="Leave aside what was served then and later.")
@click.option(
    "--known-at",
    type=INSTANT,
    help="Compare with what was stored then, e.g. the last materialization.  [default: at each request's time]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Up to which two numbers are equal.",
)
def skew(
    impressions: str,
    feature_tables: Path | None,
    run_folder: Path | None,
    out: Path,
    start: datetime | None,
    end: datetime | None,
    known_at: datetime | None,
    tolerance: float,
) -> None:
    """Compare the features in an impression log with the offline store's.

    Exits with 1 if any feature differs: the model was then asked about other values than it learned from.
    """
    if (feature_tables is None) == (run_folder is None):
        raise click.UsageError("give either --feature-tables or --run")
    if not out.parent.is_dir():
        raise click.UsageError(f"--out {out}: there is no folder {out.parent}")

    from evergreen.contracts.feature_tables import FeatureTables
    from evergreen.monitoring.skew import check_skew

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    tables = FeatureTables.load(feature_tables if feature_tables is not None else _tables_of(run_folder))
    logging.getLogger("evergreen.monitoring.skew").setLevel(logging.ERROR)  # what it would say is said below
    report = check_skew(impressions, tables, out, start=start, end=end, known_at=known_at, tolerance=tolerance)

    click.echo(f"{report.requests:,} requests, {report.rows:,} shown items, {report.first} to {report.last}")
    for reason, rows in report.left_out.items():
        click.echo(f"  left out: {rows:,} rows, {reason}")
    for name, reason in report.not_compared.items():
        click.echo(f"  not compared: {name}: {reason}")
    for name in report.differing:
        feature = report.features[name]
        click.echo(f"  {name}: {feature.differing:,} of {feature.rows:,} rows differ ({feature.share:.1%})")
        for example in feature.examples[:_SHOWN_EXAMPLES]:
            click.echo(
                f"    request {example.request_id}, item {example.item_id}: "
                f"served {example.served!r}, offline {example.offline!r}"
            )
    click.echo(f"report: {out}")
    if not report.is_clean:
        click.echo(f"skew: {len(report.differing)} of {len(report.features)} features differ")
        raise SystemExit(1)
    click.echo(f"no skew: {len(report.features)} features are equal in every row")


def _tables_of(run: Path | None) -> Path:
    """The feature tables of a run; of the last one, where the folder holds several."""
    found = sorted(Path(run or "").glob("pipeline/*/build-feature-tables/feature_tables"))
    if not found:
        raise ArtifactError(f"{run}: no feature tables in it; give the OUT of `evergreen run`, or --feature-tables")
    return found[-1]
