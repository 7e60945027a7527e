"""`evergreen release`: which package serves. Canary, promotion, the way back, and the history."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from evergreen.cli.options import INSTANT
from evergreen.contracts.errors import EvergreenError
from evergreen.contracts.release import CanaryReport, Release, ReleaseKind
from evergreen.contracts.training_set import Feature

if TYPE_CHECKING:
    import httpx

_RELEASES = click.option(
    "--releases", type=click.Path(path_type=Path), required=True, help="Folder of releases; DIR/current is served."
)
_URL = click.option("--url", default=None, help="Server that serves DIR/current with --allow-reload.")
_TOKEN = click.option(
    "--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=None, help="Its bearer token."
)
_NAME = click.option("--name", default="evergreen", show_default=True, help="Name of the model in the URL.")
_REASON = click.option("--reason", required=True, help="Why; goes into the history.")
_AS_OF = click.option("--as-of", type=INSTANT, default=None, help="From when it serves.  [default: now]")


@click.group()
def release() -> None:
    """Which package serves: promote it after a canary, go back, show the history."""


@release.command()
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_RELEASES
@_REASON
@_URL
@_TOKEN
@_NAME
@_AS_OF
@click.option("--feature-store", type=click.Path(path_type=Path), default=None, help="For the canary's server.")
@click.option("--impressions", default=None, help="Log whose newest requests the canary is asked; without, no canary.")
@click.option("--requests", type=click.IntRange(min=1), default=500, show_default=True, help="Of the canary.")
@click.option("--latency-budget-ms", type=click.FloatRange(min=0, min_open=True), default=50.0, show_default=True)
def promote(
    package: Path,
    releases: Path,
    reason: str,
    url: str | None,
    token_file: Path | None,
    name: str,
    as_of: datetime | None,
    feature_store: Path | None,
    impressions: str | None,
    requests: int,
    latency_budget_ms: float,
) -> None:
    """Let PACKAGE serve, if its canary passes."""
    from evergreen.models.package import ModelPackage
    from evergreen.release import deploy
    from evergreen.release.store import ReleaseStore

    loaded = ModelPackage.load(package)
    with ExitStack() as stack:
        if (server := deploy.server_client(url or "", token_file or "")) is not None:
            stack.enter_context(server)
        canary = None
        if impressions is not None:
            canary = _canary(
                stack,
                package,
                ReleaseStore(releases).current,
                feature_store,
                impressions,
                name,
                requests,
                latency_budget_ms,
                loaded.info.features,
            )
            _echo_canary(canary)
            if not canary.passed:
                raise EvergreenError(f"{loaded.version} is not released: {canary.failures}")
        done = deploy.promote(
            ReleaseStore(releases),
            package,
            loaded.version,
            as_of=as_of or datetime.now(UTC),
            reason=reason,
            canary=canary,
            server=server,
            model_name=name,
        )
    _echo(done)


@release.command()
@_RELEASES
@_REASON
@_URL
@_TOKEN
@_NAME
@_AS_OF
def rollback(
    releases: Path, reason: str, url: str | None, token_file: Path | None, name: str, as_of: datetime | None
) -> None:
    """Let the package serve again that served before."""
    from evergreen.release import deploy
    from evergreen.release.store import ReleaseStore

    with ExitStack() as stack:
        if (server := deploy.server_client(url or "", token_file or "")) is not None:
            stack.enter_context(server)
        done = deploy.roll_back(
            ReleaseStore(releases), as_of=as_of or datetime.now(UTC), reason=reason, server=server, model_name=name
        )
    _echo(done)


@release.command()
@_RELEASES
def history(releases: Path) -> None:
    """Show what served, since when and why; the last line serves now."""
    from evergreen.release.store import ReleaseStore

    for one in ReleaseStore(releases).history():
        _echo(one)


def _canary(
    stack: ExitStack,
    package: Path,
    serving: Path,
    feature_store: Path | None,
    impressions: str,
    name: str,
    num_requests: int,
    latency_budget_ms: float,
    features: Sequence[Feature],
) -> CanaryReport:
    """Each on a server of its own: what the users' server answers would be logged as if somebody had seen it."""
    import httpx

    from evergreen.release.canary import CanaryConfig, run_canary
    from evergreen.release.replay import context_of, logged_requests
    from evergreen.serving.process import served

    asked = logged_requests(impressions, context=context_of(features), limit=num_requests)
    folder = stack.enter_context(TemporaryDirectory(prefix="evergreen-canary-"))
    options = ["--name", name]
    if feature_store is not None:
        options += ["--feature-store", str(feature_store)]

    def client(model: Path) -> httpx.Client:
        log = Path(folder) / f"{model.name}.log"
        url = stack.enter_context(served(model, log=log, options=options))
        return stack.enter_context(httpx.Client(base_url=url, trust_env=False))

    champion = client(serving.resolve()) if serving.exists() else None
    config = CanaryConfig(latency_budget_ms=latency_budget_ms)
    return run_canary(client(package.resolve()), champion, asked, model_name=name, config=config)


def _echo_canary(report: CanaryReport) -> None:
    click.echo(f"canary: {report.num_requests} requests, {report.challenger} beside {report.champion or 'nothing'}")
    for check in report.checks:
        value = "not measured" if check.value is None else f"{check.value:g}"
        click.echo(f"  {'passed' if check.passed else 'FAILED'}  {check.name:<24} {value:<12} {check.limit}")


def _echo(one: Release) -> None:
    verb = "again, " if one.kind is ReleaseKind.ROLLBACK else ""
    click.echo(
        f"{one.released_at:%Y-%m-%d %H:%M:%S}  {one.version}  {verb}after {one.previous or 'nothing'}: {one.reason}"
    )
