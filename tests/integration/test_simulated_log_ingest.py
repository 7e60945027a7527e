from __future__ import annotations

import duckdb

from evergreen.contracts.mapping import Mapping
from evergreen.ingest.log import ingest_log
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log


def test_simulated_log_is_ingested_without_loss_and_without_its_truth(tmp_path):
    config = SimulatorConfig(num_users=200, num_items=100, num_days=3, events_per_day=1_000)
    simulate_log(config, tmp_path / "log")
    snapshot = ingest_log(Mapping.load("simulated"), str(tmp_path / "log"), tmp_path / "snapshot")
    assert snapshot.manifest.rows == 3_000
    assert not any(snapshot.manifest.quarantined.values())
    written = duckdb.sql(
        f"SELECT sum(clicked::int), count(rating), sum(propensity) FROM '{tmp_path}/log/events/*.parquet'"
    )
    read = duckdb.sql(f"SELECT sum(clicked::int), count(rating), sum(propensity) FROM read_parquet({snapshot.files})")
    assert [round(value, 3) for value in read.fetchall()[0]] == [round(value, 3) for value in written.fetchall()[0]]
    columns = duckdb.sql(f"SELECT * FROM read_parquet({snapshot.files}) LIMIT 0").columns
    assert not {"click_probability", "relevance", "is_bot"} & set(columns)
