"""The catalogue as one Parquet file that a store publishes and servers read: (item_id, category, item_first_seen)."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from evergreen.contracts.errors import ArtifactError


def read_items(url: str) -> pa.Table:
    """Read a published catalogue.

    Args:
        url: path or fsspec URL of the file.

    Returns:
        (num_items) item_id, category and item_first_seen, sorted by item_id.

    Raises:
        ArtifactError: there is none, it cannot be read, or it is no catalogue.
    """
    try:
        filesystem, path = url_to_fs(url)
        # Whole, and not by its listing: a file that is replaced between two reads would be half of each.
        table = pq.read_table(pa.BufferReader(filesystem.cat_file(path)))
    except Exception as error:  # every file system has errors of its own
        raise ArtifactError(f"{url}: the items cannot be read: {error}; are they published there?") from error
    if missing := {"item_id", "category"} - set(table.column_names):
        raise ArtifactError(f"{url}: no column {sorted(missing)[0]!r}, so it is no catalogue of items")
    return table
