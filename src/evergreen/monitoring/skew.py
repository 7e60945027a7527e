"""Training-serving skew: were the features that a server scored with those that training would have had?

Logged features are compared with what the offline store gives for the same user and item at the request's own time.
Any difference is one that the model was not trained for: a feature computed in two ways, a store that is behind, a
default in the place of a value. Data drift is something else (`monitoring.drift`): there the world has changed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.impressions import feature_table, first_rows, read_impressions
from evergreen.features.point_in_time import join_features
from evergreen.features.request import request_features

MAX_EXAMPLES = 5

Join = Callable[[pa.Table], pa.Table]
"""Appends the offline features to rows with event_timestamp, user_id, item_id and category."""

logger = logging.getLogger(__name__)

_SPINE = ("event_timestamp", "user_id", "item_id", "category")
_CATEGORY = "category"
_OFFLINE_CATEGORY = "item_category"


class SkewExample(JsonModel):
    """One value that differs."""

    request_id: str
    event_timestamp: AwareDatetime
    user_id: str | None
    item_id: str | None
    served: Any
    offline: Any


class FeatureSkew(JsonModel):
    """One feature: how often the server had another value than the offline store."""

    rows: int
    equal: int
    """Both null counts as equal, and so does NaN with NaN; null and NaN differ."""
    differing: int
    only_served: int
    """Of those that differ: null offline."""
    only_offline: int
    """Of those that differ: null as served."""
    max_abs_difference: float | None
    """Of numbers that both sides know; null where there is none, or for text."""
    examples: tuple[SkewExample, ...]

    @property
    def share(self) -> float:
        """Share of the rows that differ, in [0, 1]."""
        return self.differing / self.rows if self.rows else 0.0


class SkewReport(JsonModel):
    """What the check found."""

    rows: int
    """Shown items that were compared."""
    requests: int
    first: AwareDatetime | None
    """Time of the first request that was compared."""
    last: AwareDatetime | None
    known_at: AwareDatetime | None
    """The moment whose stored features were compared; null: each request's own."""
    tolerance: float
    left_out: dict[str, int]
    """Rows that were not compared, by reason."""
    not_compared: dict[str, str]
    """Features that were not, with the reason."""
    features: dict[str, FeatureSkew]

    @property
    def differing(self) -> tuple[str, ...]:
        """Names of the features that differ, the one that differs most often first."""
        names = [name for name, skew in self.features.items() if skew.differing]
        return tuple(sorted(names, key=lambda name: -self.features[name].share))

    @property
    def is_clean(self) -> bool:
        """Whether something was compared and nothing differs."""
        return self.rows > 0 and not self.differing


def check_skew(
    impressions: str,
    tables: FeatureTables,
    out_json: Path,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    known_at: datetime | None = None,
    tolerance: float = 0.0,
    join: Join | None = None,
) -> SkewReport:
    """Compare an impression log with the offline store, and write the report.

    Degraded answers are left out, as defaults stand for their features, and so are requests later than the tables know.

    Args:
        impressions: folder or fsspec URL of the log.
        tables: feature tables that reach over the time of the requests.
        out_json: the report to write; its folder must exist.
        start: impressions served before it are left aside.
        end: impressions served at or after it are left aside.
        known_at: compare with what was stored at this moment, for example the last materialization, instead of at each
            request's own time. What differs then is wrong, and not merely late.
        tolerance: difference of two numbers up to which they count as equal.
        join: the offline store; default: the point-in-time join over `tables`, which gives what Feast's gives.

    Raises:
        ArtifactError: no log there, or there are no impressions to compare.
        ValueError: the tolerance is negative or not finite.
    """
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance={tolerance}: must be a finite number of at least 0")
    comparison = Comparison(join or partial(join_features, tables=tables), known_at=known_at, tolerance=tolerance)
    known_until = tables.manifest.as_of
    left_out: Counter[str] = Counter()
    for table in read_impressions(impressions, start=start, end=end):
        late = pc.greater(table["event_timestamp"], pa.scalar(known_until, table.schema.field("event_timestamp").type))
        left_out["degraded"] += pc.sum(table["degraded"]).as_py()
        left_out["later than the feature tables"] += pc.sum(pc.and_not(late, table["degraded"])).as_py()
        comparison.add(table.filter(pc.invert(pc.or_(late, table["degraded"]))))
    report = comparison.report({reason: rows for reason, rows in left_out.items() if rows})
    if not report.rows:
        raise ArtifactError(
            f"{impressions}: no impressions to compare (left out: {report.left_out or 'none'}): give a range of time "
            f"that has some and ends by {known_until}, or feature tables that reach further"
        )
    report.write(out_json)
    if report.is_clean:
        logger.info("no skew: %d features of %d rows are equal", len(report.features), report.rows)
    else:
        worst = ", ".join(f"{n} ({report.features[n].share:.1%})" for n in report.differing[:MAX_EXAMPLES])
        logger.warning("%d of %d features differ: %s", len(report.differing), len(report.features), worst)
    return report


class Comparison:
    """Adds up what differs, a table of impressions at a time."""

    def __init__(self, join: Join, *, known_at: datetime | None = None, tolerance: float = 0.0) -> None:
        self._join = join
        self._known_at = known_at
        self._tolerance = tolerance
        self._rows = self._requests = 0
        self._range: list[datetime] = []
        self._features: dict[str, FeatureSkew] = {}
        self._not_compared: dict[str, str] = {}

    def add(self, impressions: pa.Table) -> None:
        """Compare some impressions with the offline store.

        Args:
            impressions: (num_rows) with `impression_schema`.
        """
        if not impressions.num_rows:
            return
        served, offline = feature_table(impressions), self._offline(impressions)
        if impressions["item_id"].null_count < impressions.num_rows:
            served = served.append_column(_CATEGORY, impressions[_CATEGORY])
            offline = offline.append_column(_CATEGORY, offline[_OFFLINE_CATEGORY])
        for name in served.column_names:
            if name not in offline.column_names:
                self._not_compared[name] = "the offline store has no such feature: the request brings it"
                continue
            skew = compare(served[name], offline[name], impressions, tolerance=self._tolerance)
            self._features[name] = _together(self._features[name], skew) if name in self._features else skew
        self._rows += impressions.num_rows
        self._requests += len(first_rows(impressions))
        ends = pc.min_max(impressions["event_timestamp"]).as_py()
        times = [*self._range, ends["min"], ends["max"]]
        self._range = [min(times), max(times)]

    def report(self, left_out: dict[str, int]) -> SkewReport:
        """What was found so far."""
        first, last = self._range or (None, None)
        return SkewReport(
            rows=self._rows,
            requests=self._requests,
            first=first,
            last=last,
            known_at=self._known_at,
            tolerance=self._tolerance,
            left_out=left_out,
            not_compared=self._not_compared,
            features=self._features,
        )

    def _offline(self, impressions: pa.Table) -> pa.Table:
        spine = impressions.select(_SPINE)
        if self._known_at is None:
            return self._join(spine).drop_columns(list(_SPINE))
        asked = spine["event_timestamp"]
        moment = pa.repeat(pa.scalar(self._known_at, asked.type), spine.num_rows)
        spine = spine.set_column(0, "event_timestamp", moment)
        offline = self._join(spine).drop_columns(list(_SPINE))
        of_request = request_features(asked, offline)  # how long ago is still the request's own matter
        stored = offline.drop_columns(of_request.column_names)
        return pa.table({**_columns(stored), **_columns(of_request)})


def compare(
    served: pa.ChunkedArray, offline: pa.ChunkedArray, impressions: pa.Table, *, tolerance: float
) -> FeatureSkew:
    """One feature of some impressions.

    Args:
        served: (num_rows) as logged.
        offline: (num_rows) as the offline store has it; cast to the type of `served`.
        impressions: (num_rows) the rows that they are of, for examples.
        tolerance: of numbers.
    """
    ours, theirs = served.combine_chunks(), offline.cast(served.type).combine_chunks()
    known_ours, known_theirs = _known(ours), _known(theirs)
    both = known_ours & known_theirs
    same = ~known_ours & ~known_theirs
    furthest = None
    if pa.types.is_floating(ours.type):
        a, b = (x.fill_null(0.0).to_numpy() for x in (ours, theirs))
        with np.errstate(invalid="ignore"):  # inf - inf
            distance = np.abs(a - b)
        near = (a == b) | (distance <= tolerance) | (np.isnan(a) & np.isnan(b))
        comparable = distance[both & np.isfinite(distance)]
        furthest = float(comparable.max()) if len(comparable) else None
    elif pa.types.is_list(ours.type):
        near = _equal_lists(ours, theirs, both)
    else:
        near = pc.equal(ours, theirs).fill_null(False).to_numpy(zero_copy_only=False)
    same |= both & near
    places = np.flatnonzero(~same)
    return FeatureSkew(
        rows=len(same),
        equal=int(same.sum()),
        differing=len(places),
        only_served=int((known_ours & ~known_theirs).sum()),
        only_offline=int((known_theirs & ~known_ours).sum()),
        max_abs_difference=furthest,
        examples=tuple(_example(impressions, ours, theirs, int(place)) for place in places[:MAX_EXAMPLES]),
    )


def _equal_lists(ours: pa.ListArray, theirs: pa.ListArray, both: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(num_rows,) where both are lists of the same values in the same order."""
    equal = np.zeros(len(ours), np.bool_)
    lengths = [pc.list_value_length(x).fill_null(-1).to_numpy() for x in (ours, theirs)]
    rows = np.flatnonzero(both & (lengths[0] == lengths[1]))
    values = [x.take(pa.array(rows)).flatten() for x in (ours, theirs)]
    differ = pc.fill_null(pc.not_equal(*values), False).to_numpy(zero_copy_only=False)
    differ = differ | (_known(values[0]) != _known(values[1]))
    owner = np.repeat(np.arange(len(rows)), lengths[0][rows])
    equal[rows] = np.bincount(owner, weights=differ, minlength=len(rows)) == 0
    return equal


def _together(a: FeatureSkew, b: FeatureSkew) -> FeatureSkew:
    distances = [d for d in (a.max_abs_difference, b.max_abs_difference) if d is not None]
    return FeatureSkew(
        rows=a.rows + b.rows,
        equal=a.equal + b.equal,
        differing=a.differing + b.differing,
        only_served=a.only_served + b.only_served,
        only_offline=a.only_offline + b.only_offline,
        max_abs_difference=max(distances, default=None),
        examples=(*a.examples, *b.examples)[:MAX_EXAMPLES],
    )


def _example(impressions: pa.Table, ours: pa.Array, theirs: pa.Array, place: int) -> SkewExample:
    row = {name: impressions[name][place].as_py() for name in ("request_id", "event_timestamp", "user_id", "item_id")}
    return SkewExample(**row, served=_plain(ours[place].as_py()), offline=_plain(theirs[place].as_py()))


def _known(values: pa.Array) -> NDArray[np.bool_]:
    known: NDArray[np.bool_] = values.is_valid().to_numpy(zero_copy_only=False)
    return known


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))


def _plain(value: Any) -> Any:
    """A value for JSON, which has no word for a number that is not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
