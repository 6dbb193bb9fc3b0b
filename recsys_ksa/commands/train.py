"""`ksa train`: a config and a prepared data set in, a run directory out."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_ksa.cli import Verb

if TYPE_CHECKING:
    from recsys_ksa.config import RunConfig
    from recsys_ksa.data.dataset import Dataset
    from recsys_ksa.train.loop import Trained


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file of the run; configs/ has some, smoke.toml the smallest")
    parser.add_argument("--data", type=Path, required=True, metavar="DS", help="prepared data set (`ksa prepare`)")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run directory to write")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="change one key of the config; may be repeated"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="stop after N steps in all; 0 writes a random model (default: config)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from RUN's last checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def _run(arguments: argparse.Namespace) -> None:
    from recsys_ksa.config import RunConfig, load_config
    from recsys_ksa.data.dataset import open_dataset
    from recsys_ksa.errors import UsageError

    if arguments.steps is not None and arguments.steps < 0:
        raise UsageError(f"ksa train: --steps: expected 0 or more, got {arguments.steps}.")
    config = load_config(RunConfig, arguments.config, arguments.set)
    dataset = open_dataset(arguments.data)

    import torch
    from tqdm import tqdm

    from recsys_ksa.train.loop import Report, resolve_config, train
    from recsys_ksa.train.ranks import joined_ranks

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("ksa train: --device cuda: expected a CUDA device, found none. Leave it out to use the CPU.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if device.type == "cuda" and config.train.precision == "bf16":
        torch.set_float32_matmul_precision("high")  # what autocast leaves in float32 runs in TF32
    config, said = resolve_config(config, dataset)
    with joined_ranks() as ranks, tqdm(unit="step", desc=config.name, disable=None, leave=False) as bar:
        for line in said if ranks.is_first else ():
            bar.write(line)

        def show(report: Report) -> None:
            bar.total = report.steps
            bar.n = report.step
            best = "" if report.ndcg < 0 else f", best NDCG@10 {report.ndcg:.4f}"
            speed = f"{report.speed.tokens_per_second:,.0f} tokens/s, waiting {report.speed.waiting_share:.0%}"
            bar.set_postfix_str(f"loss {report.loss:.3f}, {speed}{best}")

        trained = train(
            config,
            dataset,
            arguments.out,
            device=device,
            stop_at=arguments.steps,
            resume=arguments.resume,
            report=show,
            ranks=ranks,
        )
    if ranks.is_first:
        _print_end(config, dataset, arguments.out, trained, str(device))


def _print_end(config: "RunConfig", dataset: "Dataset", run: Path, trained: "Trained", device: str) -> None:
    import numpy as np

    from recsys_ksa.model.state import full_kv_bytes, kv_bytes

    progress = trained.progress
    print(f"{run}: {trained.num_parameters:,} parameters, {device}, {config.train.precision}; {trained.reason}")
    if progress.step:
        print(
            f"{progress.step:,} steps, {progress.tokens:,} tokens, {progress.seconds:.1f} s, "
            f"{trained.speed.tokens_per_second:,.0f} tokens/s in training, "
            f"{trained.speed.waiting_share:.1%} of it waiting for batches"
        )
    if progress.best_ndcg >= 0:
        print(f"best validation NDCG@10 {progress.best_ndcg:.4f} at step {progress.best_step:,}, kept")
    if config.model.architecture != "ksa":
        print(f"state: none, {config.model.architecture} reads each history anew")
        return
    lengths = dataset.histories.lengths
    for name, length in (("median", int(np.median(lengths))), ("longest", int(lengths.max()))):
        held, full = kv_bytes(config.model, length) / 1000, full_kv_bytes(config.model, length) / 1000
        print(f"state of the {name} history, {length:,} events: {held:,.1f} KB (full attention: {full:,.1f} KB)")


verb = Verb(
    summary="train a network on a prepared data set",
    example="ksa train configs/smoke.toml --data data/smoke --out runs/smoke",
    configure=_configure,
    run=_run,
)
