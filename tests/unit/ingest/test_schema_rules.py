"""What becomes of a value, one column at a time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from evergreen.contracts.errors import InputError
from evergreen.contracts.mapping import Mapping

from .conftest import Ingest  # noqa: TID252

Clicks = Callable[..., Mapping]
