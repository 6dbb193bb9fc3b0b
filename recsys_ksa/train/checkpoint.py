"""Checkpoints: everything training needs to go on as if it had never stopped. safetensors and JSON, no pickle.

checkpoint/weights.safetensors    parameters at `step`
checkpoint/optimizer.safetensors  AdamW's moments and step counts, by parameter name
checkpoint/best.safetensors       parameters of the best validation so far
checkpoint/progress.json          `Progress`
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys_ksa.errors import RunError

FOLDER = "checkpoint"
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """How far training has come."""

    step: int = 0
    """Steps done."""
    epoch: int = 0
    position: int = 0
    """The next batch of the epoch."""
    seconds: float = 0.0
    """Wall-clock time used, validation included."""
    tokens: int = 0
    """Event tokens trained on."""
    best_ndcg: float = -1.0
    """-1: not validated yet."""
    best_step: int = 0
    worse: int = 0
    """Validations since the best."""
    world_size: int = 1
    """Processes that train together; with another number, epoch and position mean other batches."""


def save_checkpoint(
    run: Path, network: nn.Module, optimizer: torch.optim.Optimizer, best: Weights | None, progress: Progress
) -> None:
    """Write the checkpoint of a run, in place of the one before; a crash leaves one of the two whole."""
    folder, fresh, old = (run / f"{FOLDER}{ending}" for ending in ("", ".new", ".old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    save_file(copy_weights(network), fresh / "weights.safetensors")
    save_file(_moments(network, optimizer), fresh / "optimizer.safetensors")
    if best is not None:
        save_file(best, fresh / "best.safetensors")
    (fresh / "progress.json").write_text(json.dumps(dataclasses.asdict(progress)), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    run: Path, network: nn.Module, optimizer: torch.optim.Optimizer, world_size: int = 1
) -> tuple[Progress, Weights | None]:
    """Load the last checkpoint into `network` and `optimizer`; return progress and the best weights, if any.

    Raises:
        RunError: there is none, it is damaged or of another network, or of another number of processes.
    """
    folder = next((f for f in (run / FOLDER, run / f"{FOLDER}.old") if f.is_dir()), None)
    if folder is None:
        raise RunError(f"{run}: expected {FOLDER}/ to resume from, found none. Train anew into another directory.")
    try:
        progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        if progress.world_size != world_size:
            raise RunError(
                f"{run}: expected to go on with as many processes as it was begun with, {progress.world_size}, got "
                f"{world_size}. Start as many, or train anew."
            )
        network.load_state_dict(load_file(folder / "weights.safetensors"))
        _restore_moments(network, optimizer, load_file(folder / "optimizer.safetensors"))
        best = folder / "best.safetensors"
        return progress, load_file(best) if best.exists() else None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{folder}: expected a checkpoint of this config, got: {reason}. Train anew.") from error


def copy_weights(network: nn.Module) -> Weights:
    """Return a copy of the network's state on the CPU."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in network.state_dict().items()}


def _moments(network: nn.Module, optimizer: torch.optim.Optimizer) -> Weights:
    moments = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}/{key}"] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    return moments


def _restore_moments(network: nn.Module, optimizer: torch.optim.Optimizer, moments: Weights) -> None:
    for name, parameter in network.named_parameters():
        state = {
            key: moments.pop(f"{name}/{key}") for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in moments
        }
        if state:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    if moments:
        raise KeyError(f"moments of {len(moments)} tensors this network does not have, such as {next(iter(moments))}")
