"""Bundles in a folder and in a store of objects: whole or not at all, and never changed."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from evergreen.contracts.artifact import sha256_file
from evergreen.contracts.errors import ArtifactError
from evergreen.features.items_file import read_items
from evergreen.features.store import FeatureStore
from evergreen.release.bundle import BundleManifest, ModelStore
from tests.s3_server import s3_server
from tests.small_world import SmallWorld


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return SmallWorld.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=["folder", "claim", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ModelStore:
    if request.param == "objects":
        fsspec.filesystem("memory").store.clear()
        return ModelStore("memory://models/evergreen")
    return ModelStore("pvc://models/evergreen", tmp_path) if request.param == "claim" else ModelStore(str(tmp_path))


def package(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    return folder


def downloaded(store: ModelStore, name: str, folder: Path) -> Path:
    """What a predictor finds under /mnt/models."""
    files, path = fsspec.url_to_fs(f"{store._folder}/{name}")
    files.get(f"{path}/", f"{folder}/", recursive=True)
    return folder


def test_bundle_holds_all_that_serves_and_is_told_by_its_uri(
    world: SmallWorld, store: ModelStore, tmp_path: Path
) -> None:
    towers = package(tmp_path / "towers")
    uri = store.write("m-1", package=package(tmp_path / "p"), feature_store=world.feature_store, retriever=towers)
    assert uri == store.storage_uri("m-1") == f"{store.url}/m-1"
    found = downloaded(store, "m-1", tmp_path / "mnt")
    manifest = BundleManifest.read(found / BundleManifest.FILE)
    assert {"model/model.json", "retriever/model.json", "feature_store/items.parquet"} <= set(manifest.files)
    assert {name: sha256_file(found / name) for name in manifest.files} == manifest.files
    slim, full = FeatureStore.open(found / "feature_store"), FeatureStore.open(world.feature_store)
    assert slim.items().equals(full.items())
    users = pa.table({"user_id": ["u0001", "u0002", "nobody"]})
    assert slim.online("ranker_v1", users).equals(full.online("ranker_v1", users))
    assert pq.read_metadata(found / "feature_store" / "data" / "user_activity.parquet").num_rows == 0


def test_bundle_that_is_there_stays_as_it_is(world: SmallWorld, store: ModelStore, tmp_path: Path) -> None:
    made = package(tmp_path / "p")
    store.write("m-1", package=made, feature_store=world.feature_store)
    (made / "model.json").write_text('{"another": true}')
    store.write("m-1", package=made, feature_store=world.feature_store)
    found = downloaded(store, "m-1", tmp_path / "mnt")
    assert json.loads((found / "model" / "model.json").read_text()) == {}
    assert not (found / "retriever").exists()


def test_bundle_that_broke_off_is_none_and_is_written_anew(
    world: SmallWorld, store: ModelStore, tmp_path: Path
) -> None:
    files, folder = fsspec.url_to_fs(f"{store._folder}/m-1/model")
    files.makedirs(folder, exist_ok=True)
    files.pipe_file(f"{folder}/left_over.bin", b"half")
    assert not store.has("m-1")
    store.write("m-1", package=package(tmp_path / "p"), feature_store=world.feature_store)
    assert store.has("m-1")
    assert not (downloaded(store, "m-1", tmp_path / "mnt") / "model" / "left_over.bin").exists()


def test_newest_catalogue_and_store_are_published_over_the_older_ones(
    world: SmallWorld, store: ModelStore, tmp_path: Path
) -> None:
    for _ in range(2):
        store.publish(world.feature_store)
    own = FeatureStore.open(world.feature_store).items()
    assert read_items(store.items_url).equals(own)
    assert FeatureStore.open(downloaded(store, "feature_store", tmp_path / "store")).items().equals(own)


def test_store_of_a_cluster_goes_into_a_bundle_without_its_password_and_without_spark(
    world: SmallWorld, tmp_path: Path
) -> None:
    store = FeatureStore.create(tmp_path / "store", world.tables, config="feature_store.cluster.yaml")
    store.export_for_serving(tmp_path / "slim")
    config = yaml.safe_load((tmp_path / "slim" / "feature_store.yaml").read_text())
    assert config["online_store"]["connection_string"].startswith("${REDIS_ADDRESS},password=${REDIS_PASSWORD},")
    assert "spark" not in json.dumps(config).lower()


def test_claim_needs_the_path_where_it_is_mounted(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="needs the path where its folder is mounted"):
        ModelStore("pvc://models/evergreen")
    with pytest.raises(ArtifactError, match="anything else needs none"):
        ModelStore("s3://bucket/models", tmp_path)


def test_items_that_are_not_there_or_no_catalogue_are_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"items\.parquet: the items cannot be read: .*are they published there"):
        read_items(str(tmp_path / "items.parquet"))
    pq.write_table(pa.table({"item": ["i1"]}), tmp_path / "items.parquet")
    with pytest.raises(ArtifactError, match="no column 'category'"):
        read_items(str(tmp_path / "items.parquet"))


def test_object_store_is_found_by_the_variables_that_a_cluster_sets(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoint, region and keys come from a ConfigMap and a Secret; nothing in a URL or a file names them."""
    store = ModelStore("s3://mlpipeline/evergreen/models")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with s3_server("a-key") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
        assert not store.has("m-1")
        store.write("m-1", package=package(tmp_path / "p"), feature_store=world.feature_store)
        assert store.has("m-1")
        assert list(server.objects)[-1] == "/mlpipeline/evergreen/models/m-1/bundle.json"
        store.publish(world.feature_store)
        assert read_items(store.items_url).equals(FeatureStore.open(world.feature_store).items())

        fsspec.get_filesystem_class("s3").clear_instance_cache()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-key")
        with pytest.raises(ArtifactError, match=r"m-1: cannot be read: .*the Secret evergreen-s3"):
            store.has("m-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
