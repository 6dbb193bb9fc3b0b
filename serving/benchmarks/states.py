"""States of long histories: `python serving/benchmarks/states.py [append|memory|late ...]`, all without a name.

append     append one event and recommend, against computing the history anew, at 10^3, 10^4, 10^5 events
memory     users per GB by measured bytes, against the formula and against a full K/V cache
late       a late event, 10, 1,000 and 20,000 events back, in a history of 10^5
"""

import argparse
from typing import Any

from reference import T0, build, heading, history, load_model, milliseconds


def append_figures() -> None:
    """Append one event and recommend, against computing the history anew."""
    from ksa_serving.models import Question

    model = load_model()
    print("| events | append + recommend, ms (CPU) | anew + recommend, ms (CPU) | ratio of CPU |\n|---|---|---|---|")
    for length in (1000, 10_000, 100_000):
        events = history(length + 1)
        state = build(model, events[:-1])

        def one(state: Any = state, last: Any = events[-1]) -> None:
            model.recommend([Question(model.append(state, [last]), 10, T0 * 2)])

        def anew(events: list[Any] = events) -> None:
            model.recommend([Question(build(model, events), 10, T0 * 2)])

        fast, slow = milliseconds(one, 40), milliseconds(anew, 5 if length < 100_000 else 1)
        print(f"| {length:,} | {fast} | {slow} | {slow.cpu / fast.cpu:,.0f} |", flush=True)


def memory_figures() -> None:
    """Users per GB by the bytes of real states, against the formula and a full cache."""
    from recsys_ksa.model.state import full_kv_bytes, kv_bytes

    model = load_model()
    config = model.recommender.network.config
    print("| events | state K/V, bytes | formula | own items + fixed | users/GB | full cache users/GB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for length in (1000, 10_000, 100_000):
        state = build(model, history(length))
        parts = [rows for layer in state.memory.layers for rows in (layer.events, layer.summaries)]
        measured = sum(tensor.untyped_storage().nbytes() for rows in parts for tensor in (*rows.segments, rows.tail))
        formula, full = kv_bytes(config, length), full_kv_bytes(config, length)
        rest = state.seen_nbytes + state.fixed_nbytes
        users, full_users = 1e9 / (measured + rest), 1e9 / (full + rest)
        print(
            f"| {length:,} | {measured:,} | {formula:,} ({measured / formula - 1:+.1%}) | {rest:,} | {users:,.0f} | "
            f"{full_users:,.0f} | {users / full_users:.1f} |",
            flush=True,
        )


def late_figures() -> None:
    """A late event against rebuilding, in a history of 10^5."""
    from ksa_serving.events import StoredEvent
    from ksa_serving.models import START, Mark

    model = load_model()
    length = 100_000
    events = history(length)
    state = build(model, events)
    print("| a late event so many events back | replay, ms (CPU) |\n|---|---|")
    for back in (10, 1000, 20_000):
        kept = length - back
        late = StoredEvent(length + 1, "i1", events[kept].timestamp - 1, None, None, None)
        first = max(0, model.replay_start(kept) - 1)
        mark = Mark(first, START.history_hash)  # the hash's place does not change the time

        def replay(kept: int = kept, late: Any = late, first: int = first, mark: Any = mark) -> None:
            rewound = model.rewind(state, kept, first, events[first:kept], mark)
            for start in range(kept, length, 8192):
                part = events[start : start + 8192]
                rewound = model.append(rewound, [late, *part] if start == kept else part)

        print(f"| {back:,} | {milliseconds(replay, 5 if back < 20_000 else 1)} |", flush=True)


FIGURES = {"append": append_figures, "memory": memory_figures, "late": late_figures}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], default=[], help="which figures")
    names = parser.parse_args().names or list(FIGURES)
    print(heading())
    for name in names:
        print(f"\n## {name}", flush=True)
        FIGURES[name]()


if __name__ == "__main__":
    main()
