"""What can be known of the simulated world at all? Users' tastes are of their own and drift; clicks are few.

    python benchmarks/attainable.py LOG

Knows all of the world but what each user has of his own, taste and eagerness; these are filtered from the user's
clicks (a Laplace approximation a day: extended Kalman filter with Newton steps). No model can know more, so the ratio
of its cross-entropy to that of the true probabilities is a floor: once with what was known at the end of the training
rows, once with what was known at the midnight before each row, as a model has it that is retrained every day.

Deviates from a full Bayesian filter by the Laplace approximation, and reads clicks alone: dwell times and ratings,
which tell of tastes as well, take another 0.003 off both floors in the default world.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import DEVICES, PERSON
from evergreen.simulator.world import World

TRAIN_SHARE, TEST_SHARE = 0.75, 0.15
_NEWTON_STEPS = 4
_EAGERNESS_SIGMA = 0.35
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Belief:
    """What is believed of each user: K = taste dimensions, then eagerness."""

    mean: Floats  # (U, K)
    covariance: Floats  # (U, K, K)

    def a_day_later(self, decay: Floats) -> Belief:
        """Tastes have drifted; eagerness has not."""
        noise = np.diag(1 - decay**2)
        return Belief(self.mean * decay, self.covariance * decay[:, None] * decay + noise)


@dataclass(frozen=True)
class Day:
    """The people's rows of one day: log-odds = known + <loading, own of the user>, if examined."""

    users: Ints
    known: Floats
    loading: Floats  # (n, K)
    examined: Floats
    clicked: Floats
    probability: Floats

    def expected(self, belief: Belief) -> Floats:
        """(n,) click probability under a belief."""
        mean = self.known + np.einsum("nk,nk->n", self.loading, belief.mean[self.users])
        variance = np.einsum("nk,nkl,nl->n", self.loading, belief.covariance[self.users], self.loading)
        spread = np.sqrt(np.maximum(variance, 0.0))
        relevance = sum(w * _sigmoid(mean + x * spread) for x, w in zip(_NODES, _WEIGHTS / _WEIGHTS.sum(), strict=True))
        return self.examined * np.asarray(relevance)

    def entropy(self, predicted: Floats) -> float:
        """Expected cross-entropy of a prediction, over all draws of the clicks."""
        p = self.probability
        return float(-(p * np.log(predicted) + (1 - p) * np.log1p(-predicted)).sum())

    def learn(self, belief: Belief) -> Belief:
        """The belief after this day's clicks."""
        order = np.argsort(self.users, kind="stable")
        active, start = np.unique(self.users[order], return_index=True)
        owner = np.searchsorted(active, self.users[order])
        known, loading = self.known[order], self.loading[order]
        examined, clicked = self.examined[order], self.clicked[order]
        outer = loading[:, :, None] * loading[:, None, :]
        before, precision = belief.mean[active], np.linalg.inv(belief.covariance[active])
        own, hessian = before, precision
        for _ in range(_NEWTON_STEPS):
            relevance = _sigmoid(known + np.einsum("nk,nk->n", loading, own[owner]))
            p = examined * relevance
            slope = (clicked - p) / (1 - p) * (1 - relevance)
            information = p * (1 - relevance) ** 2 / (1 - p)
            gradient = np.add.reduceat(loading * slope[:, None], start, axis=0)
            gradient -= np.einsum("nkl,nl->nk", precision, own - before)
            hessian = np.add.reduceat(outer * information[:, None, None], start, axis=0) + precision
            own = own + np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        mean, covariance = belief.mean.copy(), belief.covariance.copy()
        mean[active], covariance[active] = own, np.linalg.inv(hessian)
        return Belief(mean, covariance)


def read_day(log: Path, file: str, world: World) -> Day:
    """The people's rows of the world's current day."""
    config = world.config
    names = ["user_id", "item_id", "device", "event_timestamp", "position", "clicked"]
    events = pq.read_table(log / "events" / file, columns=names)
    probability = pq.read_table(log / "truth" / file, columns=["click_probability"])["click_probability"].to_numpy()

    def index(name: str, ids: list[str]) -> Ints:
        codes: Ints = pc.index_in(events[name], pa.array(ids)).to_numpy().astype(np.int64)
        return codes

    users, items = index("user_id", world.users.ids.tolist()), index("item_id", world.items.ids.tolist())
    people = world.users.kind[users] == PERSON
    users, items, devices = users[people], items[people], index("device", list(DEVICES))[people]
    times = events["event_timestamp"].cast(pa.timestamp("us")).to_numpy().astype("datetime64[us]")[people]
    utility = world.utility(users, items, times, devices)
    scale = config.interaction_strength * np.sqrt(1 - config.segment_taste_share)
    loading = np.concatenate([scale * world.items.vector[items], np.ones((len(items), 1))], axis=1)
    own = np.concatenate([world._personal_taste, world.users.eagerness[:, None]], axis=1)
    return Day(
        users=users,
        known=utility.main + utility.interaction - np.einsum("nk,nk->n", loading, own[users]),
        loading=loading,
        examined=world.examination(users, events["position"].to_numpy()[people]),
        clicked=events["clicked"].to_numpy()[people].astype(np.float64),
        probability=probability[people],
    )


def floors(log: Path) -> tuple[float, float]:
    """Cross-entropy against the truth's on the people's test rows: of a belief frozen at the end of the training rows,
    and of one that is up to date at each midnight."""
    config = SimulatorConfig.read(log / "config.json")
    world = World(config)
    decay = np.append(np.full(config.taste_dimensions, 2.0 ** (-1 / config.taste_half_life_days)), 1.0)
    prior = np.diag(np.append(np.ones(config.taste_dimensions), _EAGERNESS_SIGMA**2))
    belief = Belief(np.zeros((config.num_users, len(decay))), np.tile(prior, (config.num_users, 1, 1)))
    frozen = belief
    train_days, test_day = round(TRAIN_SHARE * config.num_days), config.num_days - round(TEST_SHARE * config.num_days)
    truth = stale = fresh = 0.0
    for day, file in enumerate(sorted(path.name for path in (log / "events").iterdir())):
        if day:
            world.advance()
            belief, frozen = belief.a_day_later(decay), frozen.a_day_later(decay)
        rows = read_day(log, file, world)
        if day >= test_day:
            truth += rows.entropy(rows.probability)
            stale += rows.entropy(rows.expected(frozen))
            fresh += rows.entropy(rows.expected(belief))
        belief = rows.learn(belief)
        if day < train_days:
            frozen = belief
    return stale / truth, fresh / truth


def _sigmoid(logits: Floats) -> Floats:
    result: Floats = 1.0 / (1.0 + np.exp(-logits))
    return result


def main() -> None:
    """Print both floors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    stale, fresh = floors(parser.parse_args().log)
    print(f"against the truth: {stale:.4f} as known at the end of training, {fresh:.4f} as known each midnight")


if __name__ == "__main__":
    main()
