"""What is lost where cold rows are rounded to int8: `python serving/benchmarks/cold_rows.py [--run RUN] [--data DS]`.

Histories are computed once, kept cold, read back and made whole, exactly and rounded. Told are the bytes, the largest
difference of a state's row (relative to its norm), how far scores of the exact state's 100 best items move (also as a
share of those scores' standard deviation), and how many of 10 and 100 stay. Without `--data`, histories are random.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from reference import T0, build, heading, reference_run


def random_history(item_ids: list[str], length: int, seed: int) -> list[Any]:
    """Return a history over a run's items."""
    import numpy as np

    from ksa_serving.events import StoredEvent

    draw = np.random.default_rng(seed)
    rows, times = draw.integers(1, len(item_ids), length), T0 + np.cumsum(draw.integers(1, 600, length))
    return [
        StoredEvent(n, item_ids[row], int(time), None, None, None) for n, (row, time) in enumerate(zip(rows, times), 1)
    ]


def real_histories(data: Path, length: int, most: int) -> list[list[Any]]:
    """Return histories of a prepared data set that are at least so long, cut to that."""
    import pyarrow.parquet as pq

    from ksa_serving.events import StoredEvent

    items = pq.read_table(data / "items.parquet", columns=["item_id", "item_index"])
    name = dict(zip(items["item_index"].to_pylist(), items["item_id"].to_pylist()))
    found: list[list[Any]] = []
    for file in sorted((data / "histories").glob("*.parquet")):
        table = pq.read_table(file, columns=["item_index", "timestamp"])
        for rows, times in zip(table["item_index"].to_pylist(), table["timestamp"].to_pylist()):
            if len(rows) >= length and len(found) < most:
                pairs = list(zip(rows, times))[:length]
                found.append([StoredEvent(n, name[r], t, None, None, None) for n, (r, t) in enumerate(pairs, 1)])
    return found


def made_whole(model: Any, state: Any, events: list[Any]) -> tuple[Any, int]:
    """Return a state kept cold, read back and replayed, and the bytes that were kept of it."""
    from ksa_serving.models import Mark

    parts = model.dump(state)
    kept = len(parts.about) + sum(len(parts.segments[name]) for name in parts.segments)
    cold = model.load(parts)
    first = max(0, model.replay_start(len(events)) - 1)
    whole = model.rewind(cold, len(events), first, events[first:], Mark(len(events), state.history_hash))
    return model.with_own_items(whole, cold, []), kept


def main() -> None:
    """Measure and print one table."""
    from ksa_serving.library_model import LibraryModel
    from ksa_serving.models import Question
    from recsys_ksa.recommender import Recommender

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run; the reference model without it")
    parser.add_argument("--data", type=Path, help="the prepared data set its histories come from")
    parser.add_argument("--events", type=int, nargs="+", default=[1000, 10_000], help="of each history")
    parser.add_argument("--histories", type=int, default=20)
    args = parser.parse_args()
    recommender = Recommender.load(args.run or reference_run())
    exact, rounded = LibraryModel(recommender), LibraryModel(recommender, "int8")
    print(heading())
    print(
        "| events | histories | bytes int8 / exact | largest row difference | score moves by | of its spread |", end=""
    )
    print(" top 10 kept | top 100 kept |\n|---|---|---|---|---|---|---|---|")
    for length in args.events:
        ids = [str(name) for name in recommender.run.items.item_id]
        histories = (
            real_histories(args.data, length, args.histories)
            if args.data
            else [random_history(ids, length, seed) for seed in range(args.histories)]
        )
        told: list[tuple[float, ...]] = []
        for events in histories:
            state = build(exact, events)
            (whole, full), (near, packed) = (made_whole(model, state, events) for model in (exact, rounded))
            assert exact.difference(whole, state) < 1e-5
            now = events[-1].timestamp + 3600
            best, other = (
                model.recommend([Question(s, 100, now)])[0] for model, s in ((exact, whole), (rounded, near))
            )
            names = [item for item, _ in best]
            moved = [abs(a - b) for (_, a), b in zip(best, rounded.score(near, names, now)) if b is not None]
            spread = statistics.pstdev(score for _, score in best) or 1.0
            others = [item for item, _ in other]
            told.append(
                (
                    packed / full,
                    rounded.difference(near, state),
                    statistics.mean(moved),
                    statistics.mean(moved) / spread,
                    len(set(names[:10]) & set(others[:10])) / 10,
                    len(set(names) & set(others)) / max(1, len(names)),
                )
            )
        mean = [statistics.mean(column) for column in zip(*told)]
        print(
            f"| {length:,} | {len(told)} | {mean[0]:.3f} | {max(row[1] for row in told):.1e} | {mean[2]:.1e} | "
            f"{mean[3]:.1%} | {mean[4]:.1%} | {mean[5]:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
