"""Small logs on disk, and what an ingest makes of them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.ingest.log import ingest_log


@dataclass(frozen=True)
class Ingested:
    snapshot: Snapshot

    @property
    def rows(self) -> list[dict[str, Any]]:
        return ds.dataset(self.snapshot.files).to_table().to_pylist()

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]

    @property
    def rejected(self) -> list[dict[str, str]]:
        path = self.snapshot.path / "quarantine" / "rejected.csv"
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def reasons(self) -> list[tuple[int, str]]:
        return [(int(row["line"]), row["reason"]) for row in self.rejected]


Ingest = Callable[..., Ingested]


@pytest.fixture
def ingest(tmp_path: Path) -> Ingest:
    """ingest(mapping, data, file="log.csv", **kwargs): write `data` (text, bytes or a path) and ingest it."""

    def run(mapping: Mapping, data: str | bytes | Path, file: str = "log.csv", **kwargs: Any) -> Ingested:
        if not isinstance(data, Path):
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        else:
            path = data
        return Ingested(ingest_log(mapping, str(path), tmp_path / "snapshot", **kwargs))

    return run


@pytest.fixture
def clicks() -> Callable[..., Mapping]:
    """clicks(**changes): a mapping for `time,user,item,click[,…]`."""

    def make(**changes: Any) -> Mapping:
        return Mapping.model_validate(
            {
                "name": "clicks",
                "kind": "impressions",
                "timestamp": {"column": "time"},
                "columns": {"user_id": "user", "item_id": "item"},
                "label": {"column": "click"},
            }
            | changes
        )

    return make
