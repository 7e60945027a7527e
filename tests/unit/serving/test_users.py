"""What a call gets when the store answers, and when it does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import numpy as np
import pytest
from prometheus_client import REGISTRY

from evergreen.features.online_reader import OnlineReadError, ReadFailure
from evergreen.features.online_user import OnlineUser
from evergreen.serving.users import UserFeatures

NOW = 1_000_000.0


class ScriptedReader:
    """Answers, or fails as it is told."""

    user_features = ("age",)
    pair_features = ("clicks", "rate")

    def __init__(self) -> None:
        self.failure: ReadFailure | None = None
        self.num_reads = 0
        self.open = True

    def nobody(self, num_categories: int) -> OnlineUser:
        return OnlineUser({"age": None}, np.full((num_categories, 2), np.nan), None)

    async def read(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[OnlineUser]:
        self.num_reads += 1
        if self.failure is not None:
            raise OnlineReadError(f"no: {self.failure}", self.failure)
        return [
            OnlineUser({"age": 7}, np.zeros((len(categories), 2)), NOW - 100) if user_id != "new" else self.nobody(1)
            for user_id, categories in asked
        ]

    async def close(self) -> None:
        self.open = False


@pytest.fixture
def reader() -> ScriptedReader:
    return ScriptedReader()


@pytest.fixture
def users(reader: ScriptedReader) -> UserFeatures:
    return UserFeatures(reader, failures=3, probe_seconds=0.01, clock=lambda: NOW)  # type: ignore[arg-type]


def get(users: UserFeatures, *user_ids: str) -> tuple[list[OnlineUser], bool]:
    return asyncio.run(users.get([(user_id, ["a", "b"]) for user_id in user_ids]))


def sample(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None
    return value


def test_users_come_as_the_reader_gives_them(users: UserFeatures) -> None:
    (one, two), degraded = get(users, "u1", "new")
    assert not degraded
    assert one.values == {"age": 7}
    assert two.updated_at is None


def test_age_of_the_features_is_observed_for_known_users_alone(users: UserFeatures) -> None:
    count, seconds = sample("evergreen_feature_age_seconds_count"), sample("evergreen_feature_age_seconds_sum")
    get(users, "u1", "new", "u2")
    assert sample("evergreen_feature_age_seconds_count") == count + 2
    assert sample("evergreen_feature_age_seconds_sum") == seconds + 200


@pytest.mark.parametrize("failure", ReadFailure)
def test_failed_read_gives_defaults_for_all_and_is_counted_by_its_reason(
    users: UserFeatures, reader: ScriptedReader, failure: ReadFailure
) -> None:
    before = sample("evergreen_online_store_failures_total", reason=failure.value)
    reader.failure = failure
    found, degraded = get(users, "u1", "u2")
    assert degraded
    assert [user.values for user in found] == [{"age": None}] * 2
    assert all(user.by_category.shape == (2, 2) and np.isnan(user.by_category).all() for user in found)
    assert sample("evergreen_online_store_failures_total", reason=failure.value) == before + 1


def test_store_that_is_away_is_left_alone_and_found_again(
    users: UserFeatures, reader: ScriptedReader, caplog: pytest.LogCaptureFixture
) -> None:
    reader.failure = ReadFailure.TIMEOUT

    async def outage() -> int:
        for _ in range(50):
            assert (await users.get([("u1", ["a"])]))[1]
        asked = reader.num_reads
        assert sample("evergreen_online_store_breaker") == 2
        reader.failure = None
        await asyncio.sleep(0.02)
        found, degraded = await users.get([("u1", ["a"])])
        assert not degraded
        assert found[0].values == {"age": 7}
        return asked

    with caplog.at_level(logging.INFO, "evergreen.serving.users"):
        assert asyncio.run(outage()) < 50
    assert sample("evergreen_online_store_breaker") == 0
    assert [(record.levelname, record.args) for record in caplog.records] == [
        ("WARNING", (users._last_error,)),
        ("INFO", (0.0, 48)),
    ]


def test_row_that_cannot_be_decoded_does_not_keep_others_from_the_store(
    users: UserFeatures, reader: ScriptedReader, caplog: pytest.LogCaptureFixture
) -> None:
    reader.failure = ReadFailure.DECODING
    for _ in range(20):
        assert get(users, "u1")[1]
    assert reader.num_reads == 20
    assert [record.getMessage() for record in caplog.records] == ["a user gets default features: no: decoding"]
    reader.failure = None
    assert not get(users, "u2")[1]


def test_fault_in_the_program_is_not_taken_for_a_store_that_is_away(reader: ScriptedReader) -> None:
    users = UserFeatures(reader)  # type: ignore[arg-type]

    async def broken(asked: object) -> list[OnlineUser]:
        raise KeyError("a mistake")

    reader.read = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyError, match="a mistake"):
        get(users, "u1")


def test_closing_closes_the_reader(users: UserFeatures, reader: ScriptedReader) -> None:
    asyncio.run(users.close())
    assert not reader.open
