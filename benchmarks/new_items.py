"""What `ksa add-items` gives: next baskets four weeks after training, as trained and with the items met since.

A year of grocery baskets. The run is trained on all but the last 56 days; 28 days later every household is asked for
its next basket within the 28 days that are left. Both runs know the same events and the popularity of that day; one
knows the items that were first sold since, as unknown items only.

    python -m benchmarks.new_items

NDCG@10 is of sets, against the best of at most ten; the interval is of 2,000 resamples of households.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from recsys_ksa.cli import call_verb
from recsys_ksa.commands.config_files import config_file
from recsys_ksa.commands.demo_data import demo_log
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.evaluate.intervals import Bootstrap
from recsys_ksa.recommender import Recommender

DAY = 86_400
BEST = 10


def until(log: Path, days: int, file: Path) -> Path:
    """Write what was sold until so many days before the log's end."""
    time = pl.col("transaction_timestamp")
    pl.scan_parquet(log).filter(time <= time.max() - pl.duration(days=days)).sink_parquet(file)
    return file


def questions(whole: Path, asked: int) -> Iterator[tuple[list[str], list[int], set[str], int]]:
    """Yield each household's items and times until `asked`, its next basket, and when that was sold."""
    dataset = open_dataset(whole)
    histories, names = dataset.histories, dataset.items.item_id
    for user in range(histories.num_users):
        rows = histories.rows(user)
        time, item = histories.timestamp[rows], histories.item_index[rows]
        known = int(np.searchsorted(time, asked, "right"))
        if 0 < known < len(time):
            basket = {str(names[each]) for each in item[time == time[known]]}
            yield [str(names[each]) for each in item[:known]], time[:known].tolist(), basket, int(time[known])


def ndcg(items: Sequence[str], basket: set[str]) -> float:
    """Return the NDCG@10 of a list for a set."""
    gain = 1 / np.log2(np.arange(2, BEST + 2))
    hits = np.array([item in basket for item in items])
    return float((gain[: len(hits)] * hits).sum() / gain[: min(BEST, len(basket))].sum())


def main() -> None:
    """Prepare, train, add, ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=1800.0, help="most that training may take")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench(Path(name), args.steps, args.seconds)


def bench(folder: Path, steps: int, seconds: float) -> None:
    """Print the table."""
    transactions, products = demo_log()
    options = ["--items", str(products), "--config", str(config_file("prepare/complete-journey.toml"))]
    logs = {
        "whole": transactions,
        "trained": until(transactions, 56, folder / "trained.parquet"),
        "newer": until(transactions, 28, folder / "newer.parquet"),
    }
    for name, log in logs.items():
        call_verb("prepare", [str(log), *options, "--out", str(folder / name)])
    run, more = folder / "run", folder / "more"
    limits = ["--set", f"train.max_steps={steps}", "--set", f"train.max_seconds={seconds}"]
    config = str(config_file("complete-journey/ksa.toml"))
    call_verb("train", [config, "--data", str(folder / "trained"), "--out", str(run), *limits])
    call_verb("add-items", [str(run), "--data", str(folder / "newer"), "--out", str(more)])
    asked = int(open_dataset(folder / "newer").histories.timestamp.max())
    runs = {}
    for name, path in (("as trained", run), ("with the items met since", more)):
        call_verb("index", [str(path), "--data", str(folder / "newer"), "--popularity-as-of", str(asked)])
        runs[name] = Recommender.load(path)
    added = set(runs["with the items met since"].run.items.index_of) - set(runs["as trained"].run.items.index_of)
    values, recalls, shown = [], [], 0
    for items, times, basket, when in questions(folder / "whole", asked):
        answers = []
        for rec in runs.values():
            state = rec.append(rec.new_state(), items, times)
            answers.append([item for item, _ in rec.recommend(state, BEST, when)])
        values.append([ndcg(answer, basket) for answer in answers])
        shown += len(added & set(answers[1]))
        if bought := added & basket:
            recalls.append([len(bought & set(answer)) / len(bought) for answer in answers])
    found = Bootstrap(np.array(values), resamples=2000)
    print(f"{len(added)} items added; {shown} of {BEST * len(values)} recommended are among them")
    for at, (name, recall) in enumerate(zip(runs, np.mean(recalls, axis=0), strict=True)):
        mean = found.interval(at)
        ndcgs = f"NDCG@10 {mean.value:.4f} [{mean.low:.4f}, {mean.high:.4f}]"
        print(f"{name:<26} {ndcgs}, recall@10 of added items' purchases {recall:.4f} in {len(recalls)} baskets")
    gain = found.difference(1, 0)
    print(f"difference                 NDCG@10 {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]")


if __name__ == "__main__":
    main()
