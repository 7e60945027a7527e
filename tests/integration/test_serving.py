"""From a simulated log to answers over HTTP, with every real part: tables, Feast, a trained package, KServe."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import RequestError
from evergreen.contracts.impressions import read_impressions
from evergreen.features.point_in_time import items_as_of, join_features
from evergreen.monitoring.skew import check_skew
from evergreen.serving.client import RecommenderClient
from evergreen.serving.recommender import Recommender
from tests.serving import ask
from tests.small_world import SmallWorld

MODEL = "deepfm"


@pytest.fixture(scope="module")
def recommender(small_world: SmallWorld) -> Recommender:
    return Recommender.load(small_world.package(MODEL).path, small_world.feature_store)


@pytest.fixture(scope="module")
def impressions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("impressions")


@pytest.fixture(scope="module")
def server(small_world: SmallWorld, impressions: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "evergreen.cli", "serve", "--port", str(port)]
    command += ["--model", str(small_world.package(MODEL).path), "--feature-store", str(small_world.feature_store)]
    command += ["--impressions", str(impressions)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        url = f"http://127.0.0.1:{port}"
        with RecommenderClient(url) as client:
            client.wait_until_ready(timeout=120, still_alive=lambda: process.poll() is None)
        yield url, process
        process.kill()


def known_user(small_world: SmallWorld) -> str:
    return str(pq.read_table(small_world.snapshot.files[-1], columns=["user_id"])["user_id"][-1].as_py())


@pytest.mark.parametrize("stranger", [False, True])
def test_served_features_and_scores_equal_offline_ones(
    small_world: SmallWorld, recommender: Recommender, stranger: bool
) -> None:
    """No training-serving skew: what is served is what the model makes of the point-in-time join."""
    user_id = "never seen" if stranger else known_user(small_world)
    at = small_world.snapshot.as_of + timedelta(milliseconds=1)
    items = items_as_of(small_world.tables, small_world.snapshot.as_of)
    n = items.num_rows
    spine = pa.table(
        {
            "event_timestamp": pa.array([at] * n, pa.timestamp("us", tz="UTC")),
            "user_id": pa.array([user_id] * n),
            "item_id": items["item_id"],
            "category": items["category"],
        }
    )
    offline = join_features(spine, small_world.tables)
    device = pa.array(["phone"] * n)
    package = small_world.package(MODEL)
    wanted = package.predict(offline.append_column("device", device))
    answer = ask(recommender, user_id=user_id, k=500, context={"device": "phone"}, event_timestamp=at)
    expected = dict(zip(items["item_id"].to_pylist(), wanted.tolist(), strict=True))
    assert dict(zip(answer.item_ids, answer.scores.tolist(), strict=True)) == pytest.approx(expected, abs=1e-6)
    assert np.ptp(answer.scores) > 1e-4
    assert answer.known_user is not stranger and not answer.degraded


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_served_package_answers_as_in_process(
    small_world: SmallWorld, recommender: Recommender, server: tuple[str, subprocess.Popen[str]], protocol: str
) -> None:
    url, _ = server
    user_id, at = known_user(small_world), small_world.snapshot.as_of
    with RecommenderClient(url) as client:
        answer = client.recommend(user_id, k=5, event_timestamp=at, protocol=protocol)  # type: ignore[arg-type]
        expected = ask(recommender, user_id=user_id, k=5, event_timestamp=at)
        assert [item.item_id for item in answer.items] == expected.item_ids
        assert [item.probability for item in answer.items] == pytest.approx(expected.scores.tolist(), abs=1e-6)
        assert answer.model_version == recommender.model_version
        with pytest.raises(RequestError, match="device=3: must be a string"):
            client.recommend(user_id, context={"device": 3}, protocol=protocol)  # type: ignore[arg-type]


def test_server_stops_when_it_is_told_to_and_leaves_its_impressions(
    small_world: SmallWorld, server: tuple[str, subprocess.Popen[str]], impressions: Path, tmp_path: Path
) -> None:
    url, process = server
    with RecommenderClient(url) as client:
        users, at = (known_user(small_world), "never seen"), small_world.snapshot.as_of
        answers = [client.recommend(u, k=4, event_timestamp=at, request_id=f"shown to {u}") for u in users]
    assert httpx.get(f"{url}/v2/health/ready", trust_env=False).json() == {"ready": True}
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    output = process.stdout.read() if process.stdout else ""
    assert "Traceback" not in output, output
    rows = pa.concat_tables(read_impressions(str(impressions)))
    for answer in answers:
        of_request = rows.filter(pc.equal(rows["request_id"], answer.request_id))
        assert of_request["item_id"].to_pylist() == [item.item_id for item in answer.items]
        assert of_request["score"].to_pylist() == [item.probability for item in answer.items]
    assert check_skew(str(impressions), small_world.tables, tmp_path / "skew.json").is_clean
