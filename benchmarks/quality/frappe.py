"""Frappe_x1: models of our registry on the splits that published results were made on, mean of five seeds.

    python benchmarks/quality/frappe.py --train train.csv --valid valid.csv --test test.csv --out frappe.md

Each row of frappe.json is a run: a name and a TrainingConfig. The run with the best mean AUC on validation is the best
single model; test rows choose nothing. See README.md beside this file for where to get the data and published figures.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hardware import hardware
from loaders import LabelledRows, load_labelled_rows

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import EvergreenError, InputError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.metrics.binary import auc, log_loss
from evergreen.models.base import score_rows
from evergreen.models.calibration import fit_platt
from evergreen.models.encoding import Encoder
from evergreen.models.registry import build_model, model_config
from evergreen.training.config import TrainingConfig
from evergreen.training.fitting import Examples, fit_by_gradient

logger = logging.getLogger(__name__)

RUNS = Path(__file__).parent / "frappe.json"
PUBLISHED = (
    ("DeepFM (BARS, mean of 5)", 0.9839, 0.1495),
    ("FinalMLP (BARS)", 0.9861, 0.1484),
    ("FinalNet with 2 blocks (BARS)", 0.9857, 0.1311),
    ("goal, DeepFM", 0.9842, math.nan),
    ("goal, best single model", 0.9861, 0.1311),
)


class Run(JsonModel):
    """A model to train."""

    name: str
    training: TrainingConfig


@dataclass(frozen=True)
class Result:
    """Figures of one run with one seed; log loss on test before and after calibration on validation."""

    run: str
    seed: int
    validation_auc: float
    test_auc: float
    raw_log_loss: float
    log_loss: float
    seconds: float
    steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in ("train", "valid", "test"):
        parser.add_argument(f"--{split}", type=Path, required=True, help="libfm lines or CSV with the label first")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file for the results")
    parser.add_argument("--runs", type=Path, default=RUNS, help="JSON list of runs")
    parser.add_argument("--only", nargs="*", help="names of the runs to make; all by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    runs = [Run.model_validate(entry) for entry in json.loads(arguments.runs.read_text())]
    runs = [run for run in runs if arguments.only is None or run.name in arguments.only]

    splits = [load_labelled_rows(path) for path in (arguments.train, arguments.valid, arguments.test)]
    check_columns(splits, [arguments.train, arguments.valid, arguments.test])
    results = []
    for run in runs:
        encoder, examples = encode(splits, run.training)
        for seed in range(arguments.seeds):
            results.append(train(run, seed, encoder, examples))
            logger.info("%s", results[-1])
            arguments.out.write_text(report(results, splits, threads=arguments.threads))
    print(arguments.out.read_text())


def check_columns(splits: Sequence[LabelledRows], paths: Sequence[Path]) -> None:
    """Raise InputError unless all files have the columns of the first."""
    expected = splits[0].features.column_names
    for split, path in zip(splits, paths, strict=True):
        if split.features.column_names != expected:
            raise InputError(
                f"{path}: features {', '.join(split.features.column_names)}, but {paths[0]} has {', '.join(expected)}: "
                "give files of one format"
            )


def encode(splits: Sequence[LabelledRows], config: TrainingConfig) -> tuple[Encoder, list[Examples]]:
    """The encoder of the training rows, and all splits encoded."""
    features = [
        Feature(name=name, kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.CONTEXT)
        for name in splits[0].features.column_names
    ]
    encoder = Encoder.fit(splits[0].features, features, config.encoder)
    return encoder, [Examples(encoder.transform(split.features), split.labels) for split in splits]


def train(run: Run, seed: int, encoder: Encoder, examples: Sequence[Examples]) -> Result:
    """Train once; validation stops training and calibrates, test is looked at once."""
    train_rows, validation, test = examples
    config = run.training.model_copy(update={"seed": seed})
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = build_model(config.model, model_config(config.model, config.hyperparameters), encoder.spec)
    rate = float(train_rows.labels.mean())
    model.set_output(bias=math.log(rate / (1 - rate)), scale=1.0)
    fit = fit_by_gradient(model, train_rows, validation, config, kind=LogKind.IMPRESSIONS)
    scores = [score_rows(model, part.rows).astype(np.float64) for part in (validation, test)]
    calibration = fit_platt(scores[0], validation.labels)
    return Result(
        run=run.name,
        seed=seed,
        validation_auc=auc(validation.labels, scores[0]),
        test_auc=auc(test.labels, scores[1]),
        raw_log_loss=log_loss(test.labels, 1 / (1 + np.exp(-scores[1]))),
        log_loss=log_loss(test.labels, calibration.apply(scores[1])),
        seconds=time.perf_counter() - started,
        steps=fit.curve[-1].step,
    )


def report(results: Sequence[Result], splits: Sequence[LabelledRows], *, threads: int) -> str:
    """The page of results."""
    rows = ", ".join(f"{len(split.labels):,}" for split in splits)
    lines = [
        "# Frappe_x1",
        "",
        f"{rows} rows for training, validation and test; {splits[0].features.num_columns} categories. "
        "Log loss is after Platt calibration on validation rows, in brackets before.",
        f"On {hardware()}, {threads} threads.",
        "",
        "| run | seeds | validation AUC | test AUC | ± | test log loss | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    means: dict[str, float] = {}
    for name in dict.fromkeys(result.run for result in results):
        made = [result for result in results if result.run == name]
        means[name] = float(np.mean([result.validation_auc for result in made]))
        test = [result.test_auc for result in made]
        losses = [float(np.mean([getattr(result, key) for result in made])) for key in ("log_loss", "raw_log_loss")]
        lines.append(
            f"| {name} | {len(made)} | {means[name]:.4f} | {np.mean(test):.4f} | {np.std(test):.4f} "
            f"| {losses[0]:.4f} ({losses[1]:.4f}) | {np.mean([result.seconds for result in made]):.0f} |"
        )
    for name, published_auc, published_loss in PUBLISHED:
        loss = "" if math.isnan(published_loss) else f"{published_loss:.4f}"
        lines.append(f"| {name} | | | {published_auc:.4f} | | {loss} | |")
    best = max(means, key=means.__getitem__)
    lines += ["", f"Best single model, by AUC on validation rows: {best}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except EvergreenError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
