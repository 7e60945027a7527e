"""`evergreen stream` tells what is wrong with its options before it reads anything."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from evergreen.cli.stream import fraud_rules, stream
from evergreen.contracts.errors import ArtifactError, InputError
from evergreen.contracts.mapping import LogKind
from evergreen.fraud.rules import limits_for
from evergreen.stream import metrics
from evergreen.stream.consumer import StreamConsumer, StreamSettings
from tests.servers import free_port
from tests.unit.stream.conftest import Stream, event, mapping

OPTIONS = ["--brokers", "127.0.0.1:1", "--topic", "clicks"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rewind", "a while", "'a while' is not a duration; write e.g. 90s"),
        ("--future-tolerance", "5", "'5' is not a duration"),
        ("--kafka-option", "security.protocol", "is not NAME=VALUE"),
        ("--clock", "sun", "'sun' is not one of"),
    ],
)
def test_option_that_cannot_be_read_is_named(option: str, value: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(stream, [*OPTIONS, "--store", str(tmp_path), option, value])
    assert result.exit_code == 2
    assert message in result.output


def test_folder_without_a_feature_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="create the feature store first"):
        stream.main([*OPTIONS, "--store", str(tmp_path)], standalone_mode=False)


def test_broker_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evergreen.stream.consumer._BROKER_SECONDS", 0.3)
    address = f"127.0.0.1:{free_port()}"
    settings = StreamSettings(address, "clicks", "evergreen", "clicks.dead-letter")
    processor = Stream(tmp_path, mapping()).processor
    with pytest.raises(InputError, match=f"--brokers {address}: no answer"):
        StreamConsumer(settings, processor, threading.Event())


def test_events_that_break_the_rules_of_fraud_are_counted_and_stay_in_the_features(tmp_path: Path) -> None:
    limits = limits_for(LogKind.INTERACTIONS)
    fast = metrics.SUSPICIOUS.labels("velocity")
    before = fast._value.get()
    s = Stream(tmp_path, mapping("interactions"), judge=fraud_rules(limits, LogKind.INTERACTIONS))
    requests = limits.requests_per_minute + 5
    s.send(*(event(i * 0.5 / requests, str(i)) for i in range(requests)), first=0)
    assert fast._value.get() - before == 5
    assert s.online.values()["events_1h"] == requests
    s.send(*(event(i * 0.5 / requests, str(i)) for i in range(requests)), first=0)
    assert fast._value.get() - before == 5, "what is read again is not judged again"
