"""Who is trained on when: an epoch's users in random order, cut into batches of a token budget, for one rank or many.

A plan is a function of its arguments alone; it looks at lengths, never at an event.
"""

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from recsys_ksa.data.jagged_arrays import Ints, offsets_of
from recsys_ksa.errors import DataError

WINDOW_STEPS = 16
"""Steps whose users are dealt to the ranks together: the more, the more short histories there are to even out."""
POOL_BLOCKS = 16
"""Blocks of neighbouring users that are shuffled together."""


def shuffled(users: Ints, lengths: Ints, random: np.random.Generator, pool_events: int | None) -> Ints:
    """Return the users in random order.

    Args:
        users: rows of the histories, ascending, int64 [U].
        lengths: events that are read of each, int64 [U].
        random: what the order is drawn by.
        pool_events: shuffle pools of about so many events, each of `POOL_BLOCKS` random blocks of neighbours, so that
            no more of the mapped file is in use at a time; None: all users at once.
    """
    total = int(lengths.sum())
    if pool_events is None or total <= pool_events:
        return random.permutation(users)
    blocks = np.array_split(np.arange(len(users)), min(len(users), -(-POOL_BLOCKS * total // pool_events)))
    drawn = random.permutation(len(blocks))
    pools = [
        random.permutation(np.concatenate([blocks[block] for block in drawn[first : first + POOL_BLOCKS]]))
        for first in range(0, len(blocks), POOL_BLOCKS)
    ]
    return users[np.concatenate(pools)]


def pack(users: Ints, lengths: Ints, budget: int) -> list[Ints]:
    """Cut `users` into runs of at most `budget` tokens; a longer user makes a run alone."""
    reach = np.cumsum(lengths)
    runs, first = [], 0
    while first < len(users):
        taken = reach[first] - lengths[first]
        last = max(first + 1, int(np.searchsorted(reach, taken + budget, side="right")))
        runs.append(users[first:last])
        first = last
    return runs


def pack_for_ranks(
    users: Ints, lengths: Ints, budget: int, world_size: int, random: np.random.Generator
) -> list[list[Ints]]:
    """Cut `users` into steps of one batch a rank, the ranks' tokens nearly equal in every step; each user once.

    Users of `WINDOW_STEPS` steps are dealt together, the longest first, each to the batch that has least so far; at the
    end those of up to 5/4 as many: a rest of few users has no short histories to even it out.
    A batch over `budget` has a single user.

    Raises:
        DataError: there are fewer users than ranks.
    """
    if len(users) < world_size:
        raise DataError(f"training: expected a user a rank, {world_size}, got {len(users)}. Use fewer processes.")
    window = budget * world_size * WINDOW_STEPS
    cuts = [0]
    for last in np.cumsum([len(run) for run in pack(users, lengths, window)]).tolist():
        rest = lengths[last:]
        goes_on = len(rest) >= world_size and int(rest.sum()) >= window // 4
        if last - cuts[-1] >= world_size and (goes_on or last == len(users)):
            cuts.append(last)  # else there are too few for steps of their own
    cuts[-1] = len(users)
    steps: list[list[Ints]] = []
    for first, last in pairwise(cuts):
        batches = _deal(users[first:last], lengths[first:last], budget, world_size)
        own = [batches[at : at + world_size] for at in range(0, len(batches), world_size)]
        for at in random.permutation(len(own)):
            steps.append([own[at][rank] for rank in random.permutation(world_size)])
    return steps


def _deal(users: Ints, lengths: Ints, budget: int, world_size: int) -> list[Ints]:
    """Return batches in order of their tokens, a multiple of `world_size` of them."""
    order = np.argsort(-lengths, kind="stable")
    num_batches = -(-int(lengths.sum()) // budget)
    while True:
        num_batches = min(-(-num_batches // world_size) * world_size, len(users) // world_size * world_size)
        owner, held = _least_loaded(lengths[order].tolist(), num_batches)
        sizes = np.bincount(owner, minlength=num_batches)
        if not np.any((held > budget) & (sizes > 1)) or num_batches + world_size > len(users):
            break
        num_batches += 1
    grouped = np.split(users[order[np.argsort(owner, kind="stable")]], offsets_of(sizes)[1:-1])
    return [grouped[batch] for batch in np.argsort(held, kind="stable")]


def _least_loaded(lengths: Sequence[int], num_batches: int) -> tuple[Ints, Ints]:
    """Return which batch each user goes to when dealt in this order, and each batch's tokens."""
    heap = [(0, batch) for batch in range(num_batches)]
    owner = np.empty(len(lengths), dtype=np.int64)
    for place, length in enumerate(lengths):
        held, batch = heap[0]
        owner[place] = batch
        heapq.heapreplace(heap, (held + length, batch))
    held = np.zeros(num_batches, dtype=np.int64)
    for tokens, batch in heap:
        held[batch] = tokens
    return owner, held


def drawn_lengths(lengths: Ints, longest: int, alpha: float, random: np.random.Generator) -> Ints:
    """Return how many of each history's newest events are read when lengths are drawn (stochastic length).

    A history of n > longest^(alpha / 2) events is read whole with probability longest^alpha / n^2, else its newest
    longest^(alpha / 2): the expected n^2, what full attention costs, falls below 2 * longest^alpha a history.

    Source: HSTU, arXiv:2402.17152, section 3.2.

    Args:
        lengths: at most `longest`, int64 [U].
        longest: `data.max_length`.
        alpha: above 0, at most 2, which reads all.
        random: one number is drawn a user.
    """
    short = longest ** (alpha / 2)
    drawn = random.random(len(lengths))
    whole = (lengths <= short) | (drawn * lengths.astype(np.float64) ** 2 < short**2)
    return np.where(whole, lengths, int(short))
