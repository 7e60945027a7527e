"""The model card: what a person should know before using a model, written from the run itself.

Source: Mitchell et al. 2019, Model cards for model reporting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import SPLITS, TrainingSetManifest
from evergreen.models.calibration import Calibration
from evergreen.models.package import ModelInfo
from evergreen.models.position import PositionEffects

_PREDICTS = {
    LogKind.IMPRESSIONS: "the probability that an item is clicked when it is shown",
    LogKind.INTERACTIONS: "the probability that an item is the one chosen rather than one of the negatives drawn "
    "against it; it orders items, and is not a rate that can be observed",
    LogKind.RATINGS: "the rating that a user would give an item",
}

_LIMITS = {
    LogKind.IMPRESSIONS: "Clicks depend on what the logging policy showed; that is not corrected for.",
    LogKind.INTERACTIONS: "Nobody knows what users saw: negatives are drawn evenly from the items of the moment.",
    LogKind.RATINGS: "People rate what they chose; the rating of items that nobody would choose is extrapolated.",
}


def model_card(
    info: ModelInfo,
    training_set: TrainingSetManifest,
    metrics: dict[str, Any],
    calibration: Calibration | None,
    position: PositionEffects | None,
) -> str:
    """Markdown of the card.

    Args:
        info: goes with the model.
        training_set: what it was trained on.
        metrics: numbers are listed; curves are left to metrics.json.
        calibration: None for ratings.
        position: what positions add to scores, where they were learned.
    """
    figures = [(name, f"{value:.5g}") for name, value in metrics.items() if isinstance(value, (int, float))]
    splits = [
        (
            name,
            f"{split.start:%Y-%m-%d %H:%M}",
            f"{split.end:%Y-%m-%d %H:%M}",
            f"{split.rows:,}",
            f"{split.label_mean:.5g}",
        )
        for name, split in ((name, training_set.splits[name]) for name in SPLITS)
    ]
    by_kind: dict[str, list[str]] = {}
    for feature in info.features:
        by_kind.setdefault(feature.kind.value, []).append(f"`{feature.name}`")
    features = [(kind, str(len(names)), ", ".join(names)) for kind, names in by_kind.items()]
    hyperparameters = [(name, f"`{value}`") for name, value in (info.hyperparameters | info.training).items()]
    dropped = [(f"`{name}`", reason) for name, reason in training_set.dropped_features.items()]
    scaling = (
        "Scores are ratings; they are clipped to "
        f"[{info.rating_minimum:g}, {info.rating_maximum:g}]."
        if calibration is None
        else f"Scores are logits; {calibration.in_words()}."
    )  # fmt: skip
    return "\n".join(
        [
            f"# {info.name} on {info.mapping_name}",
            "",
            f"Predicts {_PREDICTS[info.kind]}. {scaling}",
            "",
            "## Intended use",
            "",
            f"Ranking items for users of the log `{info.mapping_name}`, with features of service "
            f"`{info.feature_service}` as known at the time of the request. Unseen users, items and categories and "
            "missing values are allowed; such rows rest on the other features.",
            "",
            "## Data",
            "",
            f"Snapshot `{info.snapshot_id}`, known up to {info.as_of:%Y-%m-%d %H:%M} UTC, split by time with an "
            f"embargo of {training_set.embargo_seconds:g} s.",
            "",
            *_table(("split", "from (UTC)", "to", "rows", "mean label"), splits),
            "",
            "## Features",
            "",
            *_table(("kind", "number", "columns"), features),
            *(["", "Left out:", "", *_table(("column", "reason"), dropped)] if dropped else []),
            "",
            "## Metrics",
            "",
            "Validation rows chose when to stop and the calibration, so figures on them are a little too good; the "
            "test split is the evaluation's. The learning curve is in metrics.json.",
            "",
            *_table(("metric", "value"), figures),
            "",
            "## Limits",
            "",
            f"{_LIMITS[info.kind]} {_position_words(info, position)}"
            "The model knows the world up to the end of its training split; features go on "
            "changing after it, weights do not.",
            "",
            "## Training",
            "",
            f"{info.num_parameters:,} parameters.",
            "",
            *_table(("setting", "value"), hyperparameters),
            "",
        ]
    )


def _position_words(info: ModelInfo, position: PositionEffects | None) -> str:
    if info.kind is not LogKind.IMPRESSIONS:
        return ""
    if position is None:
        return "Clicks also depend on the position on the page, which this model has not learned apart. "
    effects = ", ".join(f"{effect:+.2f}" for effect in position.effects[1:])
    return (
        f"The position's effect on the log-odds of a click was learned apart from the items ({effects}, from the top) "
        "and is left out when serving: probabilities are those of an average position. "
    )


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
