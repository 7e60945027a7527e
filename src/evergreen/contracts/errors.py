"""The exception tree. Every message names the value, where it came from, and the way out.

EvergreenError
├── MappingError       a mapping file is broken or does not fit the log
├── InputError         a log cannot be read: missing, empty, unreadable, a column is absent
├── ArtifactError      an artifact is not what its contract promises: missing file, digest, schema, order
├── LeakageError       a feature or a split knows its own future
├── TrainingError      a model cannot be trained on this data: empty split, one class, diverging loss
└── RequestError       a request for recommendations is malformed (the caller's mistake: HTTP 400)
"""


class EvergreenError(Exception):
    """Root of all errors that a person using Evergreen can act upon."""


class MappingError(EvergreenError):
    """A mapping file is broken or does not fit the log it is used on."""


class InputError(EvergreenError):
    """A log cannot be read: it is missing, empty, unreadable, or lacks a column."""


class ArtifactError(EvergreenError):
    """An artifact is not what its contract promises."""


class LeakageError(EvergreenError):
    """A feature or a split knows its own future."""


class TrainingError(EvergreenError):
    """A model cannot be trained on this data."""


class RequestError(EvergreenError):
    """A request for recommendations is malformed; the caller can mend it."""
