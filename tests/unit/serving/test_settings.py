"""What an operator may choose, and what is said of a choice that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from evergreen.contracts.errors import ArtifactError, EvergreenError
from evergreen.serving.settings import ServeSettings


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """What looks like a model package and a feature store from outside."""
    model, store = tmp_path / "model", tmp_path / "feature_store"
    for file in (model / "model.json", store / "feature_store.yaml"):
        file.parent.mkdir()
        file.touch()
    return {"model": model, "feature_store": store}


def test_whole_folders_pass(folders: dict[str, Path]) -> None:
    ServeSettings.of(**folders).check()


def test_missing_directory_is_named(folders: dict[str, Path]) -> None:
    absent = folders["model"] / "absent"
    with pytest.raises(ArtifactError, match=r"absent: no such directory; give the model package"):
        ServeSettings.of(**folders | {"model": absent}).check()
    with pytest.raises(ArtifactError, match=r"absent: no such directory; give the feature store"):
        ServeSettings.of(**folders | {"feature_store": absent}).check()


def test_swapped_directories_are_named(folders: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match=r"feature_store: no model\.json in it, so it is no model package"):
        ServeSettings.of(**folders | {"model": folders["feature_store"]}).check()
    with pytest.raises(ArtifactError, match=r"model: no feature_store\.yaml in it, so it is no feature store"):
        ServeSettings.of(**folders | {"feature_store": folders["model"]}).check()


@pytest.mark.parametrize("option", ["retriever", "model_repository", "rules", "token_file"])
def test_missing_file_is_named_with_its_option(folders: dict[str, Path], option: str) -> None:
    with pytest.raises(ArtifactError, match=rf"--{option.replace('_', '-')} .*absent: no such"):
        ServeSettings.of(**folders, **{option: folders["model"] / "absent"}).check()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("port", 70_000),
        ("deadline_ms", 0),
        ("impression_sampling", 0),
        ("name", "a/b"),
        ("trusted_header", "X-User: me"),
        ("threads", 0),
        ("colour", "green"),
    ],
)
def test_value_out_of_range_is_named(folders: dict[str, Path], option: str, value: object) -> None:
    with pytest.raises(EvergreenError, match=rf"^{option}={value!r}: "):
        ServeSettings.of(**folders, **{option: value})


def test_retriever_is_the_one_that_is_named_or_the_one_beside_the_model(folders: dict[str, Path]) -> None:
    settings = ServeSettings.of(**folders)
    assert settings.retriever_of(settings.model) is None
    beside = settings.model.parent / "retriever"
    beside.mkdir()
    assert settings.retriever_of(settings.model) is None, "an empty folder is no package"
    (beside / "model.json").touch()
    assert settings.retriever_of(settings.model) == beside
    named = ServeSettings.of(**folders, retriever=settings.model)
    assert named.retriever_of(settings.model) == settings.model


def test_retriever_is_looked_for_beside_what_a_link_leads_to(folders: dict[str, Path], tmp_path: Path) -> None:
    (folders["model"].parent / "retriever").mkdir()
    (folders["model"].parent / "retriever" / "model.json").touch()
    links = tmp_path / "links"
    links.mkdir()
    (links / "current").symlink_to(folders["model"])
    settings = ServeSettings.of(model=links / "current", feature_store=folders["feature_store"])
    found = settings.retriever_of(settings.model)
    assert found is not None and found.samefile(folders["model"].parent / "retriever")
