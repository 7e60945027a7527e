"""Ranking over the whole catalogue, held to a brute-force count."""

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.evaluation import BASE_RATE
from evergreen.evaluation.config import EvaluationConfig
from evergreen.evaluation.queries import Catalogue, Queries, find_queries
from evergreen.evaluation.ranking import (
    KNOWN_ITEMS,
    NEW_ITEMS,
    RECENT_POPULARITY,
    candidates_of,
    rank_queries,
    recent_popularity,
)
from evergreen.features.point_in_time import join_features
from evergreen.metrics.ranking import ndcg_at_k, recall_at_k


def own_kind(table: pa.Table) -> np.ndarray:
    """1 for items of the user's kind, 0 for others: what the world really is like."""
    users, items = (np.array([int(v[1:]) for v in table[n].to_pylist()]) for n in ("user_id", "item_id"))
    return (users % 4 == items % 4).astype(float)


@pytest.fixture(scope="module")
def queries(reads) -> Queries:
    split = reads.training_set.manifest.splits["test"]
    return find_queries(reads.snapshot, reads.tables, start=split.start, end=split.end, max_queries=25, seed=0)


def rank(reads, queries, packages, *, chunk_rows=1_000, known=()):
    config = EvaluationConfig(chunk_rows=chunk_rows)
    return rank_queries(
        queries, reads.tables, packages, mapping=reads.snapshot.mapping, known_items=known, config=config
    )


def test_metrics_are_those_of_every_candidate_scored_one_by_one(reads, queries):
    ranked = rank(reads, queries, [reads.scorer("deepfm", own_kind)])
    catalogue = Catalogue(reads.tables)
    for i, query in enumerate(queries.queries):
        items = candidates_of(query, catalogue)["item_id"].to_pylist()
        scores = [float(int(item[1:]) % 4 == int(query.user_id[1:]) % 4) for item in items]
        relevant = [item in query.relevant for item in items]
        assert ranked.metrics["deepfm"]["ndcg_at_10"][i] == pytest.approx(ndcg_at_k(scores, relevant, k=10))
        assert ranked.metrics["deepfm"]["recall_at_5"][i] == pytest.approx(recall_at_k(scores, relevant, k=5))
        assert ranked.num_candidates[i] == len(items)


def test_chunks_change_nothing(reads, queries):
    small, large = (rank(reads, queries, [reads.scorer("deepfm", own_kind)], chunk_rows=n) for n in (400, 10**6))
    for metric, values in small.metrics["deepfm"].items():
        assert np.array_equal(values, large.metrics["deepfm"][metric])


def test_models_see_the_features_and_the_context_of_the_querys_time(reads, queries):
    seen = []

    def remember(table: pa.Table) -> np.ndarray:
        seen.append(table)
        return np.zeros(table.num_rows)

    ranked = rank(reads, queries, [reads.scorer("deepfm", remember)], chunk_rows=10**6)
    (table,) = seen
    assert {f.name for f in reads.training_set.manifest.features} <= set(table.column_names)
    devices = {u: "phone" if int(u[1:]) % 2 else "desk" for u in table["user_id"].unique().to_pylist()}
    assert all(devices[row["user_id"]] == row["device"] for row in table.select(["user_id", "device"]).to_pylist())
    assert ranked.latency_rows.num_rows == 500


def test_the_base_rate_is_a_random_order(reads, queries):
    ranked = rank(reads, queries, [])
    assert ranked.metrics[BASE_RATE]["recall_at_5"] == pytest.approx(5 / ranked.num_candidates)


def test_item_slices_take_the_other_groups_relevant_items_off_the_list(reads, queries):
    known = {f"i{i}" for i in range(50)}
    ranked = rank(reads, queries, [reads.scorer("deepfm", own_kind)], known=known)
    parts = ranked.item_slices
    assert parts[KNOWN_ITEMS].num_relevant + parts[NEW_ITEMS].num_relevant == sum(
        len(q.relevant) for q in queries.queries
    )
    both = set(parts[KNOWN_ITEMS].queries) & set(parts[NEW_ITEMS].queries)
    assert both, "the test needs a query with relevant items of both groups"
    catalogue = Catalogue(reads.tables)
    for part, in_slice in ((parts[KNOWN_ITEMS], True), (parts[NEW_ITEMS], False)):
        for i, value in zip(part.queries, part.values["deepfm"], strict=True):
            query = queries.queries[i]
            items = [
                item
                for item in candidates_of(query, catalogue)["item_id"].to_pylist()
                if item not in query.relevant or (item in known) == in_slice
            ]
            scores = [float(int(item[1:]) % 4 == int(query.user_id[1:]) % 4) for item in items]
            assert value == pytest.approx(ndcg_at_k(scores, [item in query.relevant for item in items], k=10))


def test_rows_are_those_of_the_whole_join(reads, queries):
    """What is joined once a query, or once an item and time, is what a join of every row gives."""
    seen = []

    def remember(table: pa.Table) -> np.ndarray:
        seen.append(table)
        return np.zeros(table.num_rows)

    rank(reads, queries, [reads.scorer("deepfm", remember)], chunk_rows=10**6)
    catalogue = Catalogue(reads.tables)
    spine = {name: [] for name in ("event_timestamp", "user_id", "device")}
    items = []
    for query in queries.queries:
        items.append(candidates_of(query, catalogue))
        for name, value in (
            ("event_timestamp", query.time), ("user_id", query.user_id), ("device", query.context["device"]),
        ):  # fmt: skip
            spine[name] += [value] * items[-1].num_rows
    listed = pa.concat_tables(items)
    times = pa.array(spine.pop("event_timestamp"), pa.timestamp("us", tz="UTC"))
    whole = join_features(
        pa.table({"event_timestamp": times, **spine, **dict(zip(listed.column_names, listed.columns, strict=True))}),
        reads.tables,
    )
    (table,) = seen
    for feature in reads.training_set.manifest.features:
        assert table[feature.name].to_pylist() == whole[feature.name].to_pylist(), feature.name


def test_recent_popularity_weighs_an_event_by_how_lately_it_was():
    columns = {"1h": [None, 0, 1], "1d": [None, 1, 1], "7d": [None, 1, 1], "30d": [None, 50, 1]}
    items = pa.table({f"item_positives_{w}": pa.array(values, pa.int64()) for w, values in columns.items()})
    never, once_popular, just_now = recent_popularity(items)
    assert 0 == never < once_popular < just_now
    assert just_now == pytest.approx((1 + 1 / 24 + 1 / 168 + 1 / 720) / 4)


def test_recent_popularity_ranks_beside_the_models_when_asked_for(reads, queries):
    def popular(table: pa.Table) -> np.ndarray:
        return recent_popularity(table)

    config = EvaluationConfig(chunk_rows=1_000)
    ranked = rank_queries(
        queries, reads.tables, [reads.scorer("deepfm", popular)], mapping=reads.snapshot.mapping, known_items=(),
        config=config, with_recent_popularity=True,
    )  # fmt: skip
    assert list(ranked.metrics) == [BASE_RATE, RECENT_POPULARITY, "deepfm"]
    for metric, values in ranked.metrics[RECENT_POPULARITY].items():
        assert np.array_equal(values, ranked.metrics["deepfm"][metric])


def test_queries_of_users_without_a_past_are_known(reads, queries):
    ranked = rank(reads, queries, [])
    before = reads.snapshot.manifest.first_event
    assert before < queries.queries[0].time
    for query, has_history in zip(queries.queries, ranked.has_history, strict=True):
        assert has_history == bool(query.seen)  # every event of this log is positive, and older than an hour


def test_a_score_that_is_not_finite_is_an_error_that_names_the_model(reads, queries):
    with pytest.raises(ArtifactError, match="deepfm: a score is not finite"):
        rank(reads, queries, [reads.scorer("deepfm", lambda table: np.full(table.num_rows, np.nan))])
