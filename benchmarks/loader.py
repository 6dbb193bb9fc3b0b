"""Events a second of the training loader: batches of a token budget with their questions, negatives and targets.

    python -m benchmarks.loader [--data DS] [--events 10000000] [--median-length 1000] [--processes 0,1,2] [--json FILE]

The data set is a log of `ksa synth`, prepared, unless one is given; its cache is mapped and stays in memory. What is
measured is `train.feed`, as training calls it, with nobody to wait for: a thread (0), and processes. The first `--warm`
batches, while processes start, are left out. Processor time is this process's: with a thread all there is, with
processes what training itself pays for what they send. `--fastest` is the fastest training step measured
(kernels/README.md).
"""

import argparse
import json
import resource
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from recsys_ksa.cli import call_verb
from recsys_ksa.config import RunConfig, load_config
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.data.negatives import NegativeSampler, training_counts
from recsys_ksa.data.training_batches import TrainingBatches
from recsys_ksa.train.feed import Place, Source, feed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a prepared data set; one is made unless given")
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--median-length", type=float, default=1_000.0)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--max-length", type=int, default=16_384)
    parser.add_argument("--questions", type=int, default=200, help="a user, at most, as in benchmarks/training.py")
    parser.add_argument("--processes", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm", type=int, default=20)
    parser.add_argument("--config", type=Path, default=Path("configs/ml-1m/ksa.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change a key of the run's config")
    parser.add_argument("--fastest", type=float, default=1.676e6, help="events a second of the fastest training step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_dataset(args.data or _made(Path(folder), args.events, args.median_length))
        source = source_of(dataset, config_of(args))
        histories = dataset.histories
        mean = histories.num_events / histories.num_users
        print(
            f"{histories.num_events:,} events of {histories.num_users:,} users (mean {mean:,.0f}, longest "
            f"{histories.lengths.max():,}), {args.tokens:,} events a batch, at most {args.questions} questions a user"
        )
        rows = [measure(source, int(processes), args) for processes in args.processes.split(",")]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def measure(source: Source, processes: int, args: argparse.Namespace) -> dict[str, float]:
    """Return and print what a feed of so many processes gives."""
    inputs = feed(source, Place(0, 0, 0), torch.device("cpu"), processes)
    with closing(inputs):  # pyright: ignore[reportArgumentType]
        for _ in islice(inputs, args.warm):
            pass
        began, used = time.perf_counter(), time.process_time()
        events = sum(given.batch.num_events for given in islice(inputs, args.steps))
        seconds, used = time.perf_counter() - began, time.process_time() - used
    rate = events / seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    by = f"{processes} processes" if processes else "a thread"
    print(
        f"{by:12} | {rate / 1e6:6.2f} M events/s | {seconds / args.steps * 1e3:6.1f} ms a batch | "
        f"{rate / args.fastest:4.1f} x the fastest step | here {used / args.steps * 1e3:5.1f} ms of processor time a "
        f"batch, {events / used / 1e6:.2f} M events a second of it, peak {peak:,.0f} MiB",
        flush=True,
    )
    return {"processes": processes, "events_per_second": rate, "processor_seconds_here": used, "steps": args.steps}


def config_of(args: argparse.Namespace) -> RunConfig:
    """Return the config whose batches are built."""
    given = [
        f"data.max_length={args.max_length}",
        f"loss.questions_per_user={args.questions}",
        f"train.batch_tokens={args.tokens}",
    ]
    return load_config(RunConfig, args.config, [*given, *args.set])


def source_of(dataset: Dataset, config: RunConfig) -> Source:
    """Return what training would feed from, of whole histories."""
    end = np.asarray(dataset.histories.lengths)
    sampler = NegativeSampler(training_counts(dataset.histories, end, dataset.num_items), 0.5, config.seed)
    return Source(TrainingBatches(dataset.histories, end, config), sampler, config.loss.num_negatives)


def _made(folder: Path, events: int, median_length: float) -> Path:
    """Prepare a log of `ksa synth`."""
    log, dataset = folder / "log", folder / "ds"
    call_verb("synth", ["--out", str(log), "--events", str(events), "--median-length", str(median_length)])
    call_verb("prepare", [str(log), "--out", str(dataset)])
    return dataset


if __name__ == "__main__":
    main()
