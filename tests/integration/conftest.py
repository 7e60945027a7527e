from __future__ import annotations

import pytest

from tests.small_world import SmallWorld


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return SmallWorld.make(tmp_path_factory.mktemp("small_world"))
