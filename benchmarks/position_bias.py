"""Does correcting for position move the ranking toward what people truly prefer? On logs whose truth is known.

    python benchmarks/position_bias.py [--seeds 2] [--days 30] [--out benchmarks/position_bias.md]

Two worlds. In `placed by chance`, the simulator's own, the catalogue is large against a slate, so that what stands on
top is nearly a matter of chance. In `popular on top` the policy sorts its slates by the click rates that it has seen,
examination falls as 1 / position, and the log has no propensities: what is on top is clicked because it is on top, and
stays there because it is clicked.

Each model ranks the test rows of a request without knowing their positions. It is held against the true `relevance`:
the probability of a click once the item is looked at, which no model sees.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.store import FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.metrics.bootstrap import Interval, cluster_bootstrap
from evergreen.metrics.statistic import Mean
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from evergreen.simulator.policy import LoggingPolicy, Slates
from evergreen.simulator.population import Ints
from evergreen.training.dataset import build_training_set
from evergreen.training.trainer import TrainingConfig, train_model

METHODS = ("ignore", "effect", "inverse_propensity")
METRICS = ("Spearman", "NDCG@5")
WORLDS = {
    "placed by chance": SimulatorConfig(),
    "popular on top": SimulatorConfig(position_bias_exponent=1.0, slate_size_min=10, slate_size_max=10),
}


class PopularFirst(LoggingPolicy):
    """The simulator's policy, but it sorts each slate by the click rates that it has seen, uncorrected."""

    def slates(self, rng: np.random.Generator, users: Ints, sizes: Ints, now: np.datetime64) -> Slates:
        drawn = super().slates(rng, users, sizes, now)
        rate = (self.item_clicks + 2) / (self.item_views + 100)
        # Requests are blocks of rows in order, so sorting by request first leaves each block where it is.
        order = np.lexsort((-rate[drawn.items], drawn.requests))
        return replace(drawn, items=drawn.items[order])


@dataclass(frozen=True)
class TestRows:
    """People's test rows, request by request. Arrays of shape (n,)."""

    table: pa.Table
    relevance: NDArray[np.float64]
    position: NDArray[np.int64]
    starts: NDArray[np.int64]
    """First row of each request."""
    user_of_request: NDArray[np.int64]


def build(world: str, days: int, out: Path) -> TrainingSet:
    """Simulate a log and make the training set of it."""
    config, mapping = WORLDS[world].model_copy(update={"num_days": days}), Mapping.load("simulated")
    if world == "popular on top":
        with patch("evergreen.simulator.log.LoggingPolicy", PopularFirst):
            simulate_log(config, out / "log")
        # Once sorted, an item's place has not the propensity that the policy wrote when it drew the slate.
        columns = mapping.columns.model_copy(update={"propensity": None})
        mapping = mapping.model_copy(update={"columns": columns})
    else:
        simulate_log(config, out / "log")
    snapshot = ingest_log(mapping, str(out / "log"), out / "snapshot")
    tables = build_feature_tables(snapshot, out / "tables")
    return build_training_set(snapshot, tables, FeatureStore.create(out / "repo", tables), out / "training_set")


def test_rows(training_set: TrainingSet, log: Path) -> TestRows:
    """Test rows beside their truth, without bots and without requests of one item."""
    keys = ["request_id", "item_id"]
    truth = ds.dataset(log / "truth").to_table(columns=[*keys, "relevance", "is_bot"])
    rows = training_set.read("test")
    numbered = rows.select([*keys, "user_id", "position"]).append_column("row", pa.array(np.arange(len(rows))))
    joined = numbered.join(truth, keys=keys).to_pandas().query("not is_bot")
    joined = joined[joined.groupby("request_id")["row"].transform("size") > 1].sort_values(["request_id", "position"])
    starts = np.flatnonzero((joined["request_id"] != joined["request_id"].shift()).to_numpy())
    return TestRows(
        table=rows.take(pa.array(joined["row"])),
        relevance=joined["relevance"].to_numpy(),
        position=joined["position"].to_numpy(),
        starts=starts,
        user_of_request=joined["user_id"].astype("category").cat.codes.to_numpy()[starts],
    )


def agreement(scores: NDArray[np.floating], rows: TestRows) -> dict[str, NDArray[np.float64]]:
    """By metric, (num_requests,) how far the order of the scores is that of the true relevance.

    Spearman is the rank correlation; NDCG@5 takes the relevance as gain (Jarvelin and Kekalainen 2002).
    """
    discount = 1 / np.log2(np.arange(2, 7))
    spearman, ndcg = [], []
    for score, truth in zip(np.split(scores, rows.starts[1:]), np.split(rows.relevance, rows.starts[1:]), strict=True):
        ranks, true_ranks = rankdata(score), rankdata(truth)
        spread = ranks.std() * true_ranks.std()
        spearman.append(((ranks - ranks.mean()) * (true_ranks - true_ranks.mean())).mean() / spread if spread else 0.0)
        gains, best = truth[np.argsort(-score, kind="stable")][:5], np.sort(truth)[::-1][:5]
        ndcg.append(gains @ discount[: len(gains)] / (best @ discount[: len(best)]))
    return {"Spearman": np.array(spearman), "NDCG@5": np.array(ndcg)}


def measure(world: str, days: int, seeds: int, folder: Path) -> list[str]:
    """Lines of the report on one world."""
    training_set = build(world, days, folder)
    rows = test_rows(training_set, folder / "log")
    values = {}
    for method in METHODS:
        found = []
        for seed in range(seeds):
            config = TrainingConfig(model="deepfm", position=method, seed=seed, export_program=False)
            package = train_model(training_set, folder / f"{method}-{seed}", config=config)
            found.append(agreement(package.scores(rows.table), rows))
        for metric in METRICS:
            values[f"{method} {metric}"] = np.mean([one[metric] for one in found], axis=0)
    bootstrap = cluster_bootstrap({name: Mean(value) for name, value in values.items()}, rows.user_of_request)
    placed = spearmanr(-rows.position, rows.relevance).statistic
    info = training_set.manifest.splits
    lines = [
        f"## {world}",
        "",
        f"{info['train'].rows:,} training rows, {len(rows.starts):,} test requests of {bootstrap.num_clusters:,} "
        f"users; rank correlation of being placed high with relevance {placed:.3f}.",
        "",
        "| position | " + " | ".join(f"{metric} | against ignore" for metric in METRICS) + " |",
        "|---|" + "---:|---:|" * len(METRICS),
    ]
    for method in METHODS:
        cells = []
        for metric in METRICS:
            name, base = f"{method} {metric}", f"ignore {metric}"
            cells.append(f"{bootstrap.values[name]:.4f}")
            cells.append("" if method == "ignore" else text(bootstrap.difference(name, base)))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def text(interval: Interval) -> str:
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="of the training; figures are means over them")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"# Position bias, DeepFM, {arguments.seeds} seeds, {os.cpu_count()} cores, {platform.machine()}",
        "",
        "Agreement with the true relevance within a request, mean over requests; in brackets the 95 % interval of the",
        "difference over draws of users. Written by `python benchmarks/position_bias.py`.",
        "",
    ]
    for world in arguments.worlds:
        with tempfile.TemporaryDirectory() as folder:
            lines += measure(world, arguments.days, arguments.seeds, Path(folder))
        print("\n".join(lines), flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
