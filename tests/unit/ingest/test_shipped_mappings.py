"""The shipped mappings read the forms that their data sets are published in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.ingest.columns import check_mapping


@pytest.mark.parametrize("name", Mapping.shipped())
def test_is_valid(name: str) -> None:
    mapping = Mapping.load(name)
    assert mapping.name == name
    check_mapping(mapping)


@pytest.mark.parametrize(
    ("name", "file", "log"),
    [
        ("movielens", "ratings.csv", "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n1,1029,3.0,1260759179\n"),
        ("movielens_100k", "u.data", "1\t31\t2.5\t1260759144\n1\t1029\t3\t1260759179\n"),
        ("movielens_1m", "ratings.dat", "1::31::2.5::1260759144\n1::1029::3::1260759179\n"),
    ],
)
def test_movielens(ingest: Any, name: str, file: str, log: str) -> None:
    result = ingest(Mapping.load(name), log, file)
    assert result.snapshot.kind is LogKind.RATINGS
    assert result.column("user_id") == ["1", "1"]
    assert result.column("item_id") == ["31", "1029"]
    assert result.column("rating") == [2.5, 3.0]
    assert result.column("event_timestamp")[0] == datetime(2009, 12, 14, 2, 52, 24, tzinfo=UTC)


def test_criteo(ingest: Any) -> None:
    integers = ["1", "", "-1", *map(str, range(10))]
    categories = [f"{n:08x}" for n in range(25)] + [""]
    log = "".join("\t".join([label, *integers, *categories]) + "\n" for label in "010")
    result = ingest(Mapping.load("criteo"), log + "1\t2\t3\n", "train.txt")
    assert result.column("clicked") == [False, True, False]
    assert result.column("item_id") == [None] * 3
    assert [(row["i1"], row["i2"], row["i3"], row["c1"], row["c26"]) for row in result.rows] == [
        (1.0, None, -1.0, "00000000", None)
    ] * 3
    assert result.reasons == [(4, "wrong number of fields")]
    assert [t.second for t in result.column("event_timestamp")] == [0, 1, 2]


def test_open_bandit_takes_the_log_and_not_the_items_beside_it(ingest: Any, tmp_path: Any) -> None:
    folder = tmp_path / "men"
    folder.mkdir()
    (folder / "item_context.csv").write_text(",item_id,item_feature_0\n0,0,-0.5\n")
    features = [f"user_feature_{n}" for n in range(4)]
    (folder / "men.csv").write_text(
        f",timestamp,item_id,position,click,propensity_score,{','.join(features)},user-item_affinity_0\n"
        "0,2019-11-24 00:01:03.979311+00:00,2,2,1,0.045525,cef,2d0,c2e,c39,0.0\n"
    )
    (row,) = ingest(Mapping.load("open_bandit"), folder).rows
    assert (row["item_id"], row["position"], row["clicked"], row["user_feature_3"]) == ("2", 2, True, "c39")
    assert row["propensity"] == pytest.approx(0.045525)
