"""Features joined once a query, held to a join of every candidate."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from evergreen.evaluation.pairs import PairFeatures
from evergreen.evaluation.queries import Catalogue, Query
from evergreen.features.columns import feature_columns
from evergreen.models.encoding import Encoder

MAPPING = """
name = "shelves"
kind = "interactions"
[timestamp]
column = "time"
[columns]
user_id = "user"
item_id = "item"
category = "device"
"""
START = datetime(2024, 3, 4, tzinfo=UTC)


@pytest.fixture(scope="module")
def shelves(tmp_path_factory, ingested_log):
    """12 users take up 30 items that appear over 10 days; every fifth item has no category."""
    rng = np.random.default_rng(1)
    events = []
    for _ in range(600):
        day = rng.uniform(0, 10)
        item = int(rng.integers(0, 3 + 27 * day / 10))
        events.append((START + timedelta(days=day), int(rng.integers(0, 12)), item))
    lines = [f"{t.isoformat()},u{u},i{i},{'' if i % 5 == 0 else f'shelf{i % 3}'}" for t, u, i in sorted(events)]
    return ingested_log(tmp_path_factory.mktemp("shelves"), MAPPING, lines)


def queries_at(*hours: float) -> list[Query]:
    users = ["u1", "u7", "nobody", "u1", "u3"]
    return [
        Query(time=START + timedelta(hours=hour), user_id=user, relevant=frozenset(), seen=frozenset(), context={})
        for hour, user in zip(hours, users, strict=True)
    ]


@pytest.fixture(scope="module")
def asked(shelves):
    """Queries of several times, two of them equal, and one before anything is known."""
    _, tables = shelves
    queries = queries_at(0.5, 100, 100, 180.7, 230)
    catalogue = Catalogue(tables)
    candidates = [catalogue.as_of(query.time) for query in queries]
    assert any(table["category"].null_count for table in candidates)
    return queries, candidates


def test_pairs_hold_what_a_join_of_every_candidate_gives(shelves, asked):
    snapshot, tables = shelves
    queries, candidates = asked
    features = PairFeatures(queries, tables, snapshot.mapping)
    pairs = features.join(queries, candidates)
    whole = features.whole_rows(queries, candidates, sum(table.num_rows for table in candidates))
    users = pairs.users.take(pa.array(pairs.user_of))
    for name in whole.column_names:
        of_candidate = name in pairs.candidates.column_names and pairs.candidates[name].null_count < whole.num_rows
        found = (pairs.candidates if of_candidate else users)[name]
        assert found.to_pylist() == whole[name].to_pylist(), name


def test_encoded_pairs_are_the_encoded_rows_of_that_join_to_the_bit(shelves, asked):
    snapshot, tables = shelves
    queries, candidates = asked
    features = PairFeatures(queries, tables, snapshot.mapping)
    whole = features.whole_rows(queries, candidates, sum(table.num_rows for table in candidates))
    known = [f for f in feature_columns(snapshot.mapping) if whole[f.name].null_count < whole.num_rows]
    encoder = Encoder.fit(whole, known)
    pairs, rows = features.join(queries, candidates).encode(encoder), encoder.transform(whole)
    assert np.array_equal(pairs.categorical, rows.categorical)
    assert np.array_equal(pairs.numeric, rows.numeric)
    for one, other in zip(pairs.bags, rows.bags, strict=True):
        assert np.array_equal(one.values, other.values)
        assert np.array_equal(one.offsets, other.offsets)


def test_a_part_of_the_queries_can_be_joined_at_a_time(shelves, asked):
    snapshot, tables = shelves
    queries, candidates = asked
    features = PairFeatures(queries, tables, snapshot.mapping)
    together = features.join(queries, candidates).candidates
    parts = [features.join(queries[i : i + 2], candidates[i : i + 2]).candidates for i in range(0, len(queries), 2)]
    assert pa.concat_tables(parts).equals(together)


def test_whole_rows_are_the_first_candidates(shelves, asked):
    snapshot, tables = shelves
    queries, candidates = asked
    features = PairFeatures(queries, tables, snapshot.mapping)
    first = features.whole_rows(queries, candidates, 7)
    assert first["item_id"].to_pylist() == pa.concat_tables(candidates)["item_id"].to_pylist()[:7]
