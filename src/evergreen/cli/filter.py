"""`evergreen filter`: label the events of a snapshot that no person made."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from evergreen.fraud.filter import FilterConfig


@click.command("filter")
@click.argument("snapshot", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the labels.")
@click.option(
    "--filtered",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the snapshot without the labelled events.  [default: none is written]",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="How strict to be, as TOML: false_positive_share, window_days, min_events, and the rules' [limits].",
)
def filter_command(snapshot: Path, out: Path, filtered: Path | None, config_file: Path | None) -> None:
    """Judge the events of SNAPSHOT by rules and by a detector, and write labels with reasons and a report.

    Nothing is deleted: SNAPSHOT stays as it is.
    """
    config = filter_config(config_file)

    from evergreen.contracts.snapshot import Snapshot
    from evergreen.fraud.filter import filter_events, without_suspicious

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log = Snapshot.load(snapshot)
    labels = filter_events(log, out, config=config)
    manifest = labels.manifest
    click.echo(
        f"{manifest.suspicious_events:,} of {manifest.events:,} events, by {manifest.suspicious_users:,} of "
        f"{manifest.users:,} users, are suspicious"
    )
    for reason, count in manifest.reasons.items():
        click.echo(f"  {reason:<16} {count.events:>12,} events {count.users:>10,} users")
    click.echo(f"labels: {out}; report: {out / labels.REPORT}")
    if filtered is not None:
        rows = without_suspicious(log, labels, filtered).manifest.rows
        click.echo(f"snapshot without them: {filtered}, {rows:,} events")


def filter_config(config_file: Path | None) -> FilterConfig:
    """Read how strict the filter is; None: the defaults.

    Raises:
        click.UsageError: the file is not TOML, or a setting does not exist or is out of its range; names it.
    """
    from pydantic import ValidationError

    from evergreen.fraud.filter import FilterConfig

    if config_file is None:
        return FilterConfig()
    try:
        return FilterConfig.model_validate(tomllib.loads(config_file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--config {config_file}: not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            table = FilterConfig.model_fields if len(first["loc"]) == 1 else _limit_names()
            raise click.UsageError(
                f"--config {config_file}: {name}: no such setting; choose from {', '.join(table)}"
            ) from error
        raise click.UsageError(f"--config {config_file}: {name}={first['input']!r}: {first['msg'].lower()}") from error


def _limit_names() -> list[str]:
    from evergreen.fraud.rules import Limits

    return list(Limits.model_fields)
