"""Queries of a whole-catalogue ranking: what counts as relevant, what may be shown, what is left out and counted."""

from datetime import UTC, datetime

import pytest

from evergreen.evaluation.queries import Catalogue, find_queries
from evergreen.evaluation.ranking import candidates_of
from evergreen.features.point_in_time import items_as_of

MAPPING = """
name = "tiny"
kind = "interactions"
[timestamp]
column = "time"
[columns]
user_id = "user"
item_id = "item"
[context_features]
device = "categorical"
"""
TEST_START, TEST_END = datetime(2024, 1, 3, tzinfo=UTC), datetime(2024, 1, 6, tzinfo=UTC)
LOG = [
    "2024-01-01T08:00:00,ann,a,phone",
    "2024-01-01T09:00:00,bob,b,desk",
    "2024-01-02T08:00:00,ann,c,phone",
    "2024-01-03T08:00:00,ann,a,tablet",  # ann, 3rd: she knows a; b is new to her
    "2024-01-03T08:30:00,ann,b,phone",
    "2024-01-03T10:00:00,bob,b,desk",  # bob, 3rd: nothing new
    "2024-01-04T08:00:00,cid,d,desk",  # cid, 4th: d is not in the catalogue yet
    "2024-01-05T08:00:00,cid,a,phone",  # cid, 5th: a can be shown, e cannot
    "2024-01-05T09:00:00,cid,e,phone",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, ingested_log):
    return ingested_log(tmp_path_factory.mktemp("tiny"), MAPPING, LOG)


def find(snapshot, tables, **options):
    return find_queries(snapshot, tables, start=TEST_START, end=TEST_END, **{"max_queries": 10, "seed": 0, **options})


def test_a_query_is_a_users_day_and_relevant_is_what_is_new_and_listed(tiny):
    queries = find(*tiny)
    assert [(q.user_id, q.time.day, set(q.relevant)) for q in queries.queries] == [("ann", 3, {"b"}), ("cid", 5, {"a"})]
    assert queries.unit == "user and day"


def test_what_is_left_out_is_counted(tiny):
    queries = find(*tiny)
    assert (queries.found, queries.without_new_items, queries.unreachable, queries.sampled_out) == (4, 1, 1, 0)
    assert queries.unreachable_items == 1  # e, of cid's second query


def test_seen_are_all_items_before_the_query_and_none_of_it(tiny):
    ann, cid = find(*tiny).queries
    assert ann.seen == {"a", "c"}
    assert cid.seen == {"d"}


def test_context_is_that_of_the_querys_first_event(tiny):
    ann, _ = find(*tiny).queries
    assert ann.context == {"device": "tablet"}


def test_candidates_are_listed_and_not_seen(tiny):
    ann, cid = find(*tiny).queries
    catalogue = Catalogue(tiny[1])
    assert candidates_of(ann, catalogue)["item_id"].to_pylist() == ["b"]
    assert candidates_of(cid, catalogue)["item_id"].to_pylist() == ["a", "b", "c"]


def test_the_catalogue_of_a_moment_is_that_of_items_as_of(reads):
    catalogue = Catalogue(reads.tables)
    for day in (4, 14, 27):
        moment = datetime(2024, 3, day, 15, 4, 5, tzinfo=UTC)
        expected = items_as_of(reads.tables, moment).select(["item_id", "category"])
        assert catalogue.as_of(moment).equals(expected)
    assert catalogue.as_of(datetime(2020, 1, 1, tzinfo=UTC)).num_rows == 0


def test_when_seen_items_may_be_recommended_they_are_relevant_and_candidates(tmp_path, ingested_log):
    mapping = MAPPING.replace('kind = "interactions"', 'kind = "interactions"\nrecommend_seen_items = true')
    snapshot, tables = ingested_log(tmp_path, mapping, LOG)
    queries = find(snapshot, tables)
    assert [(q.user_id, q.time.day, set(q.relevant)) for q in queries.queries] == [
        ("ann", 3, {"a", "b"}),
        ("bob", 3, {"b"}),
        ("cid", 5, {"a"}),
    ]
    assert all(not q.seen for q in queries.queries)


def test_too_many_queries_are_drawn_by_seed(reads):
    split = reads.training_set.manifest.splits["test"]

    def draw(seed):
        return find_queries(reads.snapshot, reads.tables, start=split.start, end=split.end, max_queries=10, seed=seed)

    one, again, other = draw(1), draw(1), draw(2)
    assert len(one.queries) == 10
    assert one.sampled_out == one.found - one.without_new_items - one.unreachable - 10 > 0
    assert one == again != other
    assert [q.time for q in one.queries] == sorted(q.time for q in one.queries)


def test_a_request_of_the_log_is_a_query(tmp_path, ingested_log):
    mapping = MAPPING.replace('item_id = "item"', 'item_id = "item"\nrequest_id = "device"')
    queries = find(*ingested_log(tmp_path, mapping, LOG))
    assert queries.unit == "request"
    assert queries.found == 5  # ann's day falls into two requests: tablet and phone
    assert queries.queries[0].time == datetime(2024, 1, 3, 8, 30, tzinfo=UTC)
