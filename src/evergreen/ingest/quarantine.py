"""The quarantine: every row that broke the schema, with its source, its line and the reason."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from evergreen.contracts.artifact import sha256_file
from evergreen.ingest.blocks import Reject

FILE = "quarantine/rejected.csv"
MAX_ROW_CHARACTERS = 4096
"""What is kept of a row; the source has the rest."""


class Quarantine:
    """Writes `quarantine/rejected.csv` below a folder; without a reject there is no file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        """The first row of each reason, for people."""
        self._file: TextIO | None = None
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, source: str, reject: Reject) -> None:
        """Write one row."""
        if self._file is None:
            self.path.parent.mkdir(parents=True)
            self._file = self.path.open("w", encoding="utf-8", newline="")
            self._writer = csv.writer(self._file, lineterminator="\n")
            self._writer.writerow(["source", "line", "reason", "row"])
        row = reject.row if len(reject.row) <= MAX_ROW_CHARACTERS else reject.row[:MAX_ROW_CHARACTERS] + "…"
        self._writer.writerow([source, reject.line, reject.reason, row])
        if reject.reason not in self.reasons:
            self.examples[reject.reason] = f"{source}, line {reject.line}: {row[:200]}"
        self.reasons[reject.reason] += 1

    @property
    def total(self) -> int:
        """Number of rows so far."""
        return self.reasons.total()

    def counts(self) -> dict[str, int]:
        """Rows by reason, sorted by reason."""
        return dict(sorted(self.reasons.items()))

    def sha256(self) -> str | None:
        """Digest of the file, None when there is none; closes it."""
        if self._file is None:
            return None
        self._file.close()
        return sha256_file(self.path)

    def describe(self, top: int = 3) -> str:
        """The most frequent reasons with an example each, one a line."""
        return "\n".join(
            f"  {count} x {reason}; for example {self.examples[reason]}"
            for reason, count in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))[:top]
        )
