"""Challengers that fail in front of requests: is each taken back, and does any user notice?

    python benchmarks/loop/canary.py --work DIR [--seeds 20] [--out benchmarks/loop/canary.md]

Two servers stay up: that of the users, which somebody asks all the time, and one for challengers. For every seed and
every fault a package is spoilt, loaded by the second server as a deployment would, and asked the requests of the log
beside the champion; then it is to be promoted with what the canary saw. Packages that cannot be loaded are also
promoted without a canary. A sound challenger goes out and comes back in every seed.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from evergreen.contracts.errors import ArtifactError, EvergreenError
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.release import CanaryReport
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.models.calibration import PlattCalibration
from evergreen.models.package import ModelPackage, write_package
from evergreen.models.registry import build_model, model_config
from evergreen.release.canary import not_started, run_canary
from evergreen.release.deploy import promote, roll_back, server_client
from evergreen.release.store import ReleaseStore
from evergreen.serving.client import RecommenderClient
from evergreen.serving.process import served
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import TrainingConfig, train_model

MAPPING = Mapping.load("simulated")
NUM_REQUESTS = 120
PAUSE_SECONDS = 0.01
"""Between two requests of the users."""
DIES_EVERY = 5
"""Seeds: a server that was killed has to be started again."""


@dataclass
class Shop:
    """A small shop: packages, the feature store, and pages to ask for again."""

    root: Path
    champion: ModelPackage
    sound: ModelPackage
    requests: list[dict]
    at: datetime
    minutes: int = 0

    def next_moment(self) -> datetime:
        self.minutes += 1
        return self.at + timedelta(minutes=self.minutes)


def make_shop(root: Path) -> Shop:
    config = SimulatorConfig(num_users=300, num_items=150, num_days=8, events_per_day=3_000, seed=5, click_rate=0.06)
    simulate_log(config, root / "log")
    snapshot = ingest_log(MAPPING, str(root / "log"), root / "snapshot")
    tables = build_feature_tables(snapshot, root / "tables")
    store = FeatureStore.create(root / "feature_store", tables)
    store.materialize(snapshot.as_of)
    rows = build_training_set(snapshot, tables, store, root / "training_set")
    packages = [
        train_model(
            rows,
            root / f"model-{seed}",
            config=TrainingConfig(
                model="deepfm", hyperparameters={"hidden": [32]}, max_epochs=3, seed=seed, export_program=False
            ),
        )
        for seed in (0, 1)
    ]
    pages: dict[str, dict] = {}
    events = ds.dataset(sorted((root / "log" / "events").iterdir())[-1]).to_table()
    for row in events.to_pylist():
        page = pages.setdefault(
            row["request_id"],
            {
                "user_id": row["user_id"],
                "event_timestamp": snapshot.as_of.isoformat(),
                "context": {"device": row["device"]},
                "candidates": [],
            },
        )
        page["candidates"].append(row["item_id"])
    return Shop(root, *packages, list(pages.values())[:NUM_REQUESTS], snapshot.as_of)


def rewritten(package: ModelPackage, out: Path, **parts: object) -> ModelPackage:
    """The package with other parts."""
    given = {
        name: getattr(package, name) for name in ("info", "encoder", "model", "calibration", "position", "outcome")
    }
    return write_package(
        out, **(given | parts), metrics=package.metrics, card="A package that was spoilt.", export_program=False
    )


def with_weights(package: ModelPackage, out: Path, change: Callable[[torch.nn.Module], None]) -> ModelPackage:
    model = ModelPackage.load(package.path).model
    with torch.no_grad():
        change(model)
    return rewritten(package, out, model=model)


def raises_for_some_users(shop: Shop, out: Path, rng: np.random.Generator) -> ModelPackage:
    """The network has no number for three users."""
    users = sorted({request["user_id"] for request in shop.requests})
    encoder = shop.sound.encoder
    asked = ["", *rng.choice(users, 3, replace=False)]
    table = pa.table({f.name: pa.nulls(len(asked)) for f in encoder.features} | {"user_id": pa.array(asked)})
    column = [one.name for one in encoder.spec.categorical].index("user_id")
    nobody, *rows = encoder.transform(table).categorical[:, column].tolist()

    def change(model: torch.nn.Module) -> None:
        model.table.weight[[row for row in rows if row != nobody]] = float("nan")

    return with_weights(shop.sound, out, change)


def gives_no_numbers(shop: Shop, out: Path, rng: np.random.Generator) -> ModelPackage:
    def change(model: torch.nn.Module) -> None:
        model.table.weight[:] = float("nan")

    return with_weights(shop.sound, out, change)


def reads_a_feature_that_is_not_there(shop: Shop, out: Path, rng: np.random.Generator) -> ModelPackage:
    new = Feature(name=f"user_mood_{rng.integers(100)}", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.USER)
    info = shop.sound.info.model_copy(update={"features": (*shop.sound.info.features, new)})
    return rewritten(shop.sound, out, info=info)


def is_ten_times_slower(shop: Shop, out: Path, rng: np.random.Generator) -> ModelPackage:
    """A deep part of three layers of 4,096, which ends in zeros: the same answers, later."""
    info = shop.sound.info
    hyperparameters = info.hyperparameters | {"hidden": [4096, 4096, 4096]}
    torch.manual_seed(int(rng.integers(1000)))
    model = build_model(info.name, model_config(info.name, hyperparameters), shop.sound.encoder.spec)
    shared = {name: value for name, value in shop.sound.model.state_dict().items() if not name.startswith("deep")}
    model.load_state_dict(shared, strict=False)
    return rewritten(
        shop.sound, out, info=info.model_copy(update={"hyperparameters": hyperparameters}), model=model.eval()
    )


def promises_too_much(shop: Shop, out: Path, rng: np.random.Generator) -> ModelPackage:
    """Its calibration is that of another log."""
    calibration = shop.sound.calibration
    assert isinstance(calibration, PlattCalibration)
    moved = calibration.intercept + rng.choice([-1, 1]) * rng.uniform(1.2, 2.0)
    return rewritten(shop.sound, out, calibration=calibration.model_copy(update={"intercept": float(moved)}))


def was_damaged_on_its_way(shop: Shop, out: Path, rng: np.random.Generator) -> ModelPackage:
    """One byte of the weights is another."""
    shutil.copytree(shop.sound.path, out)
    package = ModelPackage.load(out)
    weights = bytearray((out / ModelPackage.WEIGHTS).read_bytes())
    weights[int(rng.integers(len(weights)))] ^= 0xFF
    (out / ModelPackage.WEIGHTS).write_bytes(weights)
    return package


def sound_copy(shop: Shop, out: Path, rng: np.random.Generator) -> ModelPackage:
    """Nothing is wrong with the package; what goes wrong is around it."""

    def change(model: torch.nn.Module) -> None:
        model.bias += float(rng.normal(0, 0.01))

    return with_weights(shop.sound, out, change)


DROPS = "drops half of the candidates: its store knows half of the items"
DIES = f"dies among its requests (every {DIES_EVERY}th seed)"
SOUND = "nothing is wrong"
FAULTS = {
    "raises for three users": raises_for_some_users,
    "gives no numbers": gives_no_numbers,
    "reads a feature that the store does not have": reads_a_feature_that_is_not_there,
    "takes ten times as long": is_ten_times_slower,
    "promises too many clicks, or too few": promises_too_much,
    "was damaged on its way": was_damaged_on_its_way,
    DROPS: sound_copy,
    DIES: sound_copy,
}
UNLOADABLE = ("gives no numbers", "reads a feature that the store does not have", "was damaged on its way")


@dataclass
class Users:
    """Somebody who asks all the time."""

    url: str
    requests: list[dict]
    versions: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0

    @contextmanager
    def asking(self) -> Iterator[None]:
        stop = threading.Event()

        def ask() -> None:
            number = 0
            with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as client:
                while not stop.wait(PAUSE_SECONDS):
                    number += 1
                    request = self.requests[number % len(self.requests)]
                    started = time.perf_counter()
                    try:
                        response = client.post("/v1/models/evergreen:predict", json={"instances": [request]})
                        (answer,) = response.raise_for_status().json()["predictions"]
                        self.versions[answer["model_version"]] += 1
                    except (httpx.HTTPError, ValueError, KeyError) as error:
                        self.failures.append(repr(error))
                    self.slowest_seconds = max(self.slowest_seconds, time.perf_counter() - started)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def point(link: Path, target: Path) -> None:
    scratch = link.with_name(f".{link.name}.partial")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    scratch.replace(link)


@dataclass
class Second:
    """The server of challengers."""

    url: str
    model: Path
    feature_store: Path

    def canary(self, package: ModelPackage, champion: httpx.Client, champion_version: str, shop: Shop) -> CanaryReport:
        point(self.model, package.path)
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            response = client.post("/v2/repository/models/evergreen/load")
            if not response.is_success:
                return not_started(package.version, champion_version, f"HTTP {response.status_code}: {response.text}")
            return run_canary(client, champion, shop.requests)


def canary_that_dies(
    package: ModelPackage, champion: httpx.Client, shop: Shop, rng: np.random.Generator
) -> CanaryReport:
    """The challenger's server is killed while it is asked."""
    before = {child.pid for child in psutil.Process().children()}
    options = ["--feature-store", str(shop.root / "feature_store")]
    with served(package.path, log=shop.root / "dies.log", options=options) as url:
        (server,) = [child for child in psutil.Process().children() if child.pid not in before]
        left = int(rng.integers(20, NUM_REQUESTS - 20))

        def kill_after(request: httpx.Request) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                server.kill()

        hooks = {"request": [kill_after]}
        with httpx.Client(base_url=url, timeout=60, trust_env=False, event_hooks=hooks) as client:
            return run_canary(client, champion, shop.requests)


def found_by(report: CanaryReport) -> list[str]:
    """What stood against a challenger, in a word."""
    if report.error is not None and not report.num_requests:
        return ["its server does not load it"]
    return [*(["its server is gone"] if report.error else []), *(c.name for c in report.checks if not c.passed)]


@dataclass
class Tally:
    """What became of the challengers with one fault."""

    runs: int = 0
    passed: int = 0
    found: Counter[str] = field(default_factory=Counter)
    promoted: int = 0
    moved: int = 0
    """Runs after which the users had another model, or the releases another link."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    shop = make_shop(arguments.work)
    text = "\n".join(run(shop, arguments.seeds))
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def run(shop: Shop, num_seeds: int) -> list[str]:
    root = shop.root
    half = root / "feature_store_of_half"
    shutil.copytree(root / "feature_store", half)
    items = pq.read_table(half / "items.parquet")
    pq.write_table(items.slice(0, items.num_rows // 2), half / "items.parquet")
    releases = ReleaseStore(root / "releases")
    releases.release(shop.champion.path, shop.champion.version, as_of=shop.at, reason="the first")
    second_model, second_store = root / "challenger", root / "challenger_store"
    point(second_model, shop.sound.path)
    point(second_store, root / "feature_store")
    stores = {"users": root / "feature_store", "second": second_store}
    options = {name: ["--feature-store", str(store), "--allow-reload"] for name, store in stores.items()}
    tallies: dict[str, Tally] = defaultdict(Tally)
    with (
        served(releases.current, log=root / "users.log", options=options["users"]) as url,
        served(second_model, log=root / "second.log", options=options["second"]) as second_url,
        RecommenderClient(url) as asked,
    ):
        champion = server_client(url)
        assert champion is not None
        second = Second(second_url, second_model, second_store)
        users = Users(url, shop.requests)

        def serving() -> tuple[str, str]:
            user = shop.requests[0]["user_id"]
            return asked.recommend(user, k=1, event_timestamp=shop.at).model_version, releases.current.resolve().name

        with users.asking(), champion:
            for seed in range(num_seeds):
                for number, (fault, spoil) in enumerate([*FAULTS.items(), (SOUND, sound_copy)]):
                    if fault == DIES and seed % DIES_EVERY:
                        continue
                    rng = np.random.default_rng([seed, number])
                    package = spoil(shop, root / "spoilt", rng)
                    point(second.feature_store, half if fault == DROPS else root / "feature_store")
                    before, tally = serving(), tallies[fault]
                    if fault == DIES:
                        report = canary_that_dies(package, champion, shop, rng)
                    else:
                        report = second.canary(package, champion, before[0], shop)
                    tally.runs += 1
                    tally.passed += report.passed
                    tally.found.update(found_by(report))
                    tally.promoted += tried(releases, package, report, champion, shop, url)
                    if fault == SOUND and serving()[0] == package.version:
                        while users.versions[package.version] < NUM_REQUESTS and not users.failures:
                            time.sleep(PAUSE_SECONDS)
                        roll_back(releases, as_of=shop.next_moment(), reason="to begin anew", server=champion)
                    tally.moved += serving() != before
                    if fault in UNLOADABLE:
                        blind = tallies[f"{fault}, promoted without a canary"]
                        blind.runs += 1
                        blind.promoted += tried(releases, package, None, champion, shop, url)
                        blind.moved += serving() != before
                    shutil.rmtree(root / "spoilt")
                    shutil.rmtree(releases.package(package.version), ignore_errors=True)
                print(f"seed {seed}: {sum(users.versions.values())} requests of users", flush=True)
    return told(tallies, users, shop, num_seeds)


def tried(
    releases: ReleaseStore,
    package: ModelPackage,
    report: CanaryReport | None,
    champion: httpx.Client,
    shop: Shop,
    url: str,
) -> bool:
    """Whether the package could be promoted."""
    try:
        promote(
            releases,
            package.path,
            package.version,
            as_of=shop.next_moment(),
            reason="better",
            canary=report,
            server=champion,
        )
    except (ArtifactError, EvergreenError):
        return False
    return True


def told(tallies: dict[str, Tally], users: Users, shop: Shop, num_seeds: int) -> list[str]:
    total = sum(users.versions.values())
    of_champion = users.versions[shop.champion.version]
    lines = [
        f"# Challengers that fail in front of requests, {num_seeds} seeds, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "",
        f"Two real servers; a canary is {NUM_REQUESTS} pages of the log, asked of both in turns. Meanwhile users "
        f"asked {total:,} times: **{len(users.failures)} requests failed**, {of_champion:,} were answered by the "
        f"champion and {total - of_champion:,} by {len(users.versions) - 1} sound challengers while these were out.",
        "",
        "| the challenger | runs | passed the canary | promoted | **taken back** | what found it |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for fault, tally in tallies.items():
        blind = fault.endswith("without a canary")
        found = (
            "the users' server refuses it" if blind else ", ".join(f"{n} ({k})" for n, k in tally.found.most_common())
        )
        passed = "" if blind else tally.passed
        back = "" if fault == SOUND else f"**{tally.runs - tally.promoted - tally.moved} of {tally.runs}**"
        lines.append(f"| {fault} | {tally.runs} | {passed} | {tally.promoted} | {back} | {found} |")
    moved = sum(tally.moved for tally in tallies.values())
    lines += ["", f"Runs after which users had another model than before, or the link led elsewhere: {moved}."]
    return lines


if __name__ == "__main__":
    main()
