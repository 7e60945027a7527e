"""`evergreen train`: one model from a training set, on this machine or as one of the processes of `torchrun`."""

from __future__ import annotations

import difflib
import logging
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from evergreen.models.package import ModelPackage
    from evergreen.training.config import TrainingConfig

_BARE_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_FIGURES = "validation_"


@click.command()
@click.argument("training_set", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default=None, help="Name of the model.  [default: the configuration's, or deepfm]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the package.")
@click.option(
    "--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings, as TOML."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting, its value as TOML; wins over --config. May be repeated: hyperparameters.hidden=[64,32]",
)
@click.option("--seed", type=click.IntRange(min=0), default=None, help="[default: the configuration's, or 0]")
@click.option(
    "--warm-start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="Package of the same model, whose weights are the start.",
)
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="File to go on from after a kill; written while training, removed at the end.",
)
def train(
    training_set: Path,
    model: str | None,
    out: Path,
    config_file: Path | None,
    settings: Sequence[str],
    seed: int | None,
    warm_start: Path | None,
    checkpoint: Path | None,
) -> None:
    """Train one model on TRAINING_SET and write its package.

    On several cores or GPUs: torchrun --nproc-per-node 2 --no-python evergreen train ...
    """
    named = {name: value for name, value in (("model", model), ("seed", seed)) if value is not None}
    config = training_config(config_file, settings, named)

    from evergreen.contracts.training_set import TrainingSet
    from evergreen.models.package import ModelPackage
    from evergreen.training.trainer import train_model

    is_first = int(os.environ.get("RANK", "0")) == 0  # torchrun's; one voice is enough
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("evergreen").setLevel(logging.INFO if is_first else logging.ERROR)
    package = train_model(
        TrainingSet.load(training_set),
        out,
        config=config,
        warm_start=ModelPackage.load(warm_start) if warm_start is not None else None,
        checkpoint=checkpoint,
    )
    if is_first:
        _echo(package)


def training_config(config_file: Path | None, settings: Sequence[str], named: Mapping[str, Any]) -> TrainingConfig:
    """Put a configuration together.

    Args:
        config_file: TOML with any of the settings; None: the defaults.
        settings: `key=value` each, with dots in the key for what is nested; win over the file.
        named: settings by name; win over both.

    Raises:
        click.UsageError: the file or a value is not TOML, or there is no such setting or value; names the setting,
            where it came from, and the nearest ones that exist.
    """
    from pydantic import ValidationError

    from evergreen.training.config import TrainingConfig

    values: dict[str, Any] = {}
    if config_file is not None:
        try:
            values = tomllib.loads(config_file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--config {config_file}: not TOML: {error}") from error
    keys: list[list[str]] = []
    for entry in settings:
        key, value = _parse(entry)
        _put(values, key, value, entry)
        keys.append(key)
    values |= named
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        given = any(all(a == b for a, b in zip(place, key, strict=False)) for key in keys)
        origin = "--set" if given else f"--{place[0]}" if place[0] in named else f"--config {config_file}:"
        raise click.UsageError(f"{origin} {_reason(first, place)}") from error


def _parse(entry: str) -> tuple[list[str], Any]:
    key, separator, text = entry.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise click.UsageError(f"--set {entry!r}: write KEY=VALUE, e.g. --set max_epochs=3")
    text = text.strip()
    try:
        return parts, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if _BARE_WORD.fullmatch(text):  # quotes within quotes are a nuisance in a shell
            return parts, text
        raise click.UsageError(
            f"--set {entry!r}: the value is not TOML ({error}); write e.g. 3, 0.1, true, [64,32] or a word"
        ) from error


def _put(values: dict[str, Any], key: Sequence[str], value: Any, entry: str) -> None:
    """Set a nested value, in place."""
    for part in key[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise click.UsageError(f"--set {entry!r}: {part} is not a table: it has no settings of its own")
    values[key[-1]] = value


def _reason(error: ErrorDetails, place: Sequence[str]) -> str:
    """What is wrong with a setting, and what may be meant."""
    if error["type"] == "extra_forbidden":
        return f"{'.'.join(place)}: there is no such setting; {_nearest(place)}"
    return f"{'.'.join(place)}={error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _nearest(place: Sequence[str]) -> str:
    """The settings whose names are most like that at `place`, by their full names; else all beside it."""
    from evergreen.contracts.artifact import JsonModel
    from evergreen.models.encoder_config import EncoderConfig, FieldLimits
    from evergreen.training.config import TrainingConfig

    inside = ".".join(place[:-1])
    tables: dict[str, type[JsonModel]] = {"": TrainingConfig, "encoder": EncoderConfig}
    beside = tables.get(inside, FieldLimits).model_fields
    names = {f"{inside}.{name}" if inside else name: name for name in beside}
    if not inside:  # a word that belongs into a table
        names |= {f"encoder.{name}": name for name in EncoderConfig.model_fields}
    close = difflib.get_close_matches(place[-1], names.values(), n=3)
    found = [full for full, name in names.items() if name in close]
    return f"did you mean {' or '.join(found)}?" if found else f"choose from {', '.join(names)}"


def _echo(package: ModelPackage) -> None:
    click.echo(f"\n{package.version}")
    for name, value in package.metrics.items():
        if name.startswith(_FIGURES) and isinstance(value, int | float):
            click.echo(f"  {name:<36} {value:.5g}")
    click.echo(f"package: {package.path}")
