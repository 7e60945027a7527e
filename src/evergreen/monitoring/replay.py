"""Would the model before have done better? It is asked what the new one was asked, with the features that were served.

Where two models served at other times, their click rates say as much of the world as of the models: after a sudden
change of taste every model is clicked less. So the older one predicts what the newer one has shown, and both are held
against the same clicks. Only their order of items is compared, for that is what clicks follow: before, each is moved to
the level at which people click now (a line in log-odds, fitted on these rows). Otherwise, of two models in a world with
fewer clicks, the one that promises less would seem the better one. The rows were chosen by the newer one, which leaves
less to tell apart in what it knows; a small advantage of the older one is therefore no news.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.evaluation import Estimate
from evergreen.contracts.impressions import IDS, feature_table
from evergreen.contracts.outcomes import Outcomes
from evergreen.contracts.training_set import ColumnKind
from evergreen.metrics.binary import NormalizedEntropy
from evergreen.metrics.bootstrap import Bootstrap, cluster_bootstrap
from evergreen.metrics.statistic import FloatArray
from evergreen.models.calibration import fit_platt
from evergreen.models.package import ModelPackage
from evergreen.monitoring.quality import QualityConfig, Weighted
from evergreen.monitoring.quality_rows import logits_of, shown_probabilities

_MAX_ROWS = 100_000
"""The newest; they are held with all their features."""
_LABELS = ("request_id", "item_id", "position", "clicked", "degraded", "model_version")
_TYPES = {ColumnKind.CATEGORICAL: pa.string(), ColumnKind.NUMERIC: pa.float64()}


def replayed_change(
    impressions: Iterable[pa.Table],
    outcomes: Outcomes,
    *,
    newer: ModelPackage,
    older: ModelPackage,
    as_of: datetime,
    start: datetime,
    end: datetime,
    config: QualityConfig | None = None,
) -> Estimate:
    """Normalized entropy of the older model relative to that of the newer, on what the newer one has shown.

    Both predict the click where the item was shown, at today's level of clicks. A feature that the newer model does not
    read was not logged: the older one is asked without it.

    Args:
        impressions: tables of the impression log.
        outcomes: joined up to `as_of`.
        newer: whose matured impressions are looked at, with the scores that were logged.
        older: scores them again.
        as_of: what was known then.
        start: impressions from it on, by event_timestamp …
        end: … and before it.
        config: how many rows, clicks and users are needed.

    Returns:
        -0.1: the older one would have been a tenth better. No value where too little has matured.
    """
    config = config or QualityConfig()
    rows = _rows(impressions, outcomes, newer, older, as_of, start, end)
    labels = rows["clicked"].to_numpy().astype(np.float64)
    users = _users(rows)
    counts = (("rows", rows.num_rows, config.min_rows), ("clicks", int(labels.sum()), config.min_clicks))
    for what, have, need in (*counts, ("users", len(np.unique(users)), config.min_users)):
        if have < need:
            return Estimate(value=None, reason=f"{have} {what} of {newer.version} to ask again, {need} are needed")
    if labels.all():
        return Estimate(value=None, reason="undefined on these rows: all are clicks")
    positions = rows["position"].fill_null(0).to_numpy().astype(np.int32)
    weights = 1 / rows["sampling_rate"].to_numpy()
    predictions = {
        "newer": shown_probabilities(rows["score"].to_numpy(), positions, newer),
        "older": older.predict_encoded(older.encoder.transform(rows), positions),
    }
    bootstrap = cluster_bootstrap(
        {name: Weighted(NormalizedEntropy(labels, _at_level(p, labels)), weights) for name, p in predictions.items()},
        users,
        num_replicates=config.num_replicates,
        seed=config.seed,
    )
    change = Bootstrap(
        {"change": bootstrap.values["older"] / bootstrap.values["newer"] - 1},
        {"change": bootstrap.replicates["older"] / bootstrap.replicates["newer"] - 1},
        bootstrap.num_clusters,
    ).interval("change")
    if not np.isfinite([change.value, change.low, change.high]).all():
        return Estimate(value=None, reason="undefined on the draws of these rows")
    return Estimate(value=change.value, low=change.low, high=change.high)


def _rows(
    impressions: Iterable[pa.Table],
    outcomes: Outcomes,
    newer: ModelPackage,
    older: ModelPackage,
    as_of: datetime,
    start: datetime,
    end: datetime,
) -> pa.Table:
    """The newer model's matured impressions with their labels and the features of the older one."""
    known = list(outcomes.rows(as_of=as_of, start=start, end=end, mature=True, columns=_LABELS))
    fields = [
        ("clicked", pa.bool_()),
        ("position", pa.int32()),
        ("score", pa.float64()),
        ("sampling_rate", pa.float64()),
    ]
    features = [(f.name, _TYPES.get(f.kind, pa.list_(pa.string()))) for f in older.info.features]
    ids = [(name, pa.string()) for name in ("request_id", "user_id")]
    schema = pa.schema(list(dict([*ids, *features, *fields]).items()))
    if not known:
        return schema.empty_table()
    labels = pa.concat_tables(known)
    of_newer = pc.and_(pc.equal(labels["model_version"], newer.version), pc.invert(labels["degraded"]))
    labels = labels.filter(of_newer)
    keys = _pairs(labels)
    parts = []
    moment = pc.field("event_timestamp")
    for table in impressions:
        shown = table.filter((pc.field("model_version") == newer.version) & (moment >= start) & (moment < end))
        place = pc.index_in(_pairs(shown), value_set=keys, skip_nulls=True)
        shown, place = shown.filter(place.is_valid()), place.drop_null()
        if not shown.num_rows:
            continue
        served = feature_table(shown)
        columns = dict(zip(served.column_names, served.columns, strict=True))
        columns |= {name: shown[name] for name in (*IDS, "request_id", "position", "score", "sampling_rate")}
        columns["clicked"] = labels["clicked"].take(place)
        parts.append(
            pa.table(
                [
                    columns[f.name].cast(f.type) if f.name in columns else pa.nulls(shown.num_rows, f.type)
                    for f in schema
                ],
                schema=schema,
            )
        )
    rows = pa.concat_tables(parts) if parts else schema.empty_table()
    return rows.slice(max(rows.num_rows - _MAX_ROWS, 0))


def _at_level(probabilities: FloatArray, labels: FloatArray) -> FloatArray:
    logits = logits_of(probabilities)
    return fit_platt(logits, labels).apply(logits)


def _pairs(table: pa.Table) -> pa.ChunkedArray:
    """(num_rows,) request and item in one."""
    return pc.binary_join_element_wise(table["request_id"], table["item_id"].fill_null(""), "\0")


def _users(rows: pa.Table) -> NDArray[np.int64]:
    """(num_rows,) codes; a request without a user stands for itself."""
    alone = pc.binary_join_element_wise("\0", rows["request_id"], "")
    users = pc.if_else(pc.is_valid(rows["user_id"]), rows["user_id"], alone)
    codes: NDArray[np.int64] = users.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes
