"""Outcomes as arrays: what models said where each item was shown, and what came of it."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.outcomes import MATURE, Outcomes
from evergreen.metrics.binary import PROBABILITY_FLOOR
from evergreen.metrics.statistic import FloatArray, IntArray
from evergreen.models.calibration import Calibration, IsotonicCalibration, PlattCalibration

DRAWN = "of users that were not drawn"
"""Why matured rows are not measured."""

_COLUMNS = (
    "event_timestamp",
    "user_id",
    "request_id",
    "model_version",
    "position",
    "score",
    "clicked",
    "sampling_rate",
    "degraded",
)
_HOUR_US = 3_600_000_000


class Positions(Protocol):
    """What positions add to scores; `models.position.PositionEffects`."""

    def at(self, positions: NDArray[np.integer]) -> NDArray[np.float64]:
        """(n,) log-odds for (n,) positions, 0 for an unknown one."""
        ...


class ServedModel(Protocol):
    """What is asked of a model; `models.package.ModelPackage` has it."""

    @property
    def calibration(self) -> Calibration | None:
        """From score to probability; None for ratings."""
        ...

    @property
    def position(self) -> Positions | None:
        """None where the model learned nothing of positions."""
        ...


@dataclass(frozen=True)
class Rows:
    """Impressions, (num_rows,) each."""

    probabilities: FloatArray
    labels: FloatArray
    weights: FloatArray
    users: IntArray
    """Codes: rows of one user are not independent."""
    hours: IntArray
    """Since 1970."""

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, chosen: NDArray[np.bool_]) -> Rows:
        """Those of the rows."""
        return Rows(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @classmethod
    def together(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of all parts."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def shown_probabilities(
    probabilities: FloatArray, positions: NDArray[np.integer], model: ServedModel | None
) -> FloatArray:
    """(num_rows,) probability of a click where each item was shown, from that for the average position.

    Args:
        probabilities: (num_rows,) as served.
        positions: (num_rows,) from 1, 0 where unknown.
        model: that served them; None, or one without position effects: they stay as they are.
    """
    if model is None or model.position is None or model.calibration is None:
        return probabilities
    scores = _scores(logits_of(probabilities), model.calibration)
    return model.calibration.apply(scores + model.position.at(positions))


def _scores(logits: FloatArray, calibration: Calibration) -> FloatArray:
    """(n,) the scores that a calibration has made (n,) log-odds of: both kinds rise, so there is one."""
    if isinstance(calibration, PlattCalibration):
        return (logits - calibration.intercept) / calibration.slope
    if isinstance(calibration, IsotonicCalibration):
        beyond = logits - np.clip(logits, calibration.logits[0], calibration.logits[-1])
        inner: FloatArray = np.interp(logits, calibration.logits, calibration.scores)
        return inner + beyond / calibration.end_slope
    raise NotImplementedError(f"calibration {calibration.method!r} cannot be turned around")


def logits_of(probabilities: FloatArray) -> FloatArray:
    """(num_rows,) log-odds of (num_rows,) probabilities."""
    p = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    logits: FloatArray = np.log(p) - np.log1p(-p)
    return logits


class Reader:
    """Reads outcomes into arrays by model; beyond `max_rows` only those of users that are drawn."""

    def __init__(self, outcomes: Outcomes, models: Mapping[str, ServedModel], *, max_rows: int, seed: int) -> None:
        self._outcomes, self._models, self._max_rows, self._seed = outcomes, models, max_rows, seed
        self._codes: dict[str, int] = {}
        self._last_seen: dict[str, int] = {}
        self.mature: dict[str, Rows] = {}
        self.immature: dict[str, Rows] = {}
        self.counts: Counter[str] = Counter()

    @property
    def versions(self) -> list[str]:
        """By their last impression, the most recent last."""
        return sorted(self._last_seen, key=lambda version: (self._last_seen[version], version))

    def read(self, *, as_of: datetime, start: datetime, end: datetime) -> None:
        """Read a range of time."""
        dates = (start.astimezone(UTC).date(), end.astimezone(UTC).date())
        rows = sum(r.rows for r in self._outcomes.manifest.latest(as_of) if dates[0] <= r.date <= dates[1])
        share = min(1.0, self._max_rows / rows) if rows else 1.0
        mature: dict[str, list[Rows]] = defaultdict(list)
        immature: dict[str, list[Rows]] = defaultdict(list)
        for table in self._outcomes.rows(as_of=as_of, start=start, end=end, columns=_COLUMNS):
            for version in table["model_version"].unique().to_pylist():
                of_model = table.filter(pc.equal(table["model_version"], version))
                last = int(pc.max(of_model["event_timestamp"].cast(pa.int64())).as_py())
                self._last_seen[version] = max(last, self._last_seen.get(version, last))
                is_mature = of_model[MATURE]
                self.counts["degraded"] += pc.sum(pc.and_(is_mature, of_model["degraded"])).as_py()
                for name, parts, chosen in (
                    ("mature", mature, is_mature),
                    ("immature", immature, pc.invert(is_mature)),
                ):
                    some = of_model.filter(chosen)
                    if some.num_rows:
                        self.counts[name] += some.num_rows
                        parts[version].append(self._rows(some, self._models.get(version), share))
        self.mature = {version: Rows.together(parts) for version, parts in mature.items()}
        self.immature = {version: Rows.together(parts) for version, parts in immature.items()}

    def _rows(self, table: pa.Table, model: ServedModel | None, share: float) -> Rows:
        scores = table["score"].to_numpy()
        if len(bad := np.flatnonzero(~((scores >= 0) & (scores <= 1)))):
            raise ArtifactError(
                f"{self._outcomes.path}: score {scores[bad[0]]} of request {table['request_id'][int(bad[0])]} is no "
                "probability: quality is measured where the model predicts clicks, not ratings"
            )
        positions = table["position"].fill_null(0).to_numpy()
        users = pc.if_else(
            pc.is_valid(table["user_id"]), table["user_id"], pc.binary_join_element_wise("\0", table["request_id"], "")
        )
        encoded = users.combine_chunks().dictionary_encode()
        codes = np.array([self._code(user, share) for user in encoded.dictionary.to_pylist()], np.int64)
        rows = Rows(
            probabilities=shown_probabilities(scores, positions, model),
            labels=table["clicked"].to_numpy().astype(np.float64),
            weights=1 / table["sampling_rate"].to_numpy(),
            users=codes[encoded.indices.to_numpy()],
            hours=table["event_timestamp"].cast(pa.int64()).to_numpy() // _HOUR_US,
        )
        drawn = rows.users >= 0
        self.counts[DRAWN] += int((~drawn).sum())
        return rows if drawn.all() else rows.where(drawn)

    def _code(self, user: str, share: float) -> int:
        """A number for each user, -1 for one that is not drawn: by a hash, so that windows draw the same ones."""
        if share < 1 and zlib.crc32(f"{self._seed}:{user}".encode()) >= share * 2**32:
            return -1
        return self._codes.setdefault(user, len(self._codes))
