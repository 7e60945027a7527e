"""Where the bytes of a log come from: one file, a folder, an archive's member, local or behind any fsspec URL.

Compression is told by the first bytes of a file, not by its name, and undone in a stream; nothing is unpacked to disk
but what can only be read with seeks.
"""

from __future__ import annotations

import bz2
import difflib
import gzip
import logging
import lzma
import posixpath
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from evergreen.contracts.errors import InputError
from evergreen.contracts.mapping import Source

logger = logging.getLogger(__name__)

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_SUFFIXES = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4", ".zip": "zip"}
_PARQUET_MAGIC = b"PAR1"
# What the decompressors raise on a damaged stream; gzip's BadGzipFile and Arrow's errors are OSErrors.
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True)
class SourceFile:
    """One file of a log."""

    name: str
    """Path below the folder that was given, or the file's own name: the same on every machine."""
    path: str
    """Path inside `filesystem`."""
    filesystem: Any
    size: int | None
    format: Literal["csv", "parquet"]
    compression: str | None

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Yield the decompressed bytes as a stream.

        Raises:
            InputError: the file cannot be opened, or is damaged; also when that shows while it is read.
        """
        with ExitStack() as stack:
            try:
                raw = stack.enter_context(self.filesystem.open(self.path, "rb"))
                yield stack.enter_context(_decompressed(raw, self.compression, self))
            except _DAMAGED as error:
                what = "damaged or cut short" if self.compression else "cannot be read"
                raise InputError(f"{self.name}: {what}: {str(error) or type(error).__name__}") from error

    @contextmanager
    def open_seekable(self, scratch: Path) -> Iterator[BinaryIO]:
        """Yield the decompressed bytes as a file with cheap seeks: the file itself, or a copy in `scratch`."""
        local = "file" in _protocols(self.filesystem)
        if self.compression is None and local:
            with self.open() as file:
                yield file
            return
        copy = scratch / "seekable"
        with self.open() as file, copy.open("wb") as target:
            shutil.copyfileobj(file, target, 1 << 20)
        try:
            with copy.open("rb") as file:
                yield file
        finally:
            copy.unlink()


def list_files(data: str, source: Source) -> list[SourceFile]:
    """The files of a log, sorted by name.

    Args:
        data: a path or fsspec URL of a file, of a folder, or with wildcards; chained URLs such as
            `zip://member.csv::archive.zip` reach into archives.
        source: its `pattern` chooses the files of a folder. Hidden files and those that start with `_` are skipped.

    Raises:
        InputError: nothing is there, nothing matches, or a file is empty.
    """
    if not data.strip():
        raise InputError("the path of the log is empty: give a file, a folder or a URL")
    try:
        filesystem, root = url_to_fs(data if "://" in data else str(Path(data).expanduser()))
        found = _find(filesystem, root, data, source.pattern)
    except FileNotFoundError as error:
        raise InputError(f"{data}: no such file or folder{_near_names(data)}") from error
    except (OSError, ValueError, ImportError, zipfile.BadZipFile) as error:
        raise InputError(f"{data}: cannot be opened: {error}") from error
    logger.info("%s: %d file(s)", data, len(found))
    return [_inspect(filesystem, path, name, source) for name, path in found]


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _find(filesystem: Any, root: str, data: str, pattern: str) -> list[tuple[str, str]]:
    """Pairs of (name, path), sorted by name."""
    if re.search(r"[*?\[]", root) and not filesystem.exists(root):
        folder = re.split(r"[^/]*[*?\[]", root, maxsplit=1)[0].rstrip("/")
        pattern = root[len(folder) :].lstrip("/")
        root = folder
    elif filesystem.info(root)["type"] != "directory":
        return [(posixpath.basename(root.rstrip("/")), root)]
    root = root.rstrip("/")
    matches = re.compile(glob_translate(pattern)).match
    below: dict[str, str] = {str(path)[len(root) :].lstrip("/"): str(path) for path in filesystem.find(root)}
    visible = {name: path for name, path in below.items() if not re.search(r"(^|/)[._]", name)}
    found = sorted((name, path) for name, path in visible.items() if matches(name))
    if not found:
        examples = ", ".join(sorted(visible)[:5]) or "nothing"
        raise InputError(
            f"{data}: no file matches source.pattern = {pattern!r}; the folder holds {examples}"
            f"{' …' if len(visible) > 5 else ''}"
        )
    return found


def _near_names(data: str) -> str:
    folder, name = posixpath.split(data.rstrip("/"))
    try:
        filesystem, path = url_to_fs(folder or ".")
        names = [posixpath.basename(str(p).rstrip("/")) for p in filesystem.ls(path, detail=False)]
    except (OSError, ValueError, ImportError):
        return ""
    near = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _inspect(filesystem: Any, path: str, name: str, source: Source) -> SourceFile:
    """Find out compression and format from the first bytes and the name."""
    try:
        size = filesystem.info(path).get("size")
        with filesystem.open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error}") from error
    if not head:
        raise InputError(f"{name}: the file is empty (0 bytes)")
    suffix = posixpath.splitext(name.lower())[1]
    compression = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if compression is None and suffix in _SUFFIXES:
        raise InputError(f"{name}: is named as {_SUFFIXES[suffix]} but is not: rename it, or mend it")
    inner = posixpath.splitext(name.lower())[0] if suffix in _SUFFIXES else name.lower()
    if source.format == "auto":
        parquet = inner.endswith((".parquet", ".pq")) or head.startswith(_PARQUET_MAGIC)
        format_: Literal["csv", "parquet"] = "parquet" if parquet else "csv"
    else:
        format_ = source.format
    return SourceFile(name, path, filesystem, size, format_, compression)


def _decompressed(raw: BinaryIO, compression: str | None, file: SourceFile) -> BinaryIO:
    match compression:
        case None:
            return raw
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case "bz2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case "xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case "zip":
            return _only_member(raw, file)
        case _:
            return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression))


def _only_member(raw: BinaryIO, file: SourceFile) -> BinaryIO:
    archive = zipfile.ZipFile(raw)
    members = [m for m in archive.namelist() if not m.endswith("/") and not re.search(r"(^|/)[._]", m)]
    if len(members) != 1:
        listed = ", ".join(members[:5]) + (" …" if len(members) > 5 else "")
        raise InputError(
            f"{file.name}: an archive of {len(members)} files ({listed}): choose with zip://MEMBER::{file.path}, "
            "where MEMBER may be a file, a folder or a pattern"
        )
    return cast(BinaryIO, archive.open(members[0]))
