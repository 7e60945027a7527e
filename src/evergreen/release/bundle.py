"""The bundle: what an InferenceService's storageUri names, immutable, one a version.

    <model store>/
      items.parquet       the catalogue as of the last window; `evergreen serve --items` reads it with every refresh
      feature_store/      as in a bundle, but the newest: what a stream consumer starts with
      <version>/          in a predictor: /mnt/models
        model/            the package
        feature_store/    definitions, registry and catalogue; see `FeatureStore.export_for_serving`
        retriever/        the two towers, if there are any
        bundle.json       every file with its digest

bundle.json is written last: a bundle without it is not whole.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from evergreen.contracts.artifact import JsonModel, atomic_directory, sha256_file
from evergreen.contracts.errors import ArtifactError
from evergreen.features.store import ITEMS, FeatureStore

_VOLUME = "pvc://"
_FEATURE_STORE = "feature_store"
_WAY_OUT = "check AWS_ENDPOINT_URL and the Secret evergreen-s3, or what else your object store asks for"


class BundleManifest(JsonModel):
    """What makes a bundle whole."""

    version: str
    """Of the package in it."""
    files: Mapping[str, str]
    """Hex sha256 by path."""

    FILE: ClassVar[str] = "bundle.json"


class ModelStore:
    """Where bundles are: a URL that KServe downloads them from, or a claim that it mounts."""

    def __init__(self, url: str, mounted_at: Path | str = "") -> None:
        """Name a store.

        Args:
            url: fsspec URL that KServe knows too (s3://bucket/folder), or pvc://claim/folder.
            mounted_at: where the folder of a claim is mounted here; for pvc:// alone.

        Raises:
            ArtifactError: a claim's folder without a path to it, or the other way round.
        """
        if url.startswith(_VOLUME) != bool(str(mounted_at)):
            raise ArtifactError(
                f"model_store={url!r}, model_store_path={str(mounted_at)!r}: a claim ({_VOLUME}claim/folder) needs the "
                "path where its folder is mounted here, and anything else needs none"
            )
        self.url = url.rstrip("/")
        self._folder = str(mounted_at or self.url).rstrip("/")

    @property
    def items_url(self) -> str:
        """The published catalogue, as steps see it."""
        return f"{self._folder}/{ITEMS}"

    def storage_uri(self, version: str) -> str:
        """What an InferenceService is told."""
        return f"{self.url}/{version}"

    def has(self, version: str) -> bool:
        """Whether a bundle is there, and whole.

        Raises:
            ArtifactError: the store of models cannot be read.
        """
        files, folder = self._open(version)
        try:
            return bool(files.exists(f"{folder}/{BundleManifest.FILE}"))
        except Exception as error:  # every file system has errors of its own
            raise ArtifactError(f"{self.storage_uri(version)}: cannot be read: {error}; {_WAY_OUT}") from error

    def write(self, version: str, *, package: Path, feature_store: Path, retriever: Path | None = None) -> str:
        """Write the bundle of a version. One that is there is left alone: its name promises that it never changes.

        Args:
            version: of the package.
            package: its directory.
            feature_store: the loop's, materialized.
            retriever: directory of the two towers; None, or an empty one: there are none.

        Returns:
            Its storageUri.

        Raises:
            ArtifactError: the feature store is none, or the store of models cannot be written.
        """
        files, folder = self._open(version)
        if self.has(version):
            return self.storage_uri(version)
        with ExitStack() as stack:
            if isinstance(files, LocalFileSystem):
                scratch = stack.enter_context(atomic_directory(Path(folder)))
            else:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evergreen-bundle-")))
            shutil.copytree(package, scratch / "model")
            FeatureStore.open(feature_store).export_for_serving(scratch / _FEATURE_STORE)
            if retriever is not None and any(retriever.glob("*")):
                shutil.copytree(retriever, scratch / "retriever")
            found = sorted(file for file in scratch.rglob("*") if file.is_file())
            digests = {str(file.relative_to(scratch)): sha256_file(file) for file in found}
            BundleManifest(version=version, files=digests).write(scratch / BundleManifest.FILE)
            if not isinstance(files, LocalFileSystem):
                _upload(files, folder, scratch, [*digests, BundleManifest.FILE])
        return self.storage_uri(version)

    def publish(self, feature_store: Path) -> None:
        """Let servers know the newest catalogue, and stream consumers the newest store.

        Args:
            feature_store: the loop's, materialized.

        Raises:
            ArtifactError: the feature store is none, or the store of models cannot be written.
        """
        files, folder = self._open(_FEATURE_STORE)
        store = FeatureStore.open(feature_store)
        if isinstance(files, LocalFileSystem):
            store.export_for_serving(Path(folder))
            partial = Path(folder).with_name(f".{ITEMS}.partial")
            shutil.copyfile(feature_store / ITEMS, partial)
            partial.replace(Path(folder).with_name(ITEMS))
            return
        with tempfile.TemporaryDirectory(prefix="evergreen-store-") as scratch:
            export = Path(scratch) / _FEATURE_STORE
            store.export_for_serving(export)
            for file in sorted(file for file in export.rglob("*") if file.is_file()):
                _put(files, file, f"{folder}/{file.relative_to(export)}")
        _put(files, feature_store / ITEMS, str(url_to_fs(self.items_url)[1]))

    def _open(self, version: str) -> tuple[Any, str]:
        try:
            files, folder = url_to_fs(f"{self._folder}/{version}", use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ArtifactError(f"model_store={self.url}: {error}") from error
        return files, folder


def _upload(files: Any, folder: str, scratch: Path, names: list[str]) -> None:
    """Write files to an object store, the last one last; what a killed run left there goes first."""
    if files.exists(folder):
        files.rm(folder, recursive=True)
    for name in names:
        _put(files, scratch / name, f"{folder}/{name}")


def _put(files: Any, source: Path, target: str) -> None:
    try:
        files.put_file(str(source), target)
    except Exception as error:  # every file system has errors of its own
        raise ArtifactError(f"{target}: cannot be written: {error}; {_WAY_OUT}") from error
