import threading
from dataclasses import replace

import pytest

from ksa_serving.events import Owner
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.models import Vocabulary
from ksa_serving.state_store import StateRecord, StateStore, Tier
from ksa_serving.testing import ToyState
from ksa_serving.tiered_store import TieredStateStore


def record(
    user: str = "ann", seq: int = 1, nbytes: int = 10, fingerprint: str = "f", generation: int = 0
) -> StateRecord:
    return StateRecord(
        Owner(user), generation, fingerprint, seq, seq, b"", None, (), ToyState(), nbytes, Vocabulary(200)
    )


class StateStoreContract:
    """Every store passes these; a subclass says how to make one that holds at most `max_bytes`."""

    def make(self, max_bytes: int) -> StateStore:
        raise NotImplementedError

    def test_gives_back_what_was_put(self):
        store = self.make(1000)
        store.put(record())
        assert store.get(Owner("ann"), "f") == record()
        assert (len(store), store.nbytes) == (1, 10)

    def test_an_absent_owner_is_a_counted_miss(self):
        store = self.make(1000)
        assert store.get(Owner("ann"), "f") is None
        assert store.misses["absent"] == 1

    def test_another_fingerprint_is_a_counted_miss(self):
        store = self.make(1000)
        store.put(record(fingerprint="old"))
        assert store.get(Owner("ann"), "new") is None
        assert store.misses["fingerprint"] == 1

    def test_owners_of_other_tenants_are_apart(self):
        store = self.make(1000)
        store.put(record())
        assert store.get(Owner("ann", "shop"), "f") is None

    def test_a_record_that_knows_less_does_not_replace_one_that_knows_more(self):
        store = self.make(1000)
        store.put(record(seq=5))
        store.put(record(seq=4))
        held = store.get(Owner("ann"), "f")
        assert held is not None
        assert held.seq == 5

    def test_an_older_generation_never_replaces_a_newer_one(self):
        store = self.make(1000)
        store.put(record(seq=1, generation=2))
        store.put(record(seq=9, generation=1))
        held = store.get(Owner("ann"), "f")
        assert held is not None
        assert held.generation == 2

    def test_two_fingerprints_live_side_by_side_until_one_retires(self):
        store = self.make(1000)
        store.put(record(seq=9, fingerprint="old"))
        store.put(record(seq=4, fingerprint="new"))
        assert store.get(Owner("ann"), "new") is not None
        assert store.get(Owner("ann"), "old") is not None
        store.retire("old")
        assert store.get(Owner("ann"), "old") is None
        assert store.get(Owner("ann"), "new") is not None

    def test_a_dropped_record_is_gone_until_the_next_put(self):
        store = self.make(1000)
        store.put(record(seq=5))
        store.drop(Owner("ann"))
        store.drop(Owner("nobody"))
        assert store.get(Owner("ann"), "f") is None
        store.put(record(seq=4))
        assert store.get(Owner("ann"), "f") is not None

    def test_never_holds_more_than_its_size(self):
        store = self.make(100)
        for n in range(50):
            store.put(record(f"u{n}", nbytes=7 + n % 5))
            assert store.nbytes <= 100
        assert 0 < len(store) < 50


class TestMemoryStateStore(StateStoreContract):
    def make(self, max_bytes: int) -> MemoryStateStore:
        return MemoryStateStore(max_bytes)

    def test_the_least_recently_used_go_first(self):
        store = self.make(30)
        for user in ("ann", "bob", "cat"):
            store.put(record(user))
        store.get(Owner("ann"), "f")
        store.put(record("dan"))
        held = [user for user in ("ann", "bob", "cat", "dan") if store.get(Owner(user), "f")]
        assert held == ["ann", "cat", "dan"]
        assert store.evictions == 1

    def test_one_larger_than_the_store_drives_nobody_out(self):
        store = self.make(30)
        store.put(record("ann"))
        store.put(record("big", nbytes=31))
        assert store.get(Owner("ann"), "f") is not None
        assert store.get(Owner("big"), "f") is None

    def test_a_record_beyond_the_largest_share_is_the_first_to_go(self):
        store = MemoryStateStore(100, largest_share=0.25)

        def held() -> set[str]:
            return {held.owner.user_id for held in store.records()}

        store.put(record("big", nbytes=60))  # there is room
        store.put(record("ann", nbytes=25))
        assert held() == {"big", "ann"}
        store.get(Owner("big"), "f")
        store.put(record("bob", nbytes=25))  # of the share, not beyond it
        assert held() == {"ann", "bob"}
        assert store.exchange(record("big", nbytes=60)) == [record("big", nbytes=60)]
        assert held() == {"ann", "bob"}
        store.put(record("big", nbytes=26))
        store.put(record("too", nbytes=24))
        assert held() == {"ann", "bob", "big", "too"}
        store.get(Owner("big"), "f")
        store.put(record("huge", nbytes=26))  # of two the one used longer ago
        assert held() == {"ann", "bob", "huge", "too"}
        for name in ("cat", "dan"):
            store.put(record(name, nbytes=25))
        assert held() == {"bob", "too", "cat", "dan"}

    def test_a_record_that_outgrows_the_store_leaves_no_older_one(self):
        store = self.make(30)
        store.put(record(seq=1))
        store.put(record(seq=2, nbytes=31))
        assert store.get(Owner("ann"), "f") is None
        assert store.nbytes == 0

    def test_a_record_under_another_owner_is_never_returned(self):
        store = self.make(30)
        store.put(record("ann"))
        store._records[Owner("bob"), "f"] = store._records[Owner("ann"), "f"]
        assert store.get(Owner("bob"), "f") is None
        assert store.misses["owner"] == 1

    def test_records_are_values(self):
        with pytest.raises(AttributeError):
            record().seq = 3  # type: ignore[misc]
        assert replace(record(), seq=3).seq == 3


def test_a_store_that_was_emptied_remembers_nobody():
    store = MemoryStateStore(100)
    for turn in range(3):
        for user in ("ann", "bob"):
            store.put(record(user, seq=turn))
    store.drop(Owner("ann"))
    store.retire("f")
    assert (len(store), store.nbytes, dict(store._fingerprints)) == (0, 0, {})


class CountingCold(MemoryStateStore):
    """A cold store that notes which records it was given."""

    def __init__(self):
        super().__init__(10**6)
        self.given: list[tuple[str, str, int]] = []

    def put(self, record: StateRecord) -> bool:
        self.given.append((record.owner.user_id, record.fingerprint, record.num_events))
        return super().put(record)


def test_what_is_cold_already_is_written_again_only_when_it_has_grown_or_is_read_anew():
    cold = CountingCold()
    store = TieredStateStore(10**6, cold, lambda num_events: num_events >= 10, spill_events=5)
    for seq in (4, 9, 10, 14, 15, 19):  # the first are not worth it
        store.put(record(seq=seq))
    assert cold.given == [("ann", "f", 10), ("ann", "f", 15)]
    store.put(replace(record(seq=19), vocabulary=Vocabulary(201)))
    assert cold.given[2:] == [("ann", "f", 19)]
    store.flush()
    assert cold.given[3:] == []
    store.put(replace(record(seq=20), vocabulary=Vocabulary(201)))
    assert cold.given[3:] == []
    store.flush()
    assert cold.given[3:] == [("ann", "f", 20)]


def test_what_two_tiers_hold_is_told_apart():
    store = TieredStateStore(25, CountingCold(), lambda num_events: num_events > 1, spill_events=100)
    for user, seq in (("ann", 5), ("bob", 1), ("cat", 7)):
        store.put(record(user, seq))
    assert (len(store), store.nbytes, store.evictions) == (2, 20, 1)
    assert store.tiers() == {"memory": Tier(2, 20, 1), "cold": Tier(1, 10, 0)}
    assert [store.get(Owner(user), "f") is not None for user in ("ann", "cat", "dan")] == [True, True, False]
    assert (store.hits, store.misses) == ({"cold": 1, "memory": 1}, {"absent": 1})
    assert store.ready(Owner("ann"), "f") is None


def test_a_fingerprint_that_retires_leaves_what_is_known_of_the_other():
    cold = CountingCold()
    store = TieredStateStore(10**6, cold, lambda num_events: True, spill_events=5)
    for fingerprint in ("old", "new"):
        store.put(record(seq=10, fingerprint=fingerprint))
    store.retire("old")
    store.flush()
    assert cold.given == [("ann", "old", 10), ("ann", "new", 10)]
    assert store.get(Owner("ann"), "old") is None
    assert cold.get(Owner("ann"), "old") is None
    store.retire("new")
    assert store._written == {}  # of users of long ago nothing is left


class SlowCold(MemoryStateStore):
    """A cold store whose next `put` waits until it is told to go on."""

    def __init__(self):
        super().__init__(10**6)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def put(self, record: StateRecord) -> bool:
        self.reached.set()
        assert self.go_on.wait(120)
        return super().put(record)


def test_an_owner_dropped_while_on_the_way_to_the_disk_is_not_left_there():
    cold = SlowCold()
    store = TieredStateStore(15, cold, lambda num_events: True, spill_events=100)
    store.put(record("ann"))
    driving_out = threading.Thread(target=store.put, args=[record("bob")])
    driving_out.start()
    assert cold.reached.wait(120)
    store.drop(Owner("ann"))
    cold.go_on.set()
    driving_out.join()
    assert store.get(Owner("ann"), "f") is None
    assert store.get(Owner("bob"), "f") is not None
    store.put(record("ann", seq=2))  # the next one is held again, and goes down again
    store.put(record("bob", seq=2))
    assert store.get(Owner("ann"), "f") == record("ann", seq=2)
