"""Finding the 500 items nearest to a user: all vectors read at each search, against indexes that read some.

    python -m benchmarks.retrieval --training-set DIR --retriever PACKAGE --ranker PACKAGE [--num-items 100000]
        [--ranked-log DIR --ranked-packages DIR] [--out benchmarks/retrieval.md]

The catalogue is drawn column by column from the test rows' items, so that no two items are alike; its vectors are those
of the trained two towers, as are the users'. Indexes of faiss-cpu, hnswlib and usearch take part where these packages
are installed (Evergreen does not need them); each is tuned to find 99 % of the 500. One thread; milliseconds are CPU.

With --ranked-log (snapshot/, feature_tables/ and training_set/ of a log of interactions) and packages two_tower and
deepfm trained on it, the test period's requests are answered from the whole catalogue and from what is retrieved first.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.quality.hardware import hardware
from benchmarks.split_scoring import cpu_milliseconds, last_rows, make_requests
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import Side, TrainingSet
from evergreen.evaluation.pairs import PairFeatures
from evergreen.evaluation.queries import Catalogue, find_queries
from evergreen.evaluation.ranking import candidates_of, recent_popularity
from evergreen.metrics.ranking import ndcg_of_ranks, recall_of_ranks, relevant_ranks
from evergreen.models.package import ModelPackage
from evergreen.models.split.scorer import SplitScorer
from evergreen.serving.retriever import RetrievalIndex, best_rows

K = 500
WANTED_RECALL = 0.99
NUM_USERS = 100
ROUNDS = 8
QUERIES_AT_A_TIME = 50
NOTHING = np.empty(0, np.int64)

Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]


@dataclass(frozen=True)
class Candidate:
    """One way to search."""

    name: str
    bytes: int
    search: Search
    tune: Callable[[int], None] | None = None
    """Sets how much of the index is read: more finds more."""
    efforts: Sequence[int] = (0,)


def exact_ways(vectors: NDArray[np.float32]) -> Iterator[Callable[[], Candidate]]:
    """Every vector is read."""
    columns = torch.from_numpy(np.ascontiguousarray(vectors.T))

    def whole() -> Candidate:
        return Candidate("every vector, float32 (ours)", vectors.nbytes, lambda u: best_rows(product(u), K))

    def product(user: NDArray[np.float32]) -> NDArray[np.float32]:
        return (torch.from_numpy(user) @ columns).numpy()

    def plain() -> Candidate:
        def search(user: NDArray[np.float32]) -> NDArray[np.int64]:
            return torch.topk(torch.from_numpy(user) @ columns, K).indices.numpy()

        return Candidate("every vector, float32, torch.topk", vectors.nbytes, search)

    def rounded() -> Candidate:
        scale = 127 / np.abs(vectors).max()
        small = torch.from_numpy(np.round(vectors * scale).astype(np.int8))

        def search(user: NDArray[np.float32]) -> NDArray[np.int64]:
            rounded_user = torch.from_numpy(np.round(user * (127 / np.abs(user).max())).astype(np.int8))
            rough = torch._int_mm(small, rounded_user[:, None]).squeeze(1).numpy().astype(np.float32)
            chosen = best_rows(rough, 2 * K)
            return chosen[best_rows(vectors[chosen] @ user, K)]

        return Candidate("every vector, int8, the best 1000 again in float32", small.numel(), search)

    yield from (whole, plain, rounded)


def faiss_ways(vectors: NDArray[np.float32]) -> Iterator[Callable[[], Candidate]]:
    """The indexes of faiss."""
    import faiss

    faiss.omp_set_num_threads(1)
    width = vectors.shape[1]

    def of(name: str, index: Any, tune: Callable[[int], None] | None, efforts: Sequence[int]) -> Candidate:
        index.add(vectors)
        return Candidate(
            name, len(faiss.serialize_index(index)), lambda u: index.search(u[None], K)[1][0], tune, efforts
        )

    def flat() -> Candidate:
        return of("faiss IndexFlatIP", faiss.IndexFlatIP(width), None, (0,))

    def cells() -> Candidate:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, 512, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        return of(
            "faiss IndexIVFFlat, 512 cells", index, lambda n: setattr(index, "nprobe", n), (16, 32, 64, 96, 128, 192)
        )

    def graph() -> Candidate:
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        return of("faiss IndexHNSWFlat, M=32", index, lambda n: setattr(index.hnsw, "efSearch", n), EFFORTS)

    yield from (flat, cells, graph)


def hnswlib_ways(vectors: NDArray[np.float32]) -> Iterator[Callable[[], Candidate]]:
    """The graph of hnswlib."""
    import hnswlib

    def graph() -> Candidate:
        index = hnswlib.Index(space="ip", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), M=32, ef_construction=100)
        index.set_num_threads(1)
        index.add_items(vectors, num_threads=1)
        search = lambda u: index.knn_query(u[None], K, num_threads=1)[0][0].astype(np.int64)  # noqa: E731
        return Candidate("hnswlib, M=32", index.index_file_size(), search, index.set_ef, EFFORTS)

    yield graph


def usearch_ways(vectors: NDArray[np.float32]) -> Iterator[Callable[[], Candidate]]:
    """The graph of usearch."""
    from usearch.index import Index

    def graph() -> Candidate:
        index = Index(ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=32, expansion_add=100)
        index.add(np.arange(len(vectors)), vectors, threads=1)
        search = lambda u: index.search(u, K, threads=1).keys.astype(np.int64)  # noqa: E731
        tune = lambda n: setattr(index, "expansion_search", n)  # noqa: E731
        return Candidate("usearch, M=32", index.memory_usage, search, tune, EFFORTS)

    yield graph


EFFORTS = (500, 700, 1000, 1500, 2500)
LIBRARIES = {"faiss": faiss_ways, "hnswlib": hnswlib_ways, "usearch": usearch_ways}


def compare_searches(vectors: NDArray[np.float32], users: NDArray[np.float32]) -> list[str]:
    """The table of ways to search."""
    truth = [set(np.argsort(-(vectors @ user), kind="stable")[:K].tolist()) for user in users]
    lines = [
        f"| search of {len(vectors):,} | effort | recall@{K} | p50, ms | of ours | memory, MB | to build, s |",
        "|---|" + "---:|" * 6,
    ]
    builders = list(exact_ways(vectors))
    for library, make in LIBRARIES.items():
        if importlib.util.find_spec(library):
            builders += make(vectors)
        else:
            print(f"{library} is not installed: left out")
    ways, figures = [], []
    for build in builders:
        started = time.process_time()
        way = build()
        built = time.process_time() - started
        for effort in way.efforts:
            if way.tune:
                way.tune(effort)
            found = [set(way.search(user).tolist()) for user in users]
            recall = float(np.mean([len(own & best) / K for own, best in zip(found, truth, strict=True)]))
            if recall >= WANTED_RECALL:
                break
        ways.append(way)
        figures.append((effort, recall, built))
    rounds = np.array([[median_milliseconds(way, users) for way in ways] for _ in range(ROUNDS)])
    for way, (effort, recall, built), p50 in zip(ways, figures, rounds.min(axis=0), strict=True):
        start = f"| {way.name} | {effort or ''} | {recall:.3f} | {p50:.2f} | {p50 / rounds.min(axis=0)[0]:.2f} "
        lines.append(start + f"| {way.bytes / 1e6:.1f} | {built:.1f} |")
        print(lines[-1], flush=True)
    return lines


def median_milliseconds(way: Candidate, users: NDArray[np.float32]) -> float:
    """CPU of a search."""
    return float(np.median([cpu_milliseconds(partial(way.search, user)) for user in users]))


def draw_items(items: pa.Table, num_items: int) -> pa.Table:
    """Items of which each feature is some item's."""
    rng = np.random.default_rng(0)
    columns = {name: items[name].take(rng.integers(len(items), size=num_items)) for name in items.column_names}
    columns["item_id"] = pa.array([f"drawn {place}" for place in range(num_items)])
    return pa.table(columns).combine_chunks()


def user_vectors(index: RetrievalIndex, users: Sequence[dict[str, Any]]) -> NDArray[np.float32]:
    """(num_users, output_dim), each of the length that the two towers give it."""
    with torch.inference_mode():
        halves = [index._model.user_half(index._users.encode(user)[0])[0][0].numpy() for user in users]
    return np.stack(halves)


def compare_requests(package: ModelPackage, ranker: ModelPackage, test: pa.Table, items: pa.Table) -> list[str]:
    """The table of what retrieval adds to a request that ranks 500."""
    lines = [
        f"| items | retrieve, p50 | rank {K}, p50 | both / rank | build, s | update 1 %, s | vectors, MB |",
        "|---:|" + "---:|" * 6,
    ]
    for num_items in (2_000, 10_000, 100_000, 300_000):
        drawn = draw_items(items, num_items)
        started = time.process_time()
        index = RetrievalIndex.build(package, drawn)
        built = time.process_time()
        index.updated(np.arange(num_items // 100), drawn.slice(0, num_items // 100))
        updated = time.process_time()
        scorer = SplitScorer.prepare(ranker, drawn)
        requests = make_requests(ranker, drawn, test, K, NUM_USERS)
        users = as_users(index, test, NUM_USERS)
        rounds = []
        for _ in range(ROUNDS):
            spent = []
            for user, request in zip(users, requests, strict=True):
                retrieve = cpu_milliseconds(partial(index.search, user, K, NOTHING))
                rank = cpu_milliseconds(partial(scorer.score, request.user, request.pairs, request.rows))
                spent.append((retrieve, rank, retrieve + rank))
            rounds.append(np.median(spent, axis=0))
        retrieve, rank, both = np.min(rounds, axis=0)
        lines.append(
            f"| {num_items:,} | {retrieve:.2f} | {rank:.2f} | {both / rank:.2f} "
            f"| {built - started:.2f} | {updated - built:.3f} | {index.vectors.numel() * 4 / 1e6:.1f} |"
        )
        print(lines[-1], flush=True)
    return lines


def compare_answers(log: Path, packages: Path, num_queries: int) -> list[str]:
    """The table of what is lost when not the whole catalogue is ranked."""
    snapshot, tables = Snapshot.load(log / "snapshot"), FeatureTables.load(log / "feature_tables")
    test = TrainingSet.load(log / "training_set").manifest.splits["test"]
    queries = find_queries(snapshot, tables, start=test.start, end=test.end, max_queries=num_queries, seed=0).queries
    retriever, ranker = (ModelPackage.load(packages / name) for name in ("two_tower", "deepfm"))
    catalogue, features = Catalogue(tables), PairFeatures(queries, tables, snapshot.mapping)
    ways = {"two_tower": (50, 100, 200, 500, 1000), "recent popularity": (500, 1000)}
    names = ["the whole catalogue", *(f"{k:,} by {name}" for name, some in ways.items() for k in some)]
    ndcg, recall, reached, best = ({name: [] for name in names} for _ in range(4))
    sizes = []
    for first in range(0, len(queries), QUERIES_AT_A_TIME):
        asked = queries[first : first + QUERIES_AT_A_TIME]
        candidates = [candidates_of(query, catalogue) for query in asked]
        ends = np.cumsum([len(table) for table in candidates])
        pairs = features.join(asked, candidates)
        ranked = ranker.scores_of_encoded(pairs.encode(ranker.encoder))
        orders = {
            "two_tower": retriever.scores_of_encoded(pairs.encode(retriever.encoder)),
            "recent popularity": recent_popularity(pairs.candidates).astype(np.float32),
        }
        for query, table, end in zip(asked, candidates, ends, strict=True):
            own = slice(end - len(table), end)
            relevant = np.isin(table["item_id"].to_numpy(), list(query.relevant))
            scores = ranked[own]
            kept = {names[0]: np.arange(len(table))}
            kept |= {f"{k:,} by {name}": best_rows(orders[name][own], k) for name, some in ways.items() for k in some}
            top = best_rows(scores, 10)
            for name, rows in kept.items():
                of_retrieved = np.full(len(table), scores.min() - 1)
                of_retrieved[rows] = scores[rows]
                ranks = relevant_ranks(of_retrieved, relevant)
                ndcg[name].append(ndcg_of_ranks(*ranks, k=10))
                recall[name].append(recall_of_ranks(*ranks, k=10))
                reached[name].append(relevant[rows].sum() / relevant.sum())
                best[name].append(np.isin(top, rows).mean())
            sizes.append(len(table))
    lines = [
        f"What is lost when {ranker.info.name} ranks only what is retrieved ({snapshot.mapping.name}): {len(queries)} "
        f"requests of the test period, {np.mean(sizes):,.0f} items each; items that the user took up are relevant.",
        "",
        "| ranked | relevant among them | of the best 10 of all | NDCG@10 | recall@10 |",
        "|---|" + "---:|" * 4,
    ]
    for name in names:
        figures = [np.mean(own[name]) for own in (reached, best, ndcg, recall)]
        lines.append(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")
        print(lines[-1], flush=True)
    return lines


def as_users(index: RetrievalIndex, test: pa.Table, number: int) -> list[dict[str, Any]]:
    """Users of test rows."""
    rows = np.random.default_rng(1).integers(len(test), size=number)
    return test.take(rows).select([feature.name for feature in index.features(Side.USER)]).to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training-set", type=Path, required=True)
    parser.add_argument("--retriever", type=Path, required=True, help="package of a two_tower")
    parser.add_argument("--ranker", type=Path, required=True, help="package of any model of the same training set")
    parser.add_argument("--num-items", type=int, default=100_000)
    parser.add_argument("--ranked-log", type=Path)
    parser.add_argument("--ranked-packages", type=Path)
    parser.add_argument("--ranked-queries", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training_set = TrainingSet.load(arguments.training_set)
    test = training_set.read("test").combine_chunks()
    items = last_rows(test)
    package, ranker = ModelPackage.load(arguments.retriever), ModelPackage.load(arguments.ranker)
    index = RetrievalIndex.build(package, draw_items(items, arguments.num_items))
    vectors = np.ascontiguousarray(index.vectors.numpy().T)
    lines = [
        f"# Finding {K} of many items: {training_set.manifest.mapping.name}, {hardware()}, one thread",
        "",
        f"Vectors of {vectors.shape[1]} numbers; milliseconds of CPU: of {ROUNDS} rounds, in which all take turns, the "
        f"best median over {NUM_USERS} users. An index reads as much as it needs to find {WANTED_RECALL:.0%} of the "
        f"nearest {K}, or all that is tried.",
        "",
        *compare_searches(vectors, user_vectors(index, as_users(index, test, NUM_USERS))),
        "",
        f"What a request without candidates adds to one that ranks {K} ({ranker.info.name}): `RetrievalIndex.search`, "
        "encoding the user included, and `SplitScorer.score`.",
        "",
        *compare_requests(package, ranker, test, items),
    ]
    if arguments.ranked_log:
        lines += ["", *compare_answers(arguments.ranked_log, arguments.ranked_packages, arguments.ranked_queries)]
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
