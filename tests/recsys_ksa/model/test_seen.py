import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys_ksa.model.seen import SeenItems

EVENTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 50)), max_size=60)


@given(EVENTS, st.integers(1, 9))
def test_adding_in_parts_equals_a_dictionary(events: list[tuple[int, int]], step: int) -> None:
    events = sorted(events, key=lambda event: event[1])
    seen = SeenItems.empty()
    for at in range(0, len(events), step):
        part = np.array(events[at : at + step], dtype=np.int64)
        seen = seen.add(part[:, 0], part[:, 1])
    model: dict[int, tuple[int, int, int]] = {}
    for item, time in events:
        if item:
            count, first, _ = model.get(item, (0, time, time))
            model[item] = (count + 1, first, time)
    got = {
        int(item): (int(count), int(first), int(last))
        for item, count, first, last in zip(seen.item_index, seen.count, seen.first, seen.last)
    }
    assert got == model
    assert list(seen.item_index) == sorted(model)
    assert seen.nbytes == sum(a.nbytes for a in (seen.item_index, seen.count, seen.first, seen.last)) == 24 * len(model)


@given(EVENTS, st.lists(st.integers(0, 14), max_size=20))
def test_what_is_known_of_some_items_is_what_is_known_of_each(events: list[tuple[int, int]], asked: list[int]) -> None:
    given_events = np.array(events, dtype=np.int64).reshape(-1, 2)
    seen = SeenItems.from_events(given_events[:, 0], given_events[:, 1])
    owned, met = seen.of_items(np.array(asked, dtype=np.int64))
    assert owned.tolist() == [item in seen.item_index for item in asked]
    each = [seen.of(item) for item in asked if len(seen.of(item))]
    for name in ("item_index", "count", "first", "last"):
        assert getattr(met, name).tolist() == [getattr(one, name)[0] for one in each]
