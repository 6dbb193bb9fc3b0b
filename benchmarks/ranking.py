"""Users ranked a second and peak memory over a large catalogue: tile by tile, as `ksa evaluate` ranks, and naively.

    python benchmarks/ranking.py [--items 1000000] [--users 512] [--dim 64] [--device cpu] [--out FILE.json]

Each way runs in a process of its own, on the same random vectors, and must find the same items and ranks:

- `naive`: the whole [users, items] table of scores, then top-k and ranks of it; refused above `--naive-users`.
- `tiles`: `evaluate.tiles.stream_top_k`, the best 10 alone.
- `evaluate`: `evaluate.ranking.rank_targets`, ranks of the targets and the best 10, in chunks of questions.

Peak memory is the process' high-water mark less that before ranking (CUDA: of the allocator). Seconds are the best of
`--repeats` runs.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from recsys_ksa.data.dataset import Histories
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import Questions, ask
from recsys_ksa.evaluate.ranking import rank_targets
from recsys_ksa.evaluate.tiles import stream_top_k

WAYS = ("naive", "tiles", "evaluate")
K = 10


class VectorScorer:
    """A scorer whose scores are products of vectors."""

    name, request_time = "vectors", None

    def __init__(self, users: torch.Tensor, items: torch.Tensor) -> None:
        self.users, self.items = users, items

    def scores(self, questions: Questions) -> torch.Tensor:
        """Return float32 [Q, I + 1]."""
        return self.users[torch.from_numpy(questions.number)] @ self.items.T


def vectors(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, Histories]:
    """Return user vectors, item vectors (row 0 is padding) and a history of three events for each user."""
    draw = torch.Generator().manual_seed(0)
    users = torch.randn(args.users, args.dim, generator=draw)
    items = torch.randn(args.items + 1, args.dim, generator=draw)
    item = np.random.default_rng(0).integers(1, args.items + 1, 3 * args.users).astype(np.int32)
    cut = {name: np.full(args.users, at, np.int32) for name, at in (("loo_valid", 1), ("loo_test", 2))}
    histories = Histories(
        user_id=pa.array([str(user) for user in range(args.users)]),
        user_index=np.arange(args.users),
        offsets=np.arange(0, 3 * args.users + 1, 3),
        item_index=item,
        timestamp=np.tile(np.arange(3), args.users),
        event_type=None,
        split=cut,
    )
    return users.to(args.device), items.to(args.device), histories


def naive(users: torch.Tensor, items: torch.Tensor, questions: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best items and the targets' ranks from the whole table."""
    scores = users @ items.T
    scores[:, 0] = -torch.inf
    target = torch.from_numpy(questions.target_item).to(users.device)
    mine = scores.gather(1, target[:, None])
    return scores.topk(K, dim=1).indices, (scores >= mine).sum(dim=1)


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run one way in this process."""
    users, items, histories = vectors(args)
    questions, ownership = ask(histories, "loo"), Ownership(histories)
    best, ranks, seconds = None, None, []
    before = _peak(args.device)
    for _ in range(args.repeats):
        started = time.perf_counter()
        if args.way == "naive":
            best, ranks = naive(users, items, questions)
        elif args.way == "tiles":
            best = stream_top_k(users, items[1:], K)[1] + 1
        else:
            (found,), _ = rank_targets(
                [VectorScorer(users, items)], questions, ownership, args.items, exclude_seen=False, device=args.device
            )
            best, ranks = torch.from_numpy(found.top), torch.from_numpy(found.all_items)
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    assert best is not None
    return {
        "way": args.way,
        "users_per_second": round(args.users / min(seconds), 1),
        "peak_mib": round((_peak(args.device) - before) / 2**20, 1),
        "items": best.cpu().tolist(),
        "ranks": None if ranks is None else ranks.cpu().tolist(),
    }


def _peak(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Run all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--naive-users", type=int, default=2048, help="above this the naive way is left out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        print(json.dumps(measure(args)))
        return
    found = []
    for way in WAYS:
        if way == "naive" and args.users > args.naive_users:
            print(f"naive: left out, its table would have {args.users * args.items * 4 / 1e9:.0f} GB")
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first = found[0]
    for other in found[1:]:
        # Products of other shapes round differently: a handful of neighbours may trade places.
        same = np.mean([set(one) == set(two) for one, two in zip(first["items"], other["items"])])
        assert same > 0.99, (other["way"], same)
        if first["ranks"] and other["ranks"]:
            assert np.max(np.abs(np.subtract(first["ranks"], other["ranks"]))) <= 5
    machine = platform.processor() or platform.machine()
    name = machine if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.users:,} users, {args.items:,} items, dim {args.dim}, {name}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    for row in found:
        print(f"{row['way']:<10} {row['users_per_second']:>10,.1f} users/s   peak {row['peak_mib']:>9,.1f} MiB")
    if args.out is not None:
        kept = [{key: value for key, value in row.items() if key not in ("items", "ranks")} for row in found]
        args.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
