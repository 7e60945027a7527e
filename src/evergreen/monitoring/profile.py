"""What a sample of rows looks like, column by column, small enough to keep: the reference of a drift gate.

A profile holds the cells that the columns' values were counted in (quantiles of numbers, frequent categories), the
share of each cell, and how far these shares vary from user to user. So a window is compared with its references
without their rows. A window is counted in the cells of its reference: one pass over its rows serves all references.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import InputError
from evergreen.models.vocabulary import hash_strings
from evergreen.monitoring.statistics import CellShares, FloatArray

NUM_GROUPS = 4096
"""Users are put into so many groups by hash. Groups of independent users are independent, and totals of this many are
as good as those of a million users, in little memory."""

MAX_CELLS = 30
_NUM_QUANTILES = 10
_NUM_STEPS = 32
_MIN_CATEGORY_SHARE = 0.005
_MIN_COVERED = 0.5
"""Share of the rows that frequent categories must cover, or the column is one of ids."""
_CLIP = 0.005
"""Of each tail: a mean of what lies beyond would be a mean of a few rows."""
_MAX_KEPT_IDS = 100_000
_SEED = 7
_TYPICAL_OF = 1_001


class NumberCells(JsonModel):
    """Cells of a number; a list counts by its length."""

    edges: tuple[float, ...]
    """Ascending; cell i holds values above edges[i - 1] up to edges[i], and one more cell those above the last. A value
    that more than one quantile falls on has a cell of its own."""
    marks: tuple[float, ...]
    """The edges, and more of them at even steps, for distances: how far values lie within a cell matters there."""
    low: float
    high: float
    """Values are cut off here in means."""
    unit: float
    """What differences are measured in: the standard deviation, or the mean; 0 for a constant, which has no unit."""
    is_relative: bool = False
    """Whether the unit is the mean: for probabilities."""

    @property
    def num_cells(self) -> int:
        """The cell of missing values included, which is the last."""
        return len(self.edges) + 2


class CategoryCells(JsonModel):
    """Cells of a category: each of the frequent values, all others, and missing."""

    values: tuple[str, ...]

    @property
    def num_cells(self) -> int:
        """Those of other and of missing values included."""
        return len(self.values) + 2


class IdCells(JsonModel):
    """Ids are not compared by their shares; it is only told how many were never seen. Hashes are kept, not ids."""

    hashes: str
    """Base64 of the sorted little-endian uint32 hashes of the known ids."""
    below: int
    """Of more ids than are kept, those whose hash is below; they stand for all."""

    @classmethod
    def from_values(cls, distinct: pa.Array) -> Self:
        """Keep ids: (n,) distinct strings without nulls."""
        hashes = np.unique(hash_strings(distinct, seed=_SEED))
        below = 2**32 if len(hashes) <= _MAX_KEPT_IDS else int(hashes[_MAX_KEPT_IDS])
        kept = hashes[:_MAX_KEPT_IDS].astype("<u4")
        return cls(hashes=base64.b64encode(kept.tobytes()).decode(), below=below)

    @property
    def known(self) -> NDArray[np.uint32]:
        """(num_kept,) sorted hashes; not kept, or two equal ones would no longer compare."""
        return np.frombuffer(base64.b64decode(self.hashes), "<u4")


Cells = NumberCells | CategoryCells | IdCells


class ColumnProfile(JsonModel):
    """A column of a sample."""

    shares: tuple[float, ...]
    """Of the rows, in each cell; the last is missing."""
    covariance: tuple[tuple[float, ...], ...]
    """Of the shares, robust to users: the lower triangle."""
    groups: tuple[int, ...]
    """Of users, that have rows in each cell."""
    mean: float | None
    """Of the known numbers, cut off at the tails; null for categories."""
    places: tuple[float, ...] = ()
    """Mean of the known numbers between two marks, where there are any; empty for categories …"""
    masses: tuple[float, ...] = ()
    """… and their share of the rows."""
    top_share: float
    """Share of the rows that have the most frequent value, where it is that of most rows or 0; at least this."""
    top_value: str | None
    """That value, as text."""

    @property
    def missing_share(self) -> float:
        """Share of the rows without a value."""
        return self.shares[-1]

    def cell_shares(self, effective_users: float) -> CellShares:
        """For the tests."""
        size = len(self.shares)
        lower = np.zeros((size, size))
        lower[np.tril_indices(size)] = [value for row in self.covariance for value in row]
        covariance = lower + np.tril(lower, -1).T
        return CellShares(np.array(self.shares), covariance, np.array(self.groups), effective_users)


class Profile(JsonModel):
    """A sample of rows."""

    cells: dict[str, Cells]
    columns: dict[str, ColumnProfile]
    """Of all but ids."""
    unseen: dict[str, float]
    """Of ids: share of the rows whose id is not among the known ones."""
    rows: int
    effective_users: float
    """(sum n)^2 / sum n^2 of their rows; at most `NUM_GROUPS`."""


def user_groups(table: pa.Table) -> NDArray[np.int64]:
    """(num_rows,) group of each row's user, in [0, NUM_GROUPS); the request's where there is no user.

    Args:
        table: has `user_id` or `request_id`, or both.

    Raises:
        InputError: it has neither.
    """
    names = [name for name in ("user_id", "request_id") if name in table.column_names]
    if not names:
        raise InputError("the rows have neither user_id nor request_id: there is no telling which belong together")
    keys = [table[name].cast(pa.string()) for name in names]
    codes, hashes = _hashed(pc.coalesce(*keys))
    groups: NDArray[np.int64] = np.append(hashes % NUM_GROUPS, 0).astype(np.int64)[codes]
    nobody = np.flatnonzero(codes == len(hashes))
    groups[nobody] = np.arange(len(nobody)) % NUM_GROUPS
    return groups


def fit_cells(sample: pa.Table, *, ids: Collection[str] = (), probabilities: Collection[str] = ()) -> dict[str, Cells]:
    """Choose the cells in which columns are counted.

    Args:
        sample: (num_rows) of the reference, at least one; a million rows are more than enough.
        ids: columns of ids.
        probabilities: columns of probabilities, or of 0 and 1: a tenth more is a tenth of their mean, not of their
            standard deviation.
    """
    return {name: _fit(sample[name], name in ids, name in probabilities) for name in sample.column_names}


def _fit(column: pa.ChunkedArray, is_id: bool, is_probability: bool) -> Cells:
    if not is_id and _is_number(column.type):
        return _fit_number(_numbers(column), is_probability)
    counts = column.cast(pa.string()).drop_null().value_counts()
    distinct, rows = counts.field("values"), counts.field("counts").to_numpy()
    order = np.argsort(-rows, kind="stable")[:MAX_CELLS]
    frequent = order[rows[order] >= _MIN_CATEGORY_SHARE * len(column)]
    if is_id or rows[frequent].sum() < _MIN_COVERED * rows.sum():
        return IdCells.from_values(distinct)
    return CategoryCells(values=tuple(distinct.take(pa.array(frequent)).to_pylist()))


def _fit_number(values: FloatArray, is_probability: bool) -> NumberCells:
    known = values[np.isfinite(values)]
    if not len(known):
        return NumberCells(edges=(), marks=(), low=0.0, high=0.0, unit=0.0)
    quantiles = np.quantile(known, np.arange(1, _NUM_QUANTILES) / _NUM_QUANTILES, method="inverted_cdf")
    edges, times = np.unique(quantiles, return_counts=True)
    atoms = edges[times > 1]
    edges = np.unique(np.concatenate([edges, np.nextafter(atoms, -np.inf)]))
    low, high = np.quantile(known, [_CLIP, 1 - _CLIP])
    if low == high:
        low, high = known.min(), known.max()
    cut = np.clip(known, low, high)
    unit = cut.mean() if is_probability else cut.std()
    marks = np.unique(np.concatenate([edges, np.linspace(low, high, _NUM_STEPS + 1)]))
    return NumberCells(
        edges=tuple(edges),
        marks=tuple(marks),
        low=float(low),
        high=float(high),
        unit=float(unit),
        is_relative=is_probability,
    )


def make_profile(tables: Iterable[pa.Table], cells: Mapping[str, Cells]) -> Profile:
    """Count rows in cells, in one pass.

    Args:
        tables: each with `user_id` or `request_id` (see `user_groups`), and the columns; one that a table lacks is
            missing in its rows.
        cells: of `fit_cells`.

    Raises:
        InputError: there is not a row, or a column holds text where the cells are of numbers.
    """
    builder = ProfileBuilder(cells)
    for table in tables:
        builder.add(table, user_groups(table))
    return builder.profile()


@dataclass
class _Totals:
    by_group: FloatArray
    sums: FloatArray
    counts: FloatArray
    frequent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class ProfileBuilder:
    """Counts rows in cells, a table at a time."""

    def __init__(self, cells: Mapping[str, Cells]) -> None:
        self._cells = dict(cells)
        self._totals = {
            name: _Totals(np.zeros((NUM_GROUPS, c.num_cells)), *np.zeros((2, _num_steps(c))))
            for name, c in self._cells.items()
            if not isinstance(c, IdCells)
        }
        self._ids = {name: np.zeros(2) for name, c in self._cells.items() if isinstance(c, IdCells)}
        self._sizes = np.zeros(NUM_GROUPS)
        self._rows = 0

    def add(self, table: pa.Table, groups: NDArray[np.int64], weights: FloatArray | None = None) -> None:
        """Count some rows.

        Args:
            table: (num_rows) with the columns, or some of them.
            groups: (num_rows,) of `user_groups`.
            weights: (num_rows,) rows that each row stands for; None: one.

        Raises:
            InputError: a column holds text where the cells are of numbers.
        """
        self._rows += table.num_rows
        self._sizes += np.bincount(groups, weights, NUM_GROUPS)
        for name, cells in self._cells.items():
            column = table[name] if name in table.column_names else pa.chunked_array([pa.nulls(table.num_rows)])
            if isinstance(cells, IdCells):
                self._ids[name] += _unseen(column, cells, weights)
                continue
            totals = self._totals[name]
            if isinstance(cells, NumberCells):
                places = self._add_numbers(name, column, cells, weights)
            else:
                places = self._add_categories(column, cells, totals, weights)
            flat = groups * cells.num_cells + places
            counted = np.bincount(flat, weights, NUM_GROUPS * cells.num_cells)
            totals.by_group += counted.reshape(NUM_GROUPS, cells.num_cells)

    def _add_numbers(
        self, name: str, column: pa.ChunkedArray, cells: NumberCells, weights: FloatArray | None
    ) -> NDArray[np.int64]:
        totals = self._totals[name]
        try:
            values = _numbers(column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"column {name!r} has type {column.type}, in the reference it is a number") from error
        missing = np.isnan(values)
        marks = np.array(cells.marks)
        steps = np.searchsorted(marks, values, side="left")
        steps[missing] = len(marks) + 1
        # A cell has several steps: the marks are the edges and more.
        cell_of_step = np.searchsorted(np.array(cells.edges), np.append(marks, np.inf), side="left")
        places: NDArray[np.int64] = np.append(cell_of_step, cells.num_cells - 1)[steps]
        ones = np.ones(len(values)) if weights is None else weights
        cut = np.clip(values, cells.low, cells.high)
        cut[missing] = 0.0
        totals.sums += np.bincount(steps, cut if weights is None else cut * weights, _num_steps(cells))
        totals.counts += np.bincount(steps, weights, _num_steps(cells))
        # The value of most rows is that of the middle one; of a sample, so that nothing is sorted.
        sample = np.sort(values[:: max(len(values) // _TYPICAL_OF, 1)])
        typical = sample[np.count_nonzero(~np.isnan(sample)) // 2] if len(sample) else np.nan
        for value in {0.0, float(typical)}:
            totals.frequent[str(value)] += float(ones @ (values == value))
        return places

    def _add_categories(
        self, column: pa.ChunkedArray, cells: CategoryCells, totals: _Totals, weights: FloatArray | None
    ) -> NDArray[np.int64]:
        codes, distinct = _dictionary(column)
        other = len(cells.values)
        found = pc.index_in(distinct, pa.array(cells.values, pa.string())).fill_null(other)
        places: NDArray[np.int64] = np.append(found.to_numpy(), other + 1).astype(np.int64)[codes]
        counts = np.bincount(codes, weights, len(distinct) + 1)[:-1]
        if len(counts):
            most = int(np.argmax(counts))
            totals.frequent[distinct[most].as_py()] += float(counts[most])
        return places

    def profile(self) -> Profile:
        """What was counted so far.

        Raises:
            InputError: not a row was.
        """
        total = float(self._sizes.sum())
        if total <= 0:
            raise InputError("there are no rows to make a profile of: give a range of time that has some")
        return Profile(
            cells=self._cells,
            columns={name: self._column(self._cells[name], totals, total) for name, totals in self._totals.items()},
            unseen={name: float(new / all_) if all_ else 0.0 for name, (new, all_) in self._ids.items()},
            rows=self._rows,
            effective_users=float(total**2 / (self._sizes @ self._sizes)),
        )

    def _column(self, cells: Cells, totals: _Totals, total: float) -> ColumnProfile:
        measured = CellShares.from_totals(totals.by_group)
        top = max(totals.frequent.items(), key=lambda pair: pair[1], default=(None, 0.0))
        sums, counts = totals.sums[:-1], totals.counts[:-1]  # the last are missing
        held = counts > 0
        return ColumnProfile(
            shares=tuple(measured.shares),
            covariance=_lower_triangle(measured.covariance),
            groups=tuple(measured.clusters),
            mean=float(sums.sum() / counts.sum()) if held.any() else None,
            places=tuple(sums[held] / counts[held]),
            masses=tuple(counts[held] / total),
            top_share=top[1] / total,
            top_value=top[0] if top[1] else None,
        )


def _num_steps(cells: Cells) -> int:
    """Between marks, and outside of them, and one for what is missing; none for categories."""
    return len(cells.marks) + 2 if isinstance(cells, NumberCells) else 0


def _unseen(column: pa.ChunkedArray, cells: IdCells, weights: FloatArray | None) -> FloatArray:
    """(2,) rows with an id that is not known, and rows with an id, of those that stand for all."""
    codes, hashes = _hashed(column)
    is_kept = np.append(hashes.astype(np.int64) < cells.below, False)[codes]
    is_new = np.append(~np.isin(hashes, cells.known), False)[codes]
    ones = np.ones(len(codes)) if weights is None else weights
    return np.array([ones @ (is_kept & is_new), ones @ is_kept])


def _hashed(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    codes, distinct = _dictionary(column)
    return codes, hash_strings(distinct, seed=_SEED)


def _dictionary(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """(num_rows,) places in the list of distinct strings, its length for a null; and that list."""
    encoded = column.cast(pa.string()).combine_chunks()
    encoded = (encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded).dictionary_encode()
    codes = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)
    return codes.astype(np.int64), encoded.dictionary


def _is_number(dtype: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_list, pa.types.is_null)
    return any(test(dtype) for test in tests)


def _numbers(column: pa.ChunkedArray) -> FloatArray:
    """(num_rows,) NaN where missing."""
    if pa.types.is_list(column.type):
        column = pc.list_value_length(column)
    values: FloatArray = column.cast(pa.float64()).to_numpy()
    return values


def mixture(profiles: Sequence[tuple[Profile, float]]) -> Profile:
    """What is expected of rows that come from several samples: the weekdays of a longer window, for one.

    The same users may be in all of the samples, so their doubts are added up as if they were one.

    Args:
        profiles: counted in the same cells, each with its share of the rows; shares are positive and add up to 1.
    """
    first = profiles[0][0]
    if len(profiles) == 1:
        return first
    weights = np.array([weight for _, weight in profiles])
    columns = {}
    for name in first.columns:
        parts = [profile.columns[name].cell_shares(profile.effective_users) for profile, _ in profiles]
        # Var(sum w x) is at most m sum w^2 Var(x), however the m samples depend on each other.
        covariance = len(parts) * sum(w**2 * part.covariance for w, part in zip(weights, parts, strict=True))
        same = [profile.columns[name] for profile, _ in profiles]
        places = np.concatenate([column.places for column in same])
        masses = np.concatenate([w * np.array(column.masses) for w, column in zip(weights, same, strict=True)])
        top = max(same, key=lambda column: column.top_share)
        columns[name] = ColumnProfile(
            shares=tuple(weights @ [part.shares for part in parts]),
            covariance=_lower_triangle(covariance),
            groups=tuple(np.max([part.clusters for part in parts], axis=0)),
            mean=float(places @ masses / masses.sum()) if len(places) else None,
            places=tuple(places),
            masses=tuple(masses),
            top_share=top.top_share,
            top_value=top.top_value,
        )
    return Profile(
        cells=first.cells,
        columns=columns,
        unseen={name: float(weights @ [profile.unseen[name] for profile, _ in profiles]) for name in first.unseen},
        rows=sum(profile.rows for profile, _ in profiles),
        effective_users=min(profile.effective_users for profile, _ in profiles),
    )


def _lower_triangle(matrix: FloatArray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row[: place + 1]) for place, row in enumerate(matrix))
