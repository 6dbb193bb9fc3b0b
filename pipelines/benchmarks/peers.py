"""From one log to the first training batch of a sequential model: ours, RecBole's and RecTools' loaders as they ship.

    python pipelines/benchmarks/peers.py --events 1000000 [--json figures.json]

The log comes from `ksa synth`, seed 1. Each peer runs in a virtual environment of its own that is made here first
(`--environments FOLDER` keeps them), with its defaults for SASRec, by the calls its documentation names. RecBole reads
text, which is written beforehand and not counted. Ours are two commands: `ksa prepare`, once a log, and what each
training begins with, `open_dataset` and a batch. A process each; seconds and memory as in prepare.py. Starting Python
and loading the libraries counts, so the same with a thousand events is measured first.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

import polars as pl
from prepare import ksa, measured, report

PINNED = {
    "recbole": ("recbole==1.2.1", "torch==2.13.0", "numpy==1.26.4", "pandas==2.3.3", "scipy==1.14.1"),
    "rectools": ("rectools[torch]==0.19.0", "torch==2.13.0", "pyarrow==25.0.1"),
}
"""What each environment is made of. RecBole takes newer versions of numpy, pandas and scipy than it works with."""
COLUMNS = ("user_id", "item_id", "timestamp")
ATOMIC = ("user_id:token", "item_id:token", "timestamp:float")
HERE = Path(__file__).parent
FIRST_BATCH = """
import sys
from recsys_ksa.config import RunConfig
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.data.spans import training_end
from recsys_ksa.data.training_batches import TrainingBatches
dataset, config = open_dataset(sys.argv[1]), RunConfig()
TrainingBatches(dataset.histories, training_end(dataset, "loo"), config).batch(0, 0)
"""


def environment(name: str, folder: Path) -> Path:
    """Return the Python of a peer's environment, which is made where it is missing."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        venv.create(folder / name, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINNED[name]], check=True)
    return python


def bench(events: int, environments: Path, folder: Path) -> list[dict]:
    """Return the figures of one size."""
    log, atomic = folder / "log", folder / "log.inter" / "log"
    measured(ksa("synth", "--out", log, "--events", events, "--seed", 1))
    atomic.mkdir(parents=True)
    rows = pl.scan_parquet(log / "*.parquet").select(COLUMNS)
    rows.rename(dict(zip(COLUMNS, ATOMIC))).sink_csv(atomic / "log.inter", separator="\t")
    given = {"recbole": atomic.parent, "rectools": log}
    commands = {
        "ksa prepare": ksa("prepare", log, "--out", folder / "ds"),
        "ksa, first batch": [sys.executable, "-c", FIRST_BATCH, str(folder / "ds")],
    }
    commands |= {
        name: [str(environment(name, environments)), "-W", "ignore", str(HERE / f"peer_{name}.py"), str(given[name])]
        for name in PINNED
    }
    found = [{"events": events, "what": name, **measured(command)} for name, command in commands.items()]
    return [{**row, "events_per_second": round(events / row["seconds"])} for row in found]


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--environments", type=Path, help="where the peers' environments are, or are made to stay")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report(
        args.events,
        lambda events, folder: bench(events, args.environments or folder / "environments", folder),
        args.json,
    )


if __name__ == "__main__":
    main()
