"""A profile counts what is there, whatever tables it comes in, and keeps no row and no id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.errors import InputError
from evergreen.monitoring.profile import (
    NUM_GROUPS,
    CategoryCells,
    IdCells,
    NumberCells,
    Profile,
    ProfileBuilder,
    fit_cells,
    make_profile,
    mixture,
    user_groups,
)


def rows(num_rows: int = 2_000, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "user_id": [f"u{i}" for i in rng.integers(0, 150, num_rows)],
            "number": pa.array(rng.normal(size=num_rows), mask=rng.random(num_rows) < 0.1),
            "piled": np.where(rng.random(num_rows) < 0.4, 0.0, rng.normal(size=num_rows)),
            "category": pa.array(rng.choice(["a", "b", "c"], num_rows), mask=rng.random(num_rows) < 0.2),
            "tags": pa.array([["x"] * k for k in rng.integers(0, 4, num_rows)], pa.list_(pa.string())),
        }
    )


def profile_of(values: object, cells_of: object | None = None) -> Profile:
    """Of one column, each row a user."""
    column = pa.array(values)
    cells = fit_cells(pa.table({"x": cells_of if cells_of is not None else column}))
    return make_profile([pa.table({"user_id": [f"u{i}" for i in range(len(column))], "x": column})], cells)


def test_a_value_that_piles_up_has_a_cell_of_its_own() -> None:
    piled = rows()["piled"].to_numpy()
    profile = profile_of(piled)
    assert np.isclose(profile.columns["x"].shares, (piled == 0).mean()).sum() == 1


def test_shares_are_those_of_the_rows() -> None:
    table = rows()
    profile = make_profile([table], fit_cells(table.drop_columns(["user_id"])))
    number, category = profile.columns["number"], profile.columns["category"]
    assert sum(number.shares) == pytest.approx(1)
    assert number.missing_share == table["number"].null_count / table.num_rows
    assert number.mean == pytest.approx(np.nanmean(table["number"].to_numpy()), abs=0.01)  # tails are cut off
    assert dict(zip(profile.cells["category"].values, category.shares, strict=False)) == {
        value: table["category"].to_pylist().count(value) / table.num_rows for value in "abc"
    }
    assert (profile.rows, category.mean) == (table.num_rows, None)
    assert profile.columns["tags"].mean == pytest.approx(np.mean([len(x) for x in table["tags"].to_pylist()]))


def test_nan_is_missing_and_infinity_is_far_out() -> None:
    profile = profile_of([np.nan, np.inf, -np.inf, 0.0], cells_of=np.linspace(-1, 1, 100))
    shares = profile.columns["x"].shares
    assert shares[-1] == shares[0] == shares[-2] == 0.25
    assert profile.columns["x"].mean == pytest.approx(0.0, abs=1e-12)
    of_infinities = fit_cells(pa.table({"x": np.append(np.linspace(-1, 1, 100), [np.inf] * 30)}))["x"]
    assert of_infinities.unit == pytest.approx(0.58, abs=0.01)


def test_tables_can_come_in_parts_and_columns_can_be_absent() -> None:
    table = rows()
    cells = fit_cells(table.drop_columns(["user_id"]))
    whole = make_profile([table], cells)
    parts = make_profile([table.slice(0, 700), table.slice(700)], cells)
    for name, column in whole.columns.items():
        np.testing.assert_allclose(column.shares, parts.columns[name].shares)
        assert column.groups == parts.columns[name].groups
    assert make_profile([table.drop_columns(["number"])], cells).columns["number"].missing_share == 1


def test_a_row_can_stand_for_many() -> None:
    table = rows()
    cells = fit_cells(table.drop_columns(["user_id"]))
    half = pa.concat_tables([table, table.slice(0, 1_000)])
    weights = np.where(np.arange(2_000) < 1_000, 2.0, 1.0)
    builder = ProfileBuilder(cells)
    builder.add(table, user_groups(table), weights)
    weighted, doubled = builder.profile(), make_profile([half], cells)
    for name in doubled.columns:
        np.testing.assert_allclose(weighted.columns[name].shares, doubled.columns[name].shares)
        np.testing.assert_allclose(weighted.columns[name].covariance[-1], doubled.columns[name].covariance[-1])


def test_columns_of_many_values_are_taken_for_ids() -> None:
    ids = [f"i{k}" for k in range(1_000)]
    assert isinstance(fit_cells(pa.table({"x": ids}))["x"], IdCells)
    mostly_common = ["common"] * 900 + ids[:100]
    assert fit_cells(pa.table({"x": mostly_common}))["x"] == CategoryCells(values=("common",))


@pytest.mark.parametrize("num_known", [500, 150_000])
def test_unseen_ids_are_counted_even_when_not_all_are_kept(num_known: int) -> None:
    cells = {"x": IdCells.from_values(pa.array([f"i{k}" for k in range(num_known)]))}
    known, new = [f"i{k}" for k in range(num_known)], [f"new{k}" for k in range(num_known // 3)]
    table = pa.table({"user_id": [*known, *new], "x": [*known, *new]})
    assert make_profile([table], cells).unseen["x"] == pytest.approx(0.25, abs=0.01)
    assert len(cells["x"].known) <= 100_000


def test_a_profile_reads_back_as_it_was_written(tmp_path: Path) -> None:
    table = rows()
    profile = make_profile([table], fit_cells(table, ids=["user_id"]))
    profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == profile
    assert {type(cells) for cells in profile.cells.values()} == {NumberCells, CategoryCells, IdCells}


def test_rows_without_a_user_belong_to_their_request() -> None:
    table = pa.table({"user_id": pa.array(["a", "a", None, None, None]), "request_id": ["r1", "r2", "r3", "r3", "r4"]})
    groups = user_groups(table)
    assert groups[0] == groups[1] and groups[2] == groups[3] and len(set(groups)) == 3
    assert groups.max() < NUM_GROUPS
    with pytest.raises(InputError, match="neither user_id nor request_id"):
        user_groups(pa.table({"x": [1]}))


def test_what_cannot_be_counted_is_an_error_that_says_so() -> None:
    cells = fit_cells(pa.table({"x": [1.0, 2.0]}))
    with pytest.raises(InputError, match="'x' has type string"):
        make_profile([pa.table({"user_id": ["u"], "x": ["three"]})], cells)
    with pytest.raises(InputError, match="no rows"):
        make_profile([], cells)


def test_the_most_frequent_value_is_found_when_a_pipeline_writes_only_that() -> None:
    reference = np.random.default_rng(0).normal(5, 1, 4_000)
    zeros, sevens = (profile_of(np.full(500, value), cells_of=reference).columns["x"] for value in (0.0, 7.25))
    assert (zeros.top_share, zeros.top_value) == (1.0, "0.0")
    assert (sevens.top_share, sevens.top_value) == (1.0, "7.25")
    assert profile_of(reference).columns["x"].top_share < 0.01
    assert profile_of(["a", "b", "b"]).columns["x"].top_value == "b"


def test_a_constant_column_and_one_without_values_have_a_profile() -> None:
    assert profile_of([3.0] * 50).columns["x"].mean == 3.0
    empty = profile_of(pa.nulls(50, pa.float64())).columns["x"]
    assert (empty.missing_share, empty.mean, empty.top_value) == (1.0, None, None)


def test_a_mixture_is_as_its_parts_and_no_surer() -> None:
    cells = fit_cells(rows().drop_columns(["user_id"]))
    saturday, sunday = (make_profile([rows(seed=seed)], cells) for seed in (1, 2))
    both = mixture([(saturday, 0.25), (sunday, 0.75)])
    for name, column in both.columns.items():
        one, other = saturday.columns[name], sunday.columns[name]
        np.testing.assert_allclose(column.shares, 0.25 * np.array(one.shares) + 0.75 * np.array(other.shares))
        if column.mean is not None:
            assert min(one.mean, other.mean) <= column.mean <= max(one.mean, other.mean)
    same = mixture([(saturday, 0.5), (saturday, 0.5)])
    variances = [np.diag(p.columns["number"].cell_shares(p.effective_users).covariance) for p in (same, saturday)]
    np.testing.assert_allclose(*variances)
    assert mixture([(saturday, 1.0)]) is saturday
