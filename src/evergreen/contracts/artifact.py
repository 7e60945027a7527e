"""What all artifacts share: canonical JSON, digests, and writing a directory so that it is whole or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from evergreen.contracts.errors import ArtifactError


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no optional white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a scratch directory beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    A process that is killed leaves only the scratch directory (`.<name>.partial-*`), never a half `path`; the next
    writer of the same path removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
        if path.exists():
            shutil.rmtree(path)
        scratch.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class JsonModel(BaseModel):
    """A frozen pydantic model that lives in one JSON file inside an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def write(self, path: Path) -> None:
        """Write as indented JSON, in the order of the fields."""
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read back.

        Raises:
            ArtifactError: the file is absent or does not fit the contract.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: no such file; is {path.parent} the artifact you meant?") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise ArtifactError(
                f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; written by another version of Evergreen?"
            ) from error
