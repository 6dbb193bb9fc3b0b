"""The baselines that are always in the table. Each scores every item, from the past only.

Where a baseline has nothing to say of an item, popularity orders the rest, so that it is as strong as it can be.
Q questions, I items, P (question, item) pairs.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_ksa.errors import MissingPackageError
from recsys_ksa.evaluate.metrics import question_metrics, user_means
from recsys_ksa.evaluate.owned import Owned, Ownership
from recsys_ksa.evaluate.protocol import ProtocolName, Questions, RequestTime, ask, training_mask
from recsys_ksa.evaluate.ranking import rank_targets

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset, Histories

NAMES = (
    "popularity",
    "popularity-7d",
    "personal-frequency",
    "personal-frequency-decayed",
    "repeat-last",
    "item-item",
)
DAY = 86_400
WEEK = 7 * DAY
HALF_LIVES = (1 * DAY, 7 * DAY, 14 * DAY, 30 * DAY, 60 * DAY, 120 * DAY, 365 * DAY)
"""Half-lives tried on validation; seconds."""
ORDINAL_HALF_LIVES = (5, 20, 50, 100, 200, 500, 2000)
"""The same on an ordinal clock; positions."""
VALIDATION_USERS = 500
"""At most this many users choose the half-life."""
NEIGHBOURS = 100
"""Items most like each item that item-item keeps."""


class Popularity:
    """Counts of events: of the training span (`loo`, `loo-classic`), or of all before the target's time (`global`).

    With `window`, only of the last `window` seconds, which end at the last event counted.
    """

    request_time: RequestTime | None = None

    def __init__(self, name: str, histories: "Histories", num_items: int, protocol: ProtocolName, window: int | None):
        self.name, self.num_items, self.window = name, num_items, window
        self._latest: tuple[Questions, Tensor] | None = None
        item, time = np.asarray(histories.item_index), np.asarray(histories.timestamp)
        self.fixed: NDArray[np.float32] | None = None
        if protocol == "global":
            order = np.argsort(time, kind="stable")
            self.item, self.time = item[order].astype(np.int64), time[order]
            return
        trained = training_mask(histories, protocol)
        item, time = item[trained], time[trained]
        if window is not None and len(time):
            item = item[time > time.max() - window]
        self.fixed = np.bincount(item, minlength=num_items + 1).astype(np.float32)

    def scores(self, questions: Questions) -> Tensor:
        """Return the counts, float32 [Q, I + 1]. The last answer is kept: the personal baselines ask for it too."""
        if self.fixed is not None:
            return torch.from_numpy(self.fixed).repeat(len(questions), 1)
        if self._latest is None or self._latest[0] is not questions:
            self._latest = (questions, torch.from_numpy(self._rolling(questions)))
        return self._latest[1].clone()

    def _rolling(self, questions: Questions) -> NDArray[np.float32]:
        """Return the counts of all events before each question's time."""
        times, inverse = np.unique(questions.timestamp, return_inverse=True)
        end = np.searchsorted(self.time, times, side="left")
        counts = self._counts_up_to(end)
        if self.window is not None:
            last = np.where(end > 0, self.time[np.maximum(end - 1, 0)], 0)
            counts -= self._counts_up_to(np.searchsorted(self.time, last - self.window, side="right"))
        return counts[inverse]

    def _counts_up_to(self, end: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the counts of the events 0 .. end-1 in time, for ascending ends; float32 [E, I + 1]."""
        counts = np.zeros((len(end), self.num_items + 1), dtype=np.float32)
        running = np.zeros(self.num_items + 1, dtype=np.int64)
        start = 0
        for row, stop in enumerate(end):
            running += np.bincount(self.item[start:stop], minlength=self.num_items + 1)
            counts[row] = running
            start = stop
        return counts


class PersonalFrequency:
    """The user's own most frequent items, then the most popular others; popularity also breaks ties."""

    request_time: RequestTime | None = None
    name = "personal-frequency"

    def __init__(self, ownership: Ownership, popularity: Popularity):
        self.ownership, self.popularity = ownership, popularity

    def scores(self, questions: Questions) -> Tensor:
        """Return scores that order own items first, float32 [Q, I + 1]."""
        owned = self.ownership.before(questions)
        return own_items_first(owned, self.value(owned, questions), self.popularity.scores(questions))

    def value(self, owned: Owned, questions: Questions) -> NDArray[np.float64]:
        """Return what orders a user's own items, float64 [P]."""
        return owned.count.astype(np.float64)


class DecayedFrequency(PersonalFrequency):
    """Personal frequency in which an event counts half after each half-life before the user's last known event."""

    name = "personal-frequency-decayed"

    def __init__(self, ownership: Ownership, popularity: Popularity, half_life: float):
        super().__init__(ownership, popularity)
        self.half_life = half_life
        self.log_count = ownership.decayed_log_count(half_life)

    def value(self, owned: Owned, questions: Questions) -> NDArray[np.float64]:
        """Return log2 of the decayed count; a logarithm cannot underflow.

        Rounded: equal counts that were summed in another order are equal, so that popularity orders them.
        """
        age = questions.last_timestamp[owned.question] - owned.last
        return np.round(self.log_count[owned.event] - age / self.half_life, 10)


class RepeatLast(PersonalFrequency):
    """The user's own items, the one met last first.

    By position in `loo-classic`, where ties have an order; by time, then popularity, elsewhere.
    """

    name = "repeat-last"

    def value(self, owned: Owned, questions: Questions) -> NDArray[np.float64]:
        """Return the time, or the position, of the last meeting."""
        return (owned.event if questions.protocol == "loo-classic" else owned.last).astype(np.float64)


class ItemItem:
    """Cosine similarity of items by who had them (package `implicit`), summed over the user's distinct items.

    Neighbours come from the training span only; the user's items are all that is known at the question. Popularity
    orders the items without a score.
    """

    request_time: RequestTime | None = None
    name = "item-item"

    def __init__(self, ownership: Ownership, popularity: Popularity, histories: "Histories", protocol: ProtocolName):
        self.ownership, self.popularity = ownership, popularity
        self.similarity: Any = _cosine_neighbours(histories, protocol, popularity.num_items)

    def scores(self, questions: Questions) -> Tensor:
        """Return summed similarities, plus less than any of them for popularity; float32 [Q, I + 1]."""
        from scipy.sparse import csr_array

        owned = self.ownership.before(questions)
        shape = (len(questions), self.similarity.shape[0])
        had: Any = csr_array((np.ones(len(owned.item), np.float32), (owned.question, owned.item)), shape=shape)
        scores = torch.from_numpy((had @ self.similarity).toarray().astype(np.float32, copy=False))
        popularity = self.popularity.scores(questions)
        rest = popularity / (popularity.max(dim=1, keepdim=True).values + 1.0) - 1.0
        return torch.where(scores > 0.0, scores, rest)


def own_items_first(owned: Owned, value: NDArray[np.float64], background: Tensor) -> Tensor:
    """Order own items by (value, background) above all others, exactly in float32.

    Own items get whole numbers above the background's largest, equal where value and background are equal.

    Args:
        owned: (question, item) pairs, P of them.
        value: float64 [P].
        background: float32 [Q, I + 1], whole numbers; changed in place and returned.
    """
    if not len(value):
        return background
    behind = background.numpy()[owned.question, owned.item].astype(np.int64)
    # (question, value, background) as one integer: one fast sort instead of three.
    values, level = np.unique(value, return_inverse=True)
    span = int(behind.max()) + 1
    key = (owned.question * len(values) + level) * span + behind
    order = np.argsort(key)
    key, question = key[order], owned.question[order]
    rises = np.cumsum(np.diff(key, prepend=key[0] - 1) > 0)
    starts = np.flatnonzero(np.diff(question, prepend=-1))
    before = np.repeat(rises[starts] - 1, np.diff(starts, append=len(order)))
    highest = background.numpy().max(axis=1)
    background.numpy()[question, owned.item[order]] = highest[question] + rises - before
    return background


def choose_half_life(
    dataset: "Dataset", protocol: ProtocolName, ownership: Ownership, popularity: Popularity, *, exclude_seen: bool
) -> float:
    """Return the half-life with the best NDCG@10 on the protocol's validation part.

    At most `VALIDATION_USERS` users, evenly spread over the rows, are asked.
    """
    grid = ORDINAL_HALF_LIVES if dataset.manifest.clock == "ordinal" else HALF_LIVES
    questions = ask(dataset.histories, protocol, "valid")
    asked = np.unique(questions.user)
    keep = np.zeros(dataset.histories.num_users, dtype=bool)
    keep[asked[:: max(1, -(-len(asked) // VALIDATION_USERS))]] = True
    questions = questions.of_users(keep)
    _, user = np.unique(questions.user, return_inverse=True)

    scorers = [DecayedFrequency(ownership, popularity, half_life) for half_life in grid]
    ranked, _ = rank_targets(scorers, questions, ownership, popularity.num_items, exclude_seen=exclude_seen)
    scores = [
        np.nanmean(
            user_means(
                question_metrics(ranks.all_items, questions.target_question, len(questions))["ndcg@10"],
                user,
                int(user.max()) + 1,
            )
        )
        for ranks in ranked
    ]
    return float(grid[int(np.argmax(scores))])


def baselines(
    dataset: "Dataset",
    protocol: ProtocolName,
    ownership: Ownership,
    *,
    exclude_seen: bool,
    names: Sequence[str] = NAMES,
) -> tuple[list[Popularity | PersonalFrequency | ItemItem], dict[str, str]]:
    """Build the baselines of the table, and say what was chosen or left out, by name.

    Raises:
        MissingPackageError: item-item was asked for without `implicit`.
    """
    histories, num_items = dataset.histories, dataset.num_items - 1
    popularity = Popularity("popularity", histories, num_items, protocol, None)
    scorers: list[Popularity | PersonalFrequency | ItemItem] = []
    notes = {}
    for name in names:
        if name == "popularity":
            scorers.append(popularity)
        elif name == "popularity-7d" and dataset.manifest.clock == "ordinal":
            notes[name] = "left out: an ordinal clock has no days"
        elif name == "popularity-7d":
            scorers.append(Popularity(name, histories, num_items, protocol, WEEK))
        elif name == "personal-frequency":
            scorers.append(PersonalFrequency(ownership, popularity))
        elif name == "personal-frequency-decayed":
            half_life = choose_half_life(dataset, protocol, ownership, popularity, exclude_seen=exclude_seen)
            scorers.append(DecayedFrequency(ownership, popularity, half_life))
            ordinal = dataset.manifest.clock == "ordinal"
            unit = f"{half_life:g} events" if ordinal else f"{half_life / DAY:g} days"
            notes[name] = f"half-life {unit}, chosen on validation"
        elif name == "repeat-last":
            scorers.append(RepeatLast(ownership, popularity))
        elif name == "item-item":
            scorers.append(ItemItem(ownership, popularity, histories, protocol))
            notes[name] = f"cosine of who had what, {NEIGHBOURS} neighbours, from the training span"
    return scorers, notes


def _cosine_neighbours(histories: "Histories", protocol: ProtocolName, num_items: int) -> Any:
    """Return the similarity of each item to its nearest, scipy CSR float32 [I + 1, I + 1]."""
    try:
        from implicit.nearest_neighbours import CosineRecommender
        from scipy.sparse import csr_array, csr_matrix
    except ImportError as error:
        raise MissingPackageError(
            f"item-item: expected the package implicit, got: {error}. "
            'Install it with `pip install "recsys-ksa[evaluate]"`, or leave item-item out with --baselines.'
        ) from error
    trained = training_mask(histories, protocol)
    user = np.repeat(np.arange(histories.num_users), histories.lengths)[trained]
    item = np.asarray(histories.item_index)[trained]
    had = csr_matrix((np.ones(len(item), np.float32), (user, item)), shape=(histories.num_users, num_items + 1))
    had.sum_duplicates()
    had.data[:] = 1.0
    model = CosineRecommender(K=NEIGHBOURS)
    with warnings.catch_warnings():
        # implicit turns its own intermediate into CSR and warns of that.
        warnings.simplefilter("ignore")
        model.fit(had, show_progress=False)
    return csr_array(model.similarity).astype(np.float32)
