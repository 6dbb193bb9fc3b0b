"""Appending one event to a long history against recomputing it: the reason to keep a user state.

    make bench      (or: python -m benchmarks.append --events 4000)

Prints medians; chunk-closing events apart, for they also compute a summary. Both sides run in this process, in turn.
Then a batch: one event, and one question, of each of `--users` users at once.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.model.append import Arrivals, append_events, ask, empty_memory
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.network import Network
from recsys_ksa.model.state import Memory, full_kv_bytes, kv_bytes

NUM_ITEMS = 10_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=4_000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=16)
    parser.add_argument("--window-chunks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9, help="recomputations, each before two chunks of appends")
    parser.add_argument("--users", type=int, default=64, help="users of the batch that gets one event each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ModelConfig(
        dim=args.dim,
        num_heads=args.dim // 32,
        num_kv_heads=args.dim // 32,
        head_dim=32,
        feed_forward_dim=2 * args.dim,
        layers=("summary",) * args.layers,
        chunk_size=args.chunk_size,
        window_chunks=args.window_chunks,
    )
    figures = measure(config, args.events, args.repeats) | measure_batch(config, args.events, args.users, args.repeats)
    figures |= {"threads": args.threads, "torch": torch.__version__, "machine": platform.machine()}
    if args.json:
        print(json.dumps(figures))
        return
    print(
        f"L={args.layers} d={args.dim} k={args.chunk_size} W={args.window_chunks}, {args.events} events, "
        f"{args.threads} threads, torch {torch.__version__}"
    )
    for name, value in figures.items():
        print(f"  {name:<28} {value}")


def measure(config: ModelConfig, events: int, repeats: int) -> dict[str, object]:
    """Return medians in ms and ratios."""
    torch.manual_seed(0)
    network = Network(config, FeatureSchema(NUM_ITEMS)).eval()
    extra = 2 * config.chunk_size
    items = torch.randint(1, NUM_ITEMS, (events + extra,))
    gaps = torch.randint(0, 30, (events + extra,))

    def arrive(first: int, last: int) -> Arrivals:
        return Arrivals([last - first], items[first:last], None, gaps[first:last])

    def recompute() -> Memory:
        return append_events(network, [empty_memory(network)], arrive(0, events))[0]

    memory = recompute()
    ask(network, append_events(network, [memory], arrive(events, events + 1)), [3])
    whole, open_chunk, closing, asking = [], [], [], []
    for _ in range(repeats):
        whole.append(_time(recompute))
        state = memory
        for at in range(events, events + extra):
            began = time.perf_counter()
            state = append_events(network, [state], arrive(at, at + 1))[0]
            (closing if (at + 1) % config.chunk_size == 0 else open_chunk).append(time.perf_counter() - began)
            asking.append(_time(lambda state=state: ask(network, [state], [3])))
    recomputed, appended, closed = (1000 * statistics.median(times) for times in (whole, open_chunk, closing))
    return {
        "recompute_ms": round(recomputed, 2),
        "append_ms": round(appended, 3),
        "append_closing_ms": round(closed, 3),
        "ask_ms": round(1000 * statistics.median(asking), 3),
        "recompute_over_append": round(recomputed / appended, 1),
        "recompute_over_closing": round(recomputed / closed, 1),
        "state_kb": round(kv_bytes(config, events) / 1000, 1),
        "full_attention_kb": round(full_kv_bytes(config, events) / 1000, 1),
    }


def measure_batch(config: ModelConfig, events: int, users: int, repeats: int) -> dict[str, object]:
    """Return medians in ms of a batch: one event each of `users` users, and one question each."""
    torch.manual_seed(0)
    network = Network(config, FeatureSchema(NUM_ITEMS)).eval()
    items, gaps = torch.randint(1, NUM_ITEMS, (events,)), torch.randint(0, 30, (events,))
    memory = append_events(network, [empty_memory(network)], Arrivals([events], items, None, gaps))[0]
    memories = [memory] * users
    arrivals = Arrivals([1] * users, items[:users], None, gaps[:users])
    appending = [_time(lambda: append_events(network, memories, arrivals)) for _ in range(repeats)]
    asking = [_time(lambda: ask(network, memories, [3] * users)) for _ in range(repeats)]
    return {
        "users": users,
        "append_users_ms": round(1000 * statistics.median(appending), 2),
        "ask_users_ms": round(1000 * statistics.median(asking), 2),
    }


def _time(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
