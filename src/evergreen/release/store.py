"""The folder of releases; see `contracts.release` for its layout.

A release is named by its moment: one that was killed half-way is finished by asking for it again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.release import CanaryReport, Release, ReleaseKind

CURRENT = "current"
PACKAGES = "packages"
HISTORY = "history.jsonl"
LOCK = ".lock"

_LOCK_SECONDS = 60.0
_POLL_SECONDS = 0.2


class ReleaseStore:
    """Releases on a file system that knows symbolic links.

    One writer at a time: a scheduled training and the monitor may come to a release at once, so each waits for the
    other. Readers always see a whole package.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.current = self.path / CURRENT
        """The link that a server is given."""

    def history(self) -> list[Release]:
        """All releases, oldest first.

        Raises:
            ArtifactError: a line of the history is no release.
        """
        file = self.path / HISTORY
        if not file.exists():
            return []
        releases = []
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            try:
                releases.append(Release.model_validate_json(line))
            except ValidationError as error:
                raise ArtifactError(f"{file}, line {number}: not a release: {error.errors()[0]['msg']}") from error
        return releases

    def package(self, version: str) -> Path:
        """Where the package of a version is."""
        return self.path / PACKAGES / version

    def release(
        self, package: Path, version: str, *, as_of: datetime, reason: str, canary: CanaryReport | None = None
    ) -> Release:
        """Let a package serve. The release that was made last, asked for again, is mended and otherwise as it was.

        Args:
            package: its directory; copied, so that it outlives the run that made it.
            version: of it.
            as_of: from when it serves.
            reason: why, for people.
            canary: what was seen of it before.

        Raises:
            ArtifactError: its canary failed, it is older than what serves, or it was released at that moment and taken
                back; or somebody else has been releasing for a minute.
        """
        if canary is not None and not canary.passed:
            raise ArtifactError(f"{version} is not released: {canary.failures}")
        with self._alone():
            return self._release(package, version, as_of, reason, canary)

    def _release(
        self, package: Path, version: str, as_of: datetime, reason: str, canary: CanaryReport | None
    ) -> Release:
        now = [one for one in self.history() if one.released_at == as_of]
        if any((one.version, one.kind) == (version, ReleaseKind.RELEASE) for one in now):
            if now[-1].kind is ReleaseKind.ROLLBACK:
                raise ArtifactError(
                    f"{version} was released at {as_of} and taken back: {now[-1].reason}; a new release needs a moment "
                    "of its own"
                )
            if now[-1] == self.history()[-1]:
                self.repair()
                return now[-1]
        if not self.package(version).exists():
            with atomic_directory(self.package(version)) as scratch:
                shutil.copytree(package, scratch, dirs_exist_ok=True)
        return self._put(version, ReleaseKind.RELEASE, as_of, reason, canary)

    def roll_back(self, *, as_of: datetime, reason: str) -> Release:
        """Let the package serve again that served before the one that serves now; of the same moment, once.

        Raises:
            ArtifactError: there is none before it, its package is gone, or somebody else has been releasing for a
                minute.
        """
        with self._alone():
            return self._roll_back(as_of, reason)

    def _roll_back(self, as_of: datetime, reason: str) -> Release:
        history = self.history()
        if history and (history[-1].kind, history[-1].released_at) == (ReleaseKind.ROLLBACK, as_of):
            self.repair()
            return history[-1]
        target = history[-1].previous if history else None
        if target is None:
            raise ArtifactError(f"{self.path}: nothing served before: there is no way back")
        if not self.package(target).is_dir():
            raise ArtifactError(f"{self.package(target)}: the package that served before is gone")
        return self._put(target, ReleaseKind.ROLLBACK, as_of, reason, None)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of the folder; a process that ends, however it ends, gives it back."""
        self.path.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _LOCK_SECONDS
        with (self.path / LOCK).open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise ArtifactError(
                            f"{self.path / LOCK}: somebody else has been releasing here for {_LOCK_SECONDS:g} s: see "
                            "which other run is at it, and repeat this one after it"
                        ) from error
                    time.sleep(_POLL_SECONDS)
            yield

    def _put(
        self, version: str, kind: ReleaseKind, as_of: datetime, reason: str, canary: CanaryReport | None
    ) -> Release:
        history = self.history()
        if history and as_of < history[-1].released_at:
            raise ArtifactError(
                f"as_of={as_of}: {history[-1].version} was released later, at {history[-1].released_at}"
            )
        release = Release(
            version=version,
            kind=kind,
            released_at=as_of,
            reason=reason,
            previous=history[-1].version if history else None,
            canary=canary,
        )
        # The history first: a link that nothing explains would be worse than a line whose link is put there again.
        self.path.mkdir(parents=True, exist_ok=True)
        scratch = self.path / f".{HISTORY}.partial"
        with scratch.open("w") as file:
            file.writelines(json.dumps(one.model_dump(mode="json")) + "\n" for one in [*history, release])
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.path / HISTORY)
        self.repair()
        return release

    def repair(self) -> None:
        """Point the link at what the history says; mends a release that broke off in between."""
        history = self.history()
        if not history:
            return
        target = Path(PACKAGES) / history[-1].version
        if not (self.path / target).is_dir():
            raise ArtifactError(f"{self.path / target}: the package that the history names is gone")
        scratch = self.path / f".{CURRENT}.partial"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(target)
        scratch.replace(self.current)
