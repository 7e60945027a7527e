"""Step: a foreign log becomes a snapshot."""

from typing import NamedTuple

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def ingest_log(
    mapping: str, log_uri: str, as_of: str, test_hours: float, snapshot: dsl.Output[dsl.Dataset]
) -> NamedTuple("Outputs", [("as_of", str), ("snapshot_id", str), ("usage", dict)]):
    """Read a log through a mapping into an immutable snapshot.

    Args:
        mapping: name of a shipped mapping, URL of a TOML file, or TOML text.
        log_uri: path or fsspec URL of a file or folder.
        as_of: ISO 8601 time; later events are left out. Empty: all events are read.
        test_hours: length of the validation split and of the test split, so that they stay the newest rows however long
            the log gets; 0: as the mapping has it.
        snapshot: the snapshot.
    """
    from collections import namedtuple
    from datetime import timedelta
    from pathlib import Path

    from evergreen.contracts.instant import from_text
    from evergreen.contracts.mapping import Mapping
    from evergreen.ingest.log import ingest_log
    from evergreen.step import pipeline_step

    with pipeline_step("ingest_log") as usage:
        log = Mapping.load(mapping)
        if test_hours:
            spans = dict.fromkeys(("validation_span", "test_span"), timedelta(hours=test_hours))
            log = log.model_copy(update={"split": log.split.model_copy(update=spans)})
        result = ingest_log(log, log_uri, Path(snapshot.path), as_of=from_text(as_of) if as_of else None)
    snapshot.metadata["snapshot_id"] = result.id
    snapshot.metadata["rows"] = result.manifest.rows
    snapshot.metadata["quarantined"] = sum(result.manifest.quarantined.values())
    outputs = namedtuple("Outputs", ["as_of", "snapshot_id", "usage"])
    return outputs(result.as_of.isoformat(), result.id, usage)
