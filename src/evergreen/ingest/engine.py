"""The DuckDB connection that checks and counts rows, within a fixed amount of memory."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb

from evergreen.contracts.errors import MappingError
from evergreen.contracts.mapping import Mapping
from evergreen.ingest.schema import literal

MEMORY_LIMIT = "800MB"
"""Beyond it DuckDB works on disk. Arrow's buffers come on top."""

MAX_THREADS = 4
"""Each thread works in memory of its own: those of a large machine would not fit."""


def connect(mapping: Mapping, scratch: Path) -> duckdb.DuckDBPyConnection:
    """Open a connection for one ingest.

    Args:
        mapping: its time zone becomes the connection's: times without an offset are local times.
        scratch: where DuckDB may put what does not fit in memory.

    Raises:
        MappingError: the time zone or the time format does not exist.
    """
    connection = duckdb.connect()
    connection.execute("SET enable_progress_bar = false")  # it would go to stdout
    connection.execute(f"SET memory_limit = {literal(MEMORY_LIMIT)}")
    connection.execute(f"SET threads = {min(os.cpu_count() or 1, MAX_THREADS)}")
    connection.execute(f"SET temp_directory = {literal(str(scratch / 'duckdb'))}")
    time = mapping.timestamp
    try:
        connection.execute(f"SET TimeZone = {literal(time.timezone)}")
    except duckdb.Error as error:
        raise MappingError(
            f"mapping {mapping.name}: timestamp.timezone = {time.timezone!r}: no such time zone; one is 'Europe/Berlin'"
        ) from error
    if time.format is not None:
        try:
            connection.execute("SELECT try_strptime('', ?)", [time.format]).fetchall()
        except duckdb.Error as error:
            raise MappingError(f"mapping {mapping.name}: timestamp.format = {time.format!r}: {error}") from error
    return connection
