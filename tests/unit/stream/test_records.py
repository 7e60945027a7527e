"""What a message becomes: an event, a dead letter with a reason, or counted as left out."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from evergreen.contracts.errors import MappingError
from evergreen.contracts.mapping import Mapping
from evergreen.ingest.log import ingest_log
from evergreen.stream.records import Records
from tests.unit.stream.conftest import START, event, mapping, message, micros


def check(body: Any, log: Mapping | None = None, *, folder: Path, **more: Any) -> Any:
    """The event, the reason of the reject, or the reason for leaving it out."""
    checked = Records(log or mapping(), folder).check([message(body, 7, **more)])
    if checked.rejects:
        return checked.rejects[0].reason
    return checked.events[0][1] if checked.events else next(iter(checked.left_out))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "message: empty"),
        (b"{", "message: not JSON"),
        (b"\xff", "message: not JSON"),
        (b'["u"]', "message: not a JSON object"),
        (event(0, user=""), "user_id: missing"),
        (event(0, item=None), "item_id: missing"),
        (event(0) | {"time": "soon"}, "timestamp: not a time"),
        (event(0) | {"item": {"id": 1}}, "item: not a single value"),
        (event(0) | {"item": "a\0b"}, "item: NUL byte"),
        (event(0, click="maybe"), "clicked: not one of the label's values"),
        (event(5, clicked_at=START.isoformat()), "click_timestamp: before the event"),
        (event(5, clicked_at="later"), "click_timestamp: not a time"),
    ],
)
def test_bad_message_is_refused_with_the_reason(body: Any, reason: str, tmp_path: Path) -> None:
    assert check(body, folder=tmp_path) == reason


def test_message_under_another_key_is_refused(tmp_path: Path) -> None:
    assert check(event(0), folder=tmp_path, key=b"somebody") == "key: not the user_id"
    assert check(event(0), folder=tmp_path, key=None) == "key: not the user_id"


def test_event_from_the_future_is_refused_beyond_the_tolerance(tmp_path: Path) -> None:
    assert check(event(5), folder=tmp_path, timestamp_us=micros(0)).at == micros(5)
    assert check(event(5.1), folder=tmp_path, timestamp_us=micros(0)) == "timestamp: in the future"
    late_click = event(0, clicked_at=(START + timedelta(minutes=6)).isoformat())
    assert check(late_click, folder=tmp_path, timestamp_us=micros(0)) == "timestamp: in the future"


def test_when_a_positive_is_known(tmp_path: Path) -> None:
    clicked_at = (START + timedelta(minutes=2)).isoformat()
    timed = check(event(0, clicked_at=clicked_at), folder=tmp_path)
    untimed = check(event(0), folder=tmp_path)
    unclicked = check(event(0, click=False), folder=tmp_path)
    assert (timed.known, timed.seen) == (micros(2), micros(2))
    assert (untimed.known, untimed.seen) == (micros(10), micros(0))
    assert unclicked.known is None
    assert check(event(0), mapping("interactions"), folder=tmp_path).known == micros(0)
    assert check(event(0, stars=4), mapping("ratings"), folder=tmp_path).known == micros(0)


def test_negative_interaction_is_left_out_and_counted(tmp_path: Path) -> None:
    log = mapping("interactions", label={"column": "kind", "positive": ["buy"], "negative": ["*"]})
    assert check(event(0, kind="look"), log, folder=tmp_path) == "label: negative"


def test_mapping_without_users_or_times_is_refused(tmp_path: Path) -> None:
    parts = mapping().model_dump()
    with pytest.raises(MappingError, match=r"no columns\.user_id"):
        Records(Mapping.model_validate(parts | {"columns": {}}), tmp_path)
    parts = mapping("interactions").model_dump() | {"timestamp": {"start": START}}
    with pytest.raises(MappingError, match=r"no timestamp\.column"):
        Records(Mapping.model_validate(parts), tmp_path)


def test_stream_and_ingest_refuse_the_same_rows_for_the_same_reasons(tmp_path: Path) -> None:
    values: dict[str, list[Any]] = {
        "time": [START.isoformat(), "", "soon", "1970-01-01T00:00:00Z", 1772323200],
        "user": ["u", "", " u "],
        "item": ["i", ""],
        "click": [True, 1, "yes", ""],
        "clicked_at": ["", (START + timedelta(minutes=1)).isoformat(), "x"],
    }
    good = {"time": START.isoformat(), "user": "u", "item": "i", "click": True, "clicked_at": ""}
    bodies = [good | {column: value} for column, options in values.items() for value in options]
    checked = Records(mapping(), tmp_path).check([message(b, i, key=b"u") for i, b in enumerate(bodies)])
    lines = [",".join(values)] + [
        ",".join(str(value).lower() if isinstance(value, bool) else str(value) for value in body.values())
        for body in bodies
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    snapshot = ingest_log(mapping(), str(tmp_path / "log.csv"), tmp_path / "snapshot")
    refused = {reject.reason for reject in checked.rejects}
    counts = {reason: sum(reject.reason == reason for reject in checked.rejects) for reason in refused}
    assert counts == snapshot.manifest.quarantined
    assert len(checked.events) == snapshot.manifest.rows
    assert json.loads(checked.rejects[0].message.value or b"")["time"] == ""
