"""Real logs, read with the shipped mappings; what comes out is compared with another reader's answer."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.ingest.log import ingest_log

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DESKDROP = DATA / "deskdrop"
OPEN_BANDIT = DATA / "obd_small"

needs_deskdrop = pytest.mark.skipif(not DESKDROP.is_dir(), reason=f"{DESKDROP} is not here")
needs_open_bandit = pytest.mark.skipif(not OPEN_BANDIT.is_dir(), reason=f"{OPEN_BANDIT} is not here")


@needs_deskdrop
def test_deskdrop_is_read_whole(tmp_path: Path) -> None:
    import pandas as pd

    snapshot = ingest_log(Mapping.load("deskdrop"), str(DESKDROP), tmp_path / "snapshot")
    log = pd.read_csv(DESKDROP / "users_interactions.csv", dtype=str)
    manifest = snapshot.manifest
    assert (manifest.rows, manifest.quarantined, manifest.left_out) == (len(log), {}, {})
    assert (manifest.num_users, manifest.num_items) == (log.personId.nunique(), log.contentId.nunique())
    log = log.sort_values("timestamp", key=lambda column: column.astype(int), kind="stable")
    events = ds.dataset(snapshot.files).to_table().to_pandas()
    for name, column in {"user_id": "personId", "item_id": "contentId", "request_id": "sessionId"}.items():
        assert events[name].tolist() == log[column].tolist()
    assert (events.event_timestamp.astype("int64") // 10**6).tolist() == log.timestamp.astype(int).tolist()
    assert int(events.region.isna().sum()) == int(log.userRegion.isna().sum())
    assert len(manifest.files) == events.event_timestamp.dt.date.nunique()
    Snapshot.load(snapshot.path, verify=True)


@needs_open_bandit
@pytest.mark.parametrize("policy", ["random", "bts"])
@pytest.mark.parametrize("campaign", ["men", "women"])
def test_open_bandit_is_read_whole(tmp_path: Path, policy: str, campaign: str) -> None:
    import pandas as pd

    folder = OPEN_BANDIT / policy / campaign
    snapshot = ingest_log(Mapping.load("open_bandit"), str(folder), tmp_path / "snapshot")
    log = pd.read_csv(folder / f"{campaign}.csv")
    events = pq.read_table(tmp_path / "snapshot" / "events").to_pandas()
    assert (snapshot.manifest.rows, snapshot.manifest.quarantined) == (len(log), {})
    assert snapshot.manifest.num_positives == log.click.sum()
    assert events.propensity.sum() == pytest.approx(log.propensity_score.sum(), rel=1e-5)
    assert events.position.value_counts().to_dict() == log.position.value_counts().to_dict()
    assert events.item_id.value_counts().sort_index().tolist() == (
        log.item_id.astype(str).value_counts().sort_index().tolist()
    )


@needs_open_bandit
def test_open_bandit_inside_an_archive_gives_the_same_snapshot(tmp_path: Path) -> None:
    """As in the wheel of obp 0.4.1: zip://obp/dataset/obd/random/men::obp-0.4.1-py3-none-any.whl."""
    with zipfile.ZipFile(tmp_path / "obp.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in (OPEN_BANDIT / "random" / "men").iterdir():
            wheel.write(file, f"obp/dataset/obd/random/men/{file.name}")
        wheel.writestr("obp/__init__.py", "")
    mapping = Mapping.load("open_bandit")
    url = f"zip://obp/dataset/obd/random/men::{tmp_path / 'obp.whl'}"
    inside = ingest_log(mapping, url, tmp_path / "inside")
    outside = ingest_log(mapping, str(OPEN_BANDIT / "random" / "men"), tmp_path / "outside")
    assert inside.id == outside.id
