from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log


class Simulation(NamedTuple):
    config: SimulatorConfig
    path: Path
    events: pa.Table
    truth: pa.Table


@pytest.fixture(scope="session")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    """A log of 50,000 impressions in five days, read back."""
    config = SimulatorConfig(num_users=1_000, num_items=300, num_days=5)
    path = tmp_path_factory.mktemp("simulator") / "log"
    simulate_log(config, path)
    events, truth = (
        pa.concat_tables(pq.read_table(file, partitioning=None) for file in sorted((path / name).iterdir()))
        for name in ("events", "truth")
    )
    return Simulation(config, path, events, truth)
