"""What features cost the online store, and what it takes to have another one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from evergreen.contracts.mapping import Mapping
from evergreen.features.store import FeatureStore
from evergreen.simulator.log import simulate_log
from tests.small_world import CONFIG, SmallWorld

BYTES = 16
"""Of a number, a time or a category, as Feast stores it for one key."""
BYTES_OF_ITEM = 16
"""In a list of items, of which the longest holds 50."""
LISTS = {"user_history": 50, "user_recent_items": 10}


def test_no_feature_takes_more_than_its_budget(small_world: SmallWorld) -> None:
    """A feature that is to cost more is named here first, with its reason."""
    [path] = (small_world.feature_store / "data").glob("*online*.db")
    sizes: dict[str, int] = {}
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as store:
        names = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in names:
            if table.startswith("evergreen_") and table != "evergreen_markers":
                sizes |= dict(store.execute(f"SELECT feature_name, max(length(value)) FROM {table} GROUP BY 1"))
    assert len(sizes) > 50 and sizes.keys() > {"user_rate_7d", "item_events_1d", "price", *LISTS}
    budgets = {name: LISTS.get(name, 0) * BYTES_OF_ITEM or BYTES for name in sizes}
    assert {name: size for name, size in sizes.items() if size > budgets[name]} == {}


def test_a_line_of_the_mapping_is_a_feature_of_the_model(tmp_path: Path) -> None:
    """From a column of the log to the model's inputs and to the online store, without code."""
    simulate_log(CONFIG, tmp_path / "log")
    for file in (tmp_path / "log" / "events").iterdir():
        events = pq.read_table(file, partitioning=None)
        weights = [len(item_id) + int(item_id[-1]) / 4 for item_id in events["item_id"].to_pylist()]
        pq.write_table(events.append_column("weight", pa.array(weights)), file)
    mapping = Mapping.load("simulated").model_dump(mode="json")
    mapping["item_features"] |= {"weight": {"column": "weight", "type": "numeric"}}
    world = SmallWorld.of_log(tmp_path, Mapping.model_validate(mapping))
    package = world.package("logistic_regression")
    assert "weight" in {feature.name for feature in package.info.features}
    online = FeatureStore.open(world.feature_store).online("ranker_v1", pa.table({"item_id": ["i0007"]}))
    assert online["weight"].to_pylist() == [5 + 7 / 4]
