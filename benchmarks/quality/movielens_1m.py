"""MovieLens-1M, leave-one-out: a Transformer ranks the full catalogue for each user's last film.

    python benchmarks/quality/movielens_1m.py --data ratings.dat --out benchmarks/quality/movielens_1m.md

See README.md beside this file for where to get the data, the protocol and published figures.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from hardware import hardware
from loaders import load_interactions

from evergreen.contracts.errors import EvergreenError
from evergreen.training.next_item import (
    NextItemConfig,
    NextItemCurvePoint,
    evaluate_counts,
    evaluate_next_item,
    train_next_item,
)
from evergreen.training.sequences import Sequences, leave_one_out

CONFIG = Path(__file__).parent / "movielens_1m.json"
RECENT = 3
"""Last items of each user that the recent-popularity baseline counts."""
PUBLISHED = (
    ("SASRec with softmax over 3,000 negatives (Klenitskiy and Vasilev 2023)", 0.186, 0.316),
    ("goal", 0.182, 0.315),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="ratings.dat, `user item` lines, or CSV")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file for the results")
    parser.add_argument("--config", type=Path, default=CONFIG, help="JSON of NextItemConfig")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--min-count", type=int, default=5, help="leave out items and users that are rarer")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    config = NextItemConfig.read(arguments.config)

    sequences = Sequences.from_interactions(*load_interactions(arguments.data, min_count=arguments.min_count))
    size = f"{len(sequences):,} users, {sequences.num_items:,} items, {len(sequences.items.values):,} interactions"
    logging.info("%s", size)
    train, validation, test = leave_one_out(sequences)
    started, processor = time.perf_counter(), time.process_time()
    model, curve = train_next_item(train, validation, config)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    warm = train.counts() > 0
    reports = {
        "Transformer": evaluate_next_item(model, test, warm=warm),
        "popularity": evaluate_counts(train.counts(), test, warm=warm),
        f"popularity among each user's last {RECENT}": evaluate_counts(
            test.histories.counts(last=RECENT), test, warm=warm
        ),
    }
    page = report(reports, config, curve, size=size, threads=arguments.threads, seconds=seconds, processor=processor)
    arguments.out.write_text(page)
    print(page)


def report(
    reports: dict[str, dict[str, float]],
    config: NextItemConfig,
    curve: list[NextItemCurvePoint],
    *,
    size: str,
    threads: int,
    seconds: float,
    processor: float,
) -> str:
    best = max(curve, key=lambda point: point.ndcg)
    lines = [
        "# MovieLens-1M, leave-one-out, full catalogue",
        "",
        f"{size}. Items of a user's history are no candidates; the validation item is part of the test history.",
        f"On {hardware()}, {threads} threads: {seconds / 60:.1f} minutes ({processor / 60:.1f} of processor time), "
        f"{len(curve)} epochs, best on validation after {best.epoch} (NDCG@10 {best.ndcg:.4f}).",
        "",
        "| test | NDCG@10 | HR@10 | NDCG@100 | HR@100 | users whose film is cold | their HR@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in reports.items():
        figures = " | ".join(f"{values[key]:.4f}" for key in ("ndcg@10", "hr@10", "ndcg@100", "hr@100"))
        cold = int(values["cold_items_users"])
        cold_hit = f"{values['cold_items_hr@10']:.4f}" if cold else ""
        lines.append(f"| {name} | {figures} | {cold} | {cold_hit} |")
    lines += [f"| {name} | {ndcg:.3f} | {hit:.3f} | | | | |" for name, ndcg, hit in PUBLISHED]
    lines += [
        "",
        "All users are warm: each has at least three films. A film is cold when no training sequence has it.",
        "",
        "```json",
        config.model_dump_json(indent=2),
    ]
    return "\n".join([*lines, "```", ""])


if __name__ == "__main__":
    try:
        main()
    except EvergreenError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
