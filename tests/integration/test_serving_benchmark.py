"""What the serving benchmark compares gives the same scores, and what it throws at the server is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from benchmarks.serving.bad_calls import KINDS, bad_calls
from benchmarks.serving.bad_requests import fire
from benchmarks.serving.compare import CHECKED, TOLERANCE, Way, largest_difference
from benchmarks.serving.floor import pack_users
from benchmarks.serving.load import ask
from benchmarks.serving.processes import running
from benchmarks.serving.requests import Asked, make_requests, read_v1, read_v2
from benchmarks.serving.setting import Setting, open_setting
from benchmarks.serving.world import with_feasts_own_redis
from evergreen.models.package import ModelPackage
from evergreen.simulator.config import SimulatorConfig

SMALL = SimulatorConfig(num_users=60, num_items=60, num_days=8, events_per_day=600, new_item_fraction=0)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with open_setting(tmp_path_factory.mktemp("world"), config=SMALL) as opened:
        yield opened


@pytest.mark.heavy
def test_floor_and_feast_predictors_score_as_the_server_does(setting: Setting, tmp_path: Path) -> None:
    world, store, redis = setting.world, setting.store, setting.redis
    model = world.packages / "deepfm"
    users = world.users(10)
    pack_users(store, ModelPackage.load(model), users, redis.address)
    feasts = with_feasts_own_redis(store, tmp_path / "feast", redis.address)
    common = ("--model", model, "--feature-store")
    floor = ("benchmarks.serving.floor", *common, store.path, "--redis", redis.address)
    three = ("benchmarks.serving.feast_to_dict", *common, feasts, "--look-ups", "3")
    with running("floor", floor, tmp_path) as at_floor, running("feast", three, tmp_path) as on_feast:
        ways = [
            Way("V1", setting.server, Asked.v1, read_v1, 1),
            Way("V2 JSON", setting.server, Asked.v2_json, read_v2, 1),
            Way("V2 binary", setting.server, Asked.v2_binary, read_v2, 1),
            Way("floor", at_floor, Asked.v1, read_v1, 1),
            Way("Feast", on_feast, Asked.v1, read_v1, 1),
        ]
        asked = make_requests([*users, "a stranger"], world.items(), 20, CHECKED, world.as_of)
        assert any(request.user_id == "a stranger" for request in asked)
        assert largest_difference(ways, asked) < TOLERANCE


def test_bad_calls_are_refused_and_good_ones_still_answered(setting: Setting) -> None:
    world = setting.world
    calls = bad_calls(10 * len(KINDS), users=world.users(20), items=world.items())
    outcome = uvloop.run(fire(setting.server.port, calls))
    assert outcome.wrong == {}
    assert setting.server.is_ready()
    (good,) = make_requests(world.users(5), world.items(), 20, 1, world.as_of)
    assert ask(setting.server.port, good.v1()).status == 200
    assert "Traceback" not in setting.server.log.read_text()
