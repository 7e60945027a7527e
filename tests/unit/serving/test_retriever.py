"""A search over vectors of all items finds what scoring every item would find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.training_set import Side
from evergreen.models.package import ModelPackage
from evergreen.serving.retriever import RetrievalIndex, best_rows
from tests.unit.models.small_package import FEATURES, make_package, some_table

NUM_ITEMS = 300
NOTHING = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def package() -> ModelPackage:
    return make_package("two_tower")


@pytest.fixture(scope="module")
def items() -> pa.Table:
    return some_table(NUM_ITEMS, seed=1)


@pytest.fixture(scope="module")
def index(package: ModelPackage, items: pa.Table) -> RetrievalIndex:
    return RetrievalIndex.build(package, items)


def values_of(table: pa.Table, row: int) -> dict[str, Any]:
    return table.slice(row, 1).to_pylist()[0]


def scores_of(package: ModelPackage, user: dict[str, Any], items: pa.Table) -> NDArray[np.float32]:
    """What the whole model gives the user with each item."""
    columns = {}
    for feature in FEATURES:
        column = items[feature.name]
        if feature.side is Side.USER:
            column = pa.array([user[feature.name]] * len(items), column.type)
        columns[feature.name] = column
    return package.scores(pa.table(columns))


@pytest.mark.parametrize("row", range(5))
def test_search_finds_the_items_that_the_model_scores_highest(
    package: ModelPackage, index: RetrievalIndex, items: pa.Table, row: int
) -> None:
    user = values_of(some_table(10, seed=7), row)
    scores = scores_of(package, user, items)
    found = index.search(user, 12, NOTHING)
    np.testing.assert_allclose(scores[found], np.sort(scores)[::-1][:12], atol=1e-5)
    assert len(np.unique(found)) == 12
    assert np.ptp(scores[found]) > 0


def test_excluded_rows_are_never_returned(index: RetrievalIndex) -> None:
    user = values_of(some_table(1, seed=7), 0)
    best = index.search(user, 20, NOTHING)
    assert index.search(user, 10, best[:10]).tolist() == best[10:].tolist()
    few = index.search(user, NUM_ITEMS, np.arange(NUM_ITEMS - 2))
    assert sorted(few.tolist()) == [NUM_ITEMS - 2, NUM_ITEMS - 1]
    assert len(index.search(user, 5, np.arange(NUM_ITEMS))) == 0


def test_equal_items_are_found_in_the_order_of_their_rows(package: ModelPackage) -> None:
    items = some_table(4, seed=1).take(np.tile(np.arange(4), 1001))
    found = RetrievalIndex.build(package, items).search(values_of(some_table(1, seed=7), 0), 2500, NOTHING)
    kinds = found % 4
    assert (np.diff(kinds) != 0).sum() == 2, "of the 1001 of a kind none comes before one of a better kind"
    for kind in np.unique(kinds):
        rows = found[kinds == kind]
        assert rows.tolist() == list(range(kind, kind + 4 * len(rows), 4))


def test_update_changes_the_named_items_and_not_the_index_in_use(
    package: ModelPackage, index: RetrievalIndex, items: pa.Table
) -> None:
    before = index.vectors.clone()
    rows, newer = np.array([3, 250]), some_table(2, seed=33)
    updated = index.updated(rows, newer)
    changed = items.to_pylist()
    for place, row in enumerate(rows):
        changed[row] = values_of(newer, place)
    fresh = RetrievalIndex.build(package, pa.Table.from_pylist(changed, schema=items.schema))
    np.testing.assert_allclose(updated.vectors, fresh.vectors, atol=1e-6)
    np.testing.assert_array_equal(index.vectors, before)
    assert not np.allclose(updated.vectors, before)


@pytest.mark.parametrize("rows", [[-1], [NUM_ITEMS], [0, 1]], ids=str)
def test_update_of_rows_that_do_not_fit_is_refused(index: RetrievalIndex, rows: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, {NUM_ITEMS}\)|one row for each item"):
        index.updated(np.array(rows), some_table(1, seed=33))


def test_catalogue_may_be_empty(package: ModelPackage, items: pa.Table) -> None:
    index = RetrievalIndex.build(package, items.slice(0, 0))
    assert index.num_items == 0
    assert len(index.search(values_of(some_table(1, seed=7), 0), 5, NOTHING)) == 0


def test_age_of_an_item_counts_and_features_of_pairs_are_not_needed(package: ModelPackage, items: pa.Table) -> None:
    index = RetrievalIndex.build(package, items)
    own = [feature.name for feature in index.features(Side.ITEM)]
    assert "item_age_seconds" in own
    assert index.features(Side.PAIR) == ()
    same = RetrievalIndex.build(package, items.select(own))
    np.testing.assert_array_equal(same.vectors, index.vectors)
    columns = {name: items[name] for name in own}
    older = pa.table(columns | {"item_age_seconds": pa.array(np.full(NUM_ITEMS, 1e6))})
    assert not np.allclose(RetrievalIndex.build(package, older).vectors, index.vectors)


def test_feature_that_is_lacking_is_named(package: ModelPackage, index: RetrievalIndex, items: pa.Table) -> None:
    with pytest.raises(ArtifactError, match="item_age_seconds"):
        RetrievalIndex.build(package, items.drop_columns(["item_age_seconds"]))
    user = values_of(some_table(1, seed=7), 0)
    assert {feature.name for feature in index.features(Side.USER)} <= user.keys()
    del user["device"]
    with pytest.raises(ArtifactError, match="device"):
        index.search(user, 5, NOTHING)


def test_only_two_towers_retrieve(items: pa.Table) -> None:
    with pytest.raises(ArtifactError, match=r"package: holds a deepfm; only a two_tower"):
        RetrievalIndex.build(make_package("deepfm"), items)


SCORES = st.integers(0, 400).flatmap(
    lambda n: st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 0.25, 3.0]), min_size=n, max_size=n)
)


@given(scores=SCORES, k=st.integers(1, 40))
def test_best_rows_are_those_of_a_stable_sort(scores: list[float], k: int) -> None:
    array = np.array(scores, np.float32)
    assert best_rows(array, k).tolist() == np.argsort(-array, kind="stable")[:k].tolist()
