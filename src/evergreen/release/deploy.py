"""Promotion and the way back: the history says who serves, and the server is told.

On one machine the history's link is switched, and the server loads the package beside the one that answers and drops no
request (V2 repository load); on a cluster the InferenceService gets another bundle (`inference_service`). If the server
will not have the package, it goes back to where it was, and so does the history. What was killed half-way may be called
again with the same moment: nothing is released twice, and the server is told again.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Protocol

import httpx

from evergreen.contracts.errors import EvergreenError
from evergreen.contracts.release import CanaryReport, Release
from evergreen.release.store import ReleaseStore

_LOAD_SECONDS = 300.0

logger = logging.getLogger(__name__)


class Server(Protocol):
    """What lets a version of the releases serve; see `inference_service.InferenceServer`."""

    def serve(self, version: str) -> None:
        """Return when this version answers; an EvergreenError if it does not."""


def server_client(url: str, token_file: Path | str = "") -> httpx.Client | None:
    """A client of the server that is told of releases.

    Args:
        url: base of the server; empty: none.
        token_file: its first word is the bearer token that the server asks for; empty: none.
    """
    if not url:
        return None
    headers = {"Authorization": f"Bearer {Path(token_file).read_text().split()[0]}"} if token_file else {}
    # The server is named outright, so the proxies of the environment are not asked.
    return httpx.Client(base_url=url, headers=headers, trust_env=False)


def promote(
    store: ReleaseStore,
    package: Path,
    version: str,
    *,
    as_of: datetime,
    reason: str,
    canary: CanaryReport | None = None,
    server: httpx.Client | Server | None = None,
    model_name: str = "evergreen",
) -> Release:
    """Let a package serve.

    Args:
        store: of releases.
        package: its directory.
        version: of it.
        as_of: from when it serves.
        reason: why, for people.
        canary: what was seen of it.
        server: a client of the server that serves `store.current`, started with --allow-reload, or a cluster's; None:
            it reads the link when it starts.
        model_name: in the URL of the former.

    Raises:
        ArtifactError: the canary failed, or the release is older than what serves.
        EvergreenError: the server cannot load the package, or cannot be reached; what served before is released again.
    """
    release = store.release(package, version, as_of=as_of, reason=reason, canary=canary)
    if server is not None:
        try:
            _tell(server, version, model_name)
        except EvergreenError as error:
            if release.previous is not None:
                store.roll_back(as_of=as_of, reason=f"the server could not load {version}: {error}")
                if not isinstance(server, httpx.Client):  # which keeps what it has
                    server.serve(release.previous)
            raise
    logger.info("%s serves, after %s: %s", version, release.previous or "nothing", reason)
    return release


def roll_back(
    store: ReleaseStore,
    *,
    as_of: datetime,
    reason: str,
    server: httpx.Client | Server | None = None,
    model_name: str = "evergreen",
) -> Release:
    """Let the package serve again that served before. Arguments and errors as for `promote`."""
    release = store.roll_back(as_of=as_of, reason=reason)
    if server is not None:
        _tell(server, release.version, model_name)
    logger.info("%s serves again, after %s: %s", release.version, release.previous, reason)
    return release


def _tell(server: httpx.Client | Server, version: str, model_name: str) -> None:
    if isinstance(server, httpx.Client):
        _load(server, version, model_name)
    else:
        server.serve(version)


def _load(server: httpx.Client, version: str, model_name: str) -> None:
    try:
        response = server.post(f"/v2/repository/models/{model_name}/load", timeout=_LOAD_SECONDS)
        if not response.is_success:
            raise EvergreenError(f"{server.base_url}: HTTP {response.status_code}: {response.text}")
        serving = server.get(f"/v2/models/{model_name}").json()["versions"]
    except httpx.TransportError as error:
        raise EvergreenError(f"{server.base_url}: cannot be reached: {error}; is the server running?") from error
    if version not in serving:
        raise EvergreenError(
            f"{server.base_url}: serves {', '.join(serving)} after loading, not {version}: was it started with --model "
            "on the releases' link?"
        )
