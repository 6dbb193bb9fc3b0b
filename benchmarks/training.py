"""Training speed and peak memory of whole networks on a GPU: KSA by Triton and by PyTorch, full attention beside them.

    python -m benchmarks.training [--mean-lengths 200,2000,16000] [--json FILE]

Random weights, items and lognormal lengths; a step is what training does: forward in bf16, sampled softmax, backward,
clipping, AdamW. All networks of a length see the same batch of `--tokens` events, a few hundred questions a user.
`full, varlen flash` is the network with full attention whose layers call torch's flash attention for jagged batches.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ksa_kernels import ChunkLayout
from recsys_ksa.config import LossConfig, ModelConfig, TrainConfig
from recsys_ksa.data.batches import Batch
from recsys_ksa.model import network as network_module
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.losses import batch_loss
from recsys_ksa.model.network import Network
from recsys_ksa.train.optim import make_optimizer

NUM_ITEMS = 100_000
QUESTIONS_A_USER = 200
NUM_NEGATIVES = 1_024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean-lengths", default="200,2000,16000")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--networks", default="", help="names, separated by ';'; all of them unless given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = ModelConfig(
        dim=args.dim,
        num_heads=max(1, args.dim // 64),
        num_kv_heads=max(1, args.dim // 64),
        head_dim=64,
        feed_forward_dim=2 * args.dim,
        layers=("summary",) * args.layers,
        chunk_size=8,
        window_chunks=32,
        dropout=0.0,
    )
    wanted = [name for name in args.networks.split(";") if name]
    device = torch.device(args.device)
    print(
        f"{_name(device)}, torch {torch.__version__}: {args.layers} layers of {args.dim}, H = {model.num_heads}, "
        f"d = 64, k = 8, W = 32, {args.tokens} events a batch, {NUM_ITEMS} items"
    )
    rows = []
    for mean in (int(mean) for mean in args.mean_lengths.split(",")):
        lengths = lognormal_lengths(mean, args.tokens)
        batch = random_batch(lengths).to(device)
        for name, (attention, impl, attend) in NETWORKS.items():
            if wanted and name not in wanted:
                continue
            try:
                config = model.model_copy(update={"attention": attention})
                with mock.patch.object(network_module, "attend", attend or network_module.attend):
                    seconds, peak = measure(config, impl, batch, device, args.steps)
            except torch.cuda.OutOfMemoryError:
                print(f"mean {mean:>6} | {name:20} | out of memory", flush=True)
                continue
            row = {"mean_length": mean, "users": len(lengths), "longest": max(lengths), "network": name}
            rows.append(row | {"tokens_per_second": args.tokens / seconds, "peak_bytes": peak})
            print(
                f"mean {mean:>6} ({len(lengths)} users, longest {max(lengths)}) | {name:20} | "
                f"{args.tokens / seconds / 1e3:8.0f} k tokens/s | {seconds * 1e3:8.1f} ms a step | "
                f"peak {peak / 2**30:.1f} GiB",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def measure(config: ModelConfig, impl: str, batch: Batch, device: torch.device, steps: int) -> tuple[float, int]:
    """Return seconds a step, the best of three rounds, and peak memory in bytes (0 on a CPU)."""
    torch.manual_seed(0)
    network = Network(config, FeatureSchema(NUM_ITEMS)).to(device).train()
    optimizer = make_optimizer(network, TrainConfig())
    negatives = torch.randint(1, NUM_ITEMS, (NUM_NEGATIVES,), device=device)
    log_probability = torch.full((NUM_ITEMS,), -float(np.log(NUM_ITEMS)), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            users = network(batch, impl)
        loss = batch_loss(network, users, batch, LossConfig(), negatives, log_probability)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rounds = [_seconds(step, device, steps) for _ in range(3)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return min(rounds) / steps, peak


def varlen_attend(
    event_query: Tensor, event_rows: Tensor, summary_query: Tensor, summary_rows: Tensor, layout: ChunkLayout, impl: str
) -> tuple[Tensor, Tensor]:
    """Attend as `recsys_ksa.model.block.attend` does in a full layer, by torch's flash attention for jagged batches."""
    from torch.nn.attention.varlen import varlen_attn

    offsets = layout.event_query_offsets.to(torch.int32)
    longest = max(span.num_events for span in layout.spans)
    key, value = (rows.contiguous() for rows in event_rows.unbind(1))
    out: Any = varlen_attn(event_query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0))
    return out, summary_query


NETWORKS: dict[str, tuple[str, str, Callable[..., Any] | None]] = {
    "ksa, triton": ("summary", "triton", None),
    "ksa, torch": ("summary", "torch", None),
    "full, varlen flash": ("full", "triton", varlen_attend),
    "full, triton": ("full", "triton", None),
}
"""Each network's `model.attention`, implementation, and what takes the place of `attend`."""


def lognormal_lengths(mean: int, tokens: int, sigma: float = 1.0) -> list[int]:
    """Return lognormal lengths of about this mean that add up to `tokens`; most are short, a few very long."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, 4 * tokens // mean + 8)
    lengths = np.clip(np.rint(drawn), 2, tokens // 2).astype(int)
    users = int(np.searchsorted(lengths.cumsum(), tokens))
    return [*lengths[:users].tolist(), tokens - int(lengths[:users].sum())]


def random_batch(lengths: list[int]) -> Batch:
    """Return random events of histories with these lengths, and questions about each one's last events."""
    random = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    asked = [min(length, QUESTIONS_A_USER) for length in lengths]
    rows = torch.cat([torch.arange(stop - count, stop) for stop, count in zip(offsets[1:].tolist(), asked)])
    num_events, num_questions = int(offsets[-1]), len(rows)

    def draw(high: int, size: int) -> Tensor:
        return torch.randint(1, high, (size,), generator=random)

    times = torch.arange(num_events)
    return Batch(
        offsets=offsets,
        first_position=torch.zeros(len(lengths), dtype=torch.int64),
        item_index=draw(NUM_ITEMS, num_events),
        event_type=None,
        gap_bucket=draw(30, num_events),
        timestamp=times,
        question_row=rows,
        question_user=torch.arange(len(lengths)).repeat_interleave(torch.tensor(asked)),
        request_bucket=draw(30, num_questions),
        request_time=times[rows],
        target_question=torch.arange(num_questions),
        target_item=draw(NUM_ITEMS, num_questions),
        target_weight=torch.ones(num_questions),
        own=None,
    )


def _seconds(step: Callable[[], None], device: torch.device, steps: int) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
