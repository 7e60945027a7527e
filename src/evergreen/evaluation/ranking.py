"""Whole-catalogue ranking: for each query, all candidates are scored and the relevant ones looked for at the top."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import BASE_RATE
from evergreen.contracts.feature_tables import WINDOWS_HOURS, FeatureTables
from evergreen.contracts.mapping import Mapping as LogMapping
from evergreen.evaluation.config import EvaluationConfig, Scorer
from evergreen.evaluation.pairs import PairFeatures
from evergreen.evaluation.queries import Catalogue, Queries, Query
from evergreen.evaluation.rows import HISTORY, each_encoded, has_values
from evergreen.metrics.ranking import ndcg_of_ranks, recall_of_ranks, relevant_ranks
from evergreen.metrics.statistic import FloatArray, IntArray

logger = logging.getLogger(__name__)

NEW_ITEMS = "new items"
KNOWN_ITEMS = "known items"

RECENT_POPULARITY = "recent_popularity"
"""Name of the baseline that ranks by what was taken up lately, whoever asks; see `recent_popularity`."""


@dataclass(frozen=True)
class ItemSlice:
    """The queries that have a relevant item in a group of items, ranked for those items alone."""

    queries: IntArray
    """Indices into the queries."""
    num_relevant: int
    values: Mapping[str, FloatArray]
    """By model, the primary metric of each of these queries. Relevant items of the other group are taken off the
    list first: they are not wrong to show, so they may not push a relevant item down."""


@dataclass(frozen=True)
class RankedQueries:
    """Metrics of every query and model."""

    metrics: Mapping[str, Mapping[str, FloatArray]]
    """By model and metric ("ndcg_at_10"), (num_queries,)."""
    num_candidates: IntArray
    has_history: NDArray[np.bool_]
    """(num_queries,) whether the user had a positive event before the query."""
    item_slices: Mapping[str, ItemSlice]
    latency_rows: pa.Table
    """Candidates of the first queries with all features, to measure latency on."""


@dataclass
class _ItemSliceBuilder:
    queries: list[int]
    num_relevant: int
    values: dict[str, list[float]]


def rank_queries(
    queries: Queries,
    tables: FeatureTables,
    packages: Sequence[Scorer],
    *,
    mapping: LogMapping,
    known_items: Collection[str],
    config: EvaluationConfig,
    with_recent_popularity: bool = False,
) -> RankedQueries:
    """Rank every query's candidates with every model; features are joined and encoded once for all models.

    The base rate takes part as a constant score, which is worth a random order.

    Args:
        queries: what to rank.
        tables: feature tables, joined as of each query's time.
        packages: the models.
        mapping: names and types of the context features.
        known_items: items with an event in the train split; the others are new to the models.
        config: cutoffs and rows a chunk.
        with_recent_popularity: whether to rank by `recent_popularity`, too.

    Raises:
        ArtifactError: there is no query, or a model gives a score that is not finite.
    """
    if not queries.queries:
        raise ArtifactError(
            f"no query of the test period can be ranked: of {queries.found} found, {queries.without_new_items} have "
            f"no item that is new to their user and {queries.unreachable} none that was in the catalogue: use a "
            f"longer log or a larger split.test_fraction, or set recommend_seen_items = true in the mapping"
        )
    catalogue = Catalogue(tables)
    features = PairFeatures(queries.queries, tables, mapping)
    names = [BASE_RATE, *(package.info.name for package in packages)]
    if with_recent_popularity:
        names.insert(1, RECENT_POPULARITY)
    metrics: dict[str, dict[str, FloatArray]] = {
        name: {f"{m}_at_{k}": np.empty(len(queries.queries)) for k in config.cutoffs for m in ("ndcg", "recall")}
        for name in names
    }
    num_candidates: IntArray = np.zeros(len(queries.queries), dtype=np.int64)
    slices = {name: _ItemSliceBuilder([], 0, {n: [] for n in names}) for name in (NEW_ITEMS, KNOWN_ITEMS)}
    known = pa.array(sorted(known_items), pa.string())
    has_history: NDArray[np.bool_] = np.zeros(len(queries.queries), dtype=bool)
    latency_rows: pa.Table | None = None
    for first, candidates in _chunks(queries.queries, catalogue, config.chunk_rows):
        asked = queries.queries[first : first + len(candidates)]
        pairs = features.join(asked, candidates)
        if latency_rows is None:
            latency_rows = features.whole_rows(asked, candidates, config.latency_rows)
        has_history[first : first + len(asked)] = has_values(pairs.users[HISTORY])
        scores = {BASE_RATE: np.zeros(len(pairs.user_of))}
        if with_recent_popularity:
            scores[RECENT_POPULARITY] = recent_popularity(pairs.candidates)
        for package, rows in each_encoded(packages, pairs.encode):
            scores[package.info.name] = np.asarray(package.scores_of_encoded(rows), dtype=np.float64)
            if not np.isfinite(scores[package.info.name]).all():
                raise ArtifactError(f"{package.info.name}: a score is not finite: train it again")
        start = 0
        for i, table in enumerate(candidates, start=first):
            end = start + table.num_rows
            num_candidates[i] = table.num_rows
            relevant = _is_in(table["item_id"], queries.queries[i].relevant)
            is_known = pc.is_in(table["item_id"], value_set=known).to_numpy(zero_copy_only=False)
            for name in names:
                higher, tied = relevant_ranks(scores[name][start:end], relevant)
                for k in config.cutoffs:
                    metrics[name][f"ndcg_at_{k}"][i] = ndcg_of_ranks(higher, tied, k=k)
                    metrics[name][f"recall_at_{k}"][i] = recall_of_ranks(higher, tied, k=k)
            for slice_name, in_slice in ((KNOWN_ITEMS, is_known), (NEW_ITEMS, ~is_known)):
                wanted = relevant & in_slice
                if not wanted.any():
                    continue
                builder = slices[slice_name]
                builder.queries.append(i)
                builder.num_relevant += int(wanted.sum())
                kept = wanted | ~relevant
                for name in names:
                    ranks = relevant_ranks(scores[name][start:end][kept], wanted[kept])
                    builder.values[name].append(ndcg_of_ranks(*ranks, k=config.primary_cutoff))
            start = end
        logger.info("%d of %d queries ranked", first + len(candidates), len(queries.queries))
    assert latency_rows is not None
    return RankedQueries(
        metrics=metrics,
        num_candidates=num_candidates,
        has_history=has_history,
        item_slices={name: _build(builder) for name, builder in slices.items()},
        latency_rows=latency_rows,
    )


def recent_popularity(items: pa.Table) -> FloatArray:
    """(num_rows,) how often items were taken up lately: positives an hour, averaged over the windows of the log.

    An event of the last hour thus weighs 24 times one of the last day, which falls with age about as 1 / age does. It
    has no setting that could be chosen badly.

    Args:
        items: (num_rows,) with the columns item_positives_{window}; a null counts as none.
    """
    rates = [items[f"item_positives_{w}"].fill_null(0).to_numpy() / hours for w, hours in WINDOWS_HOURS.items()]
    mean: FloatArray = np.mean(rates, axis=0)
    return mean


def _build(builder: _ItemSliceBuilder) -> ItemSlice:
    return ItemSlice(
        queries=np.array(builder.queries, dtype=np.int64),
        num_relevant=builder.num_relevant,
        values={name: np.array(values) for name, values in builder.values.items()},
    )


def _is_in(items: pa.ChunkedArray, chosen: Collection[str]) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = pc.is_in(items, value_set=pa.array(sorted(chosen), pa.string())).to_numpy(
        zero_copy_only=False
    )
    return mask


def candidates_of(query: Query, catalogue: Catalogue) -> pa.Table:
    """Items that may be shown to a query's user at its time: (item_id, category), sorted by item_id."""
    listed = catalogue.as_of(query.time)
    return listed.filter(pa.array(~_is_in(listed["item_id"], query.seen))) if query.seen else listed


def _chunks(queries: Sequence[Query], catalogue: Catalogue, chunk_rows: int) -> Iterator[tuple[int, list[pa.Table]]]:
    """Runs of queries with at most about `chunk_rows` candidates: index of the first query, candidates of each."""
    tables: list[pa.Table] = []
    first, rows = 0, 0
    for i, query in enumerate(queries):
        candidates = candidates_of(query, catalogue)
        if tables and rows + candidates.num_rows > chunk_rows:
            yield first, tables
            first, tables, rows = i, [], 0
        tables.append(candidates)
        rows += candidates.num_rows
    if tables:
        yield first, tables
