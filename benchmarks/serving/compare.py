"""The served model against the floor, and against KServe and Feast as they are usually joined.

    python -m benchmarks.serving.compare --work DIR [--model deepfm] [--rounds 12] [--out benchmarks/serving/compare.md]

All servers run at once on one feature store in a Redis of their own, idle but for the one whose turn it is. Every way
answers the same requests: other users, other candidates each. First their scores are held against each other; then they
take turns, a few hundred requests in a round (the slow ones fewer), and of each the best round's median counts, so that
what else the machine does counts for little. CPU is that of the server's process, over all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.quality.hardware import hardware
from benchmarks.serving.floor import pack_users
from benchmarks.serving.load import Reply, ask, closed_loop, sequential
from benchmarks.serving.processes import Server, evergreen_serve, running
from benchmarks.serving.requests import Asked, Scores, make_requests, read_v1, read_v2
from benchmarks.serving.world import build_world, create_store, with_feasts_own_redis
from evergreen.models.package import ModelPackage
from tests.servers import redis_server

SIZES = (100, 500)
USERS, REQUESTS = 300, 400
CHECKED = 20
TOLERANCE = 1e-5
WANTED = {
    "floor": {100: 1.6, 500: 1.25},
    "to_dict": {100: 15.0, 500: 40.0},
    "binary": 2.0,
    "throughput": 0.6,
}


@dataclass
class Way:
    """One way to answer, and what it took.

    Attributes:
        name: in the report.
        server: the process.
        write: a request in the way's protocol.
        read: an answer of it.
        per_round: requests in a round.
        p50: by number of candidates, the median of each round in milliseconds.
        cpu: by number of candidates, CPU milliseconds of the server a request.
        client: by number of candidates, CPU milliseconds of the load a request.
        stages: by number of candidates, mean milliseconds of each stage and of the whole in the best round.
    """

    name: str
    server: Server
    write: Callable[[Asked], bytes]
    read: Callable[[Reply], Scores]
    per_round: int
    p50: dict[int, list[float]] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    client: dict[int, float] = field(default_factory=dict)
    stages: dict[int, dict[str, float]] = field(default_factory=dict)

    def best(self, size: int) -> float:
        """The best round's median, in milliseconds."""
        return min(self.p50[size])


def largest_difference(ways: Sequence[Way], asked: Sequence[Asked]) -> float:
    """Between the scores that any two ways give to an item.

    Raises:
        RuntimeError: a way refuses, answers with other items, or its order is not by score.
    """
    worst = 0.0
    for request in asked:
        answers = {}
        for way in ways:
            reply = ask(way.server.port, way.write(request))
            if reply.status != 200:
                raise RuntimeError(f"{way.name} answers {reply.status}: {reply.body[:300]!r}")
            answers[way.name] = way.read(reply)
        expected = set(request.candidates or next(iter(answers.values())))
        for name, scores in answers.items():
            if set(scores) != expected:
                raise RuntimeError(f"{name} answers with other items: {sorted(set(scores) ^ expected)[:5]}")
            if sorted(scores.values(), reverse=True) != list(scores.values()):
                raise RuntimeError(f"{name}: the items of {request.user_id} are not in the order of their scores")
        matrix = np.array([[scores[item] for item in sorted(expected)] for scores in answers.values()])
        worst = max(worst, float((matrix.max(axis=0) - matrix.min(axis=0)).max()))
    return worst


def take_turns(ways: Sequence[Way], size: int, asked: Sequence[Asked], rounds: int) -> None:
    """Measure latency and CPU of every way, round by round."""
    requests = {way.name: [way.write(request) for request in asked] for way in ways}
    spent = dict.fromkeys(requests, 0.0)
    client = dict.fromkeys(requests, 0.0)
    for way in ways:
        way.p50[size] = []
        sequential(way.server.port, requests[way.name], max(3, way.per_round // 4))
    for number in range(rounds):
        for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
            stages, before = way.server.stage_seconds(), way.server.cpu_seconds
            measured = sequential(way.server.port, requests[way.name], way.per_round)
            spent[way.name] += way.server.cpu_seconds - before
            client[way.name] += measured.client_cpu_seconds
            if measured.failures:
                raise RuntimeError(f"{way.name}: {measured.failures} requests failed: {measured.refused[:1]}")
            way.p50[size].append(measured.percentile_ms(50))
            if way.p50[size][-1] == way.best(size):
                done = {name: total - stages.get(name, 0.0) for name, total in way.server.stage_seconds().items()}
                way.stages[size] = {name: seconds / way.per_round * 1e3 for name, seconds in done.items()}
                way.stages[size]["all"] = float(measured.seconds.mean()) * 1e3
    for way in ways:
        way.cpu[size] = spent[way.name] / (rounds * way.per_round) * 1e3
        way.client[size] = client[way.name] / (rounds * way.per_round) * 1e3


def throughput(ways: Sequence[Way], asked: Sequence[Asked], rounds: int, clients: int) -> dict[str, float]:
    """Answers a second with several clients at once: the best round of each."""
    best = dict.fromkeys((way.name for way in ways), 0.0)
    for _ in range(rounds):
        for way in ways:
            requests = [way.write(request) for request in asked]
            measured = closed_loop(way.server.port, requests, clients=clients, number=4 * way.per_round)
            if measured.failures:
                raise RuntimeError(f"{way.name}: {measured.failures} requests failed: {measured.refused[:1]}")
            best[way.name] = max(best[way.name], measured.per_second)
    return best


def report(ways: dict[str, Way], rates: dict[str, float], differences: dict[int, float], clients: int) -> list[str]:
    """The page's tables."""
    floor, ours, binary, to_dict = (ways[key] for key in ("floor", "ours", "binary", "to_dict"))
    lines = ["| | " + " | ".join(f"p50, {s} | CPU, {s} | of the floor's p50" for s in SIZES) + " |"]
    lines.append("|---|" + "---:|" * 3 * len(SIZES))
    for way in ways.values():
        cells = [f"{way.best(s):.2f} | {way.cpu[s]:.2f} | {way.best(s) / floor.best(s):.2f}" for s in SIZES]
        lines.append(f"| {way.name} | {' | '.join(cells)} |")
    told = ", ".join(f"{value:.0e} at {size}" for size, value in differences.items())
    lines += [
        "",
        f"Milliseconds a request, one client. Largest difference between the scores of any two: {told} candidates. Of "
        f"the latency, {floor.client[100]:.2f} and {floor.client[500]:.2f} ms are CPU of the load itself.",
        "",
        "| figure | measured | wanted | |",
        "|---|---:|---:|---|",
    ]
    for size in SIZES:
        ratio, wanted = ours.best(size) / floor.best(size), WANTED["floor"][size]
        lines.append(figure(f"p50, of the floor's, {size} candidates", ratio, wanted, ratio <= wanted, "at most"))
    for size in SIZES:
        ratio, wanted = to_dict.best(size) / ours.best(size), WANTED["to_dict"][size]
        name = f"times as fast as `get_online_features(...).to_dict()`, {size} candidates"
        lines.append(figure(name, ratio, wanted, ratio >= wanted, "at least"))
    for size in SIZES:
        ratio, wanted = binary.best(size) / ours.best(size), WANTED["binary"]
        lines.append(figure(f"p50 of V2 binary, of V1's, {size} candidates", ratio, wanted, ratio <= wanted, "at most"))
    ratio, wanted = rates[ours.name] / rates[floor.name], WANTED["throughput"]
    name = f"answers a second, of the floor's, {clients} clients, 100 candidates"
    lines.append(figure(name, ratio, wanted, ratio >= wanted, "at least"))
    told = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    lines += ["", f"Answers a second with {clients} clients: {told}.", ""]
    lines += [
        f"Where the time of {ours.name} goes, mean milliseconds a request in its best round; the rest is HTTP:",
        "",
    ]
    names = [name for name in ours.stages[SIZES[0]] if name not in ("all", "retrieve")]
    lines += [f"| candidates | {' | '.join(names)} | rest | all |", "|---|" + "---:|" * (len(names) + 2)]
    for size in SIZES:
        of_stage = [ours.stages[size][name] for name in names]
        rest = ours.stages[size]["all"] - sum(of_stage)
        cells = " | ".join(f"{value:.2f}" for value in (*of_stage, rest, ours.stages[size]["all"]))
        lines.append(f"| {size} | {cells} |")
    return lines


def figure(name: str, value: float, wanted: float, met: bool, bound: str) -> str:
    """A row of the table of figures."""
    return f"| {name} | {value:.2f} | {bound} {wanted:g} | {'met' if met else '**missed**'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps the simulated world for the next run")
    parser.add_argument("--model", default="deepfm")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--requests", type=int, default=200, help="in a round; the slow ways do a twentieth")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    world = build_world(arguments.work, (arguments.model,))
    model = world.packages / arguments.model
    package = ModelPackage.load(model)
    with tempfile.TemporaryDirectory() as scratch, redis_server() as redis, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        store = create_store(world.tables, folder / "store", redis.address)
        feasts = with_feasts_own_redis(store, folder / "feast", redis.address)
        users, items = world.users(USERS), world.items()
        pack_users(store, package, users, redis.address)

        def start(name: str, *command: str | Path) -> Server:
            return stack.enter_context(running(name, command, folder))

        common = ("--model", model, "--feature-store")
        fast, slow = arguments.requests, max(3, arguments.requests // 20)
        served = start("evergreen serve", *evergreen_serve(model, store.path))
        floor = start("floor", "benchmarks.serving.floor", *common, store.path, "--redis", redis.address)
        one = start("one look-up", "benchmarks.serving.feast_to_dict", *common, feasts)
        three = start("three look-ups", "benchmarks.serving.feast_to_dict", *common, feasts, "--look-ups", "3")
        frame = start("to_df", "benchmarks.serving.feast_to_df", *common, feasts)
        ways = {
            "floor": Way("the floor: bare ASGI, packed features, split model", floor, Asked.v1, read_v1, fast),
            "ours": Way("`evergreen serve`, V1", served, Asked.v1, read_v1, fast),
            "binary": Way("`evergreen serve`, V2 binary", served, Asked.v2_binary, read_v2, fast),
            "json": Way("`evergreen serve`, V2 JSON", served, Asked.v2_json, read_v2, fast),
            "three": Way("KServe + Feast `to_dict()`, three look-ups", three, Asked.v1, read_v1, slow),
            "to_dict": Way("KServe + Feast `to_dict()`", one, Asked.v1, read_v1, slow),
            "to_df": Way("KServe + Feast `to_df()`", frame, Asked.v1, read_v1, slow),
        }
        differences = {}
        asked = {size: make_requests(users, items, size, REQUESTS, world.as_of) for size in SIZES}
        for size in SIZES:
            differences[size] = largest_difference(list(ways.values()), asked[size][:CHECKED])
            if differences[size] > TOLERANCE:
                raise RuntimeError(f"the scores of {size} candidates differ by {differences[size]}: nothing to compare")
        for size in SIZES:
            take_turns(list(ways.values()), size, asked[size], arguments.rounds)
        rates = throughput([ways["floor"], ways["ours"]], asked[100], arguments.rounds // 2, arguments.clients)
    lines = [
        f"# Serving against its floor: {arguments.model}, {hardware()}",
        "",
        f"{len(items):,} items, {len(package.info.features)} features, Redis on loopback. Of each way the best of "
        f"{arguments.rounds} rounds of {fast} requests ({slow} for those with Feast in the request).",
        "",
        *report(ways, rates, differences, arguments.clients),
    ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
