"""Events per second, processor seconds and peak memory: `ksa prepare`, pandas doing the same, appends to the rest.

Appended are the log's last day, and its last 1% of events, each to a data set of the events before; then 1% of events
of few users (a log of another seed) to the whole, and the same again in one process that prepared the whole, which
loads the libraries once. Beside each, how many of the data set's events belong to users whom it touches: their whole
rows are written again. After each append, what opening the new version costs the first time, when the loader's copy is
brought up to date.

    python pipelines/benchmarks/prepare.py --events 1000000 10000000 --json figures.json

Logs come from `ksa synth`, seed 1. Each run is a process of its own; memory is the largest sum of the resident sets
of the process and its children, read four times a second (pages of mapped files count).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import polars as pl

DAY = 86_400


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds, its processor seconds, and the peak of resident memory in MiB."""
    began, used = time.monotonic(), processor_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    seconds = round(time.monotonic() - began, 2)
    return {"seconds": seconds, "processor_seconds": round(processor_seconds() - used, 2), "peak_mib": peak >> 20}


def processor_seconds() -> float:
    """Return the processor time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tree_memory(process: int) -> int:
    """Return the resident bytes of a process and its children."""
    try:
        resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return resident + sum(tree_memory(int(child)) for child in children)


def split_log(log: Path, folder: Path, cut: int) -> tuple[Path, Path]:
    """Write the log's events up to a time, and those after it, as two folders of one file a part."""
    for name, keep in (("old", pl.col("timestamp") <= cut), ("new", pl.col("timestamp") > cut)):
        (folder / name).mkdir(parents=True)
        for part in sorted(log.glob("*.parquet")):
            pl.scan_parquet(part).filter(keep).sink_parquet(folder / name / part.name)
    return folder / "old", folder / "new"


def touched_share(old: Path, new: Path) -> float:
    """Return the share of the old events that belong to users of the new ones."""
    events = pl.scan_parquet(old / "*.parquet").select("user_id")
    touched = events.join(pl.scan_parquet(new / "*.parquet").select("user_id").unique(), on="user_id", how="semi")
    share = pl.collect_all([touched.select(pl.len()), events.select(pl.len())], engine="streaming")
    return share[0].item() / share[1].item()


def ksa(*arguments: object) -> list[str]:
    """Return the command line of a verb."""
    code = "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *map(str, arguments)]


def bench(events: int, folder: Path, peers: bool, memory: str) -> list[dict]:
    """Return the figures of one size."""
    log = folder / "log"
    rows = [{"what": "synth", **measured(ksa("synth", "--out", log, "--events", events, "--seed", 1))}]
    rows.append({"what": "prepare", **measured(ksa("prepare", log, "--out", folder / "ds", "--memory", memory))})
    if peers:
        peer = Path(__file__).with_name("pandas_prepare.py")
        rows.append({"what": "pandas", **measured([sys.executable, str(peer), str(log), str(folder / "pandas")])})
        shutil.rmtree(folder / "pandas")
        time_column = pl.scan_parquet(log / "*.parquet").select("timestamp")
        last_day = time_column.max().collect().item() - DAY
        last_hundredth = time_column.quantile(0.99, "lower").collect().item()
        for name, cut in (("last day", last_day), ("last 1%", last_hundredth)):
            rows += bench_append(log, folder / name.replace(" ", "-"), name, cut)
    few = folder / "few"
    measured(ksa("synth", "--out", few, "--events", events // 100, "--seed", 2))
    rows += appended(folder / "ds", log, few, "1% of few users")
    rows += in_one_process(log, few, folder / "again")
    return [{"events": events, **row, "events_per_second": round(events / row["seconds"])} for row in rows]


def bench_append(log: Path, folder: Path, name: str, cut: int) -> list[dict]:
    """Return the figures of appending what a log has after a time, and of preparing what it has before."""
    old, new = split_log(log, folder, cut)
    rows = [{"what": f"all but {name}", **measured(ksa("prepare", old, "--out", folder / "ds"))}]
    rows += appended(folder / "ds", old, new, name)
    shutil.rmtree(folder)
    return rows


def appended(dataset: Path, old: Path, new: Path, name: str) -> list[dict]:
    """Return the figures of appending a log, and of opening the data set for the first time after that."""
    touched = f"{touched_share(old, new):.0%} touched"
    code = f"from recsys_ksa.data.dataset import open_dataset; open_dataset({str(dataset)!r})"
    return [
        {"what": f"+ {name}, {touched}", **measured(ksa("append-log", dataset, new))},
        {"what": "  opened first", **measured([sys.executable, "-c", code])},
        {"what": "  opened again", **measured([sys.executable, "-c", code])},
    ]


def in_one_process(log: Path, new: Path, dataset: Path) -> list[dict]:
    """Return the figures of loading, preparing a log and appending another, in one process."""
    command = [sys.executable, str(Path(__file__).with_name("one_process.py")), str(log), str(new), str(dataset)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith(b"{")]


def report(
    sizes: Iterable[int], bench: Callable[[int, Path], Iterable[dict[str, Any]]], json_file: Path | None
) -> None:
    """Print the rows of a benchmark as they come, of each size in a folder of its own, and write them as JSON."""
    rows = []
    for events in sizes:
        folder = Path(tempfile.mkdtemp(prefix="ksa-bench-"))
        try:
            for row in bench(events, folder):
                rows.append(row)
                spent = "{seconds:8.2f} s {processor_seconds:8.2f} s of processors {events_per_second:>10,}/s"
                print(("{events:>13,} {what:<32} " + spent + " {peak_mib:>7,} MiB").format(**row), flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--no-peers", action="store_true", help="prepare alone, without pandas and append")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report(args.events, lambda events, folder: bench(events, folder, not args.no_peers, args.memory), args.json)


if __name__ == "__main__":
    main()
