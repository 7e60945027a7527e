"""`evergreen run` puts what a person looks for at the top of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from evergreen.cli.run import _collect


@pytest.mark.parametrize("two_tower_was_trained", [True, False])
def test_retriever_lies_beside_the_model_where_there_is_one(tmp_path: Path, two_tower_was_trained: bool) -> None:
    artifacts, out = tmp_path / "artifacts", tmp_path / "out"
    out.mkdir()
    for folder in ("champion", "feature_store"):
        (artifacts / folder).mkdir(parents=True)
        (artifacts / folder / "manifest.json").write_text(folder)
    for page in ("report", "drift_report", "filter_report"):
        (artifacts / page).write_text("<html>")
    (artifacts / "summary").write_text(json.dumps({"steps": [{"compute_seconds": 1.25}]}))
    if two_tower_was_trained:  # otherwise nothing writes to the artifact's path
        (artifacts / "retriever").mkdir()
        (artifacts / "retriever" / "manifest.json").write_text("two towers")
    names = ("champion", "retriever", "feature_store", "report", "drift_report", "filter_report", "summary")
    outputs = {name: SimpleNamespace(path=str(artifacts / name)) for name in names}
    summary = _collect(outputs, out, wall_seconds=2.0)
    assert summary["pipeline"] == {"wall_seconds": 2.0, "compute_seconds": 1.2}
    assert (out / "model" / "manifest.json").read_text() == "champion"
    assert (out / "retriever").exists() is two_tower_was_trained
    if two_tower_was_trained:
        assert (out / "retriever" / "manifest.json").read_text() == "two towers"
