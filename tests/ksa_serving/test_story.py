"""The whole state story against a list: hypothesis looks for a sequence of steps after which a state is wrong.

Steps: events (in order, late, again, of the same time), corrections, retractions, deletion of users, questions,
background catching up, eviction from memory, crashes, a swap of releases and back, damage to the cold tier.
"""

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from list_model import ListModel

from ksa_serving.cold_store import HEAD, ColdStateStore
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.lmdb_engine import LmdbEngine
from ksa_serving.testing import toy_release
from ksa_serving.tiered_store import TieredStateStore
from ksa_serving.user_states import UserStates
from recsys_ksa.order import TieKind

USERS = [Owner("ann"), Owner("bob")]
users = st.sampled_from(USERS)
events = st.builds(
    NewEvent,
    item_id=st.sampled_from("abcd"),
    timestamp=st.integers(0, 40),
    event_id=st.one_of(st.none(), st.integers(0, 30).map(str)),
    event_type=st.sampled_from([None, "view"]),
)


class Story(RuleBasedStateMachine):
    @initialize(tie=st.sampled_from(["id", "arrival", "hash"]), memory=st.sampled_from([400, 10**6]))
    def begin(self, tie: TieKind, memory: int):
        self.folder = Path(tempfile.mkdtemp())
        self.tie: TieKind = tie
        self.memory = memory
        self.releases = [toy_release(tie, fingerprint=name) for name in ("one", "two")]
        self.served = 0
        self.model = ListModel(tie)
        self.open()

    def open(self) -> None:
        path = self.folder
        self.log = EventLog(path, self.tie)
        models = {release.state_fingerprint: release.model for release in self.releases}
        self.engine = LmdbEngine(path, 10**7)
        cold = ColdStateStore(self.engine, models, self.log.salt)
        toy = self.releases[0].model
        self.store = TieredStateStore(self.memory, cold, lambda n: toy.replay_start(n) > 0, spill_events=3)
        self.states = [UserStates(release, self.log, self.store, 5) for release in self.releases]

    @rule(owner=users, given=st.lists(events, max_size=6), catch_up=st.booleans())
    def append(self, owner: Owner, given: list[NewEvent], catch_up: bool):
        self.log.append(owner, given)
        for event in given:
            self.model.append(owner, event)
        if catch_up:
            self.states[self.served].catch_up(owner)

    @rule(owner=users, start=st.integers(0, 60), count=st.integers(1, 40))
    def append_in_order(self, owner: Owner, start: int, count: int):
        given = [NewEvent(f"run-{n}", 40 + n) for n in range(start, start + count)]
        self.append(owner, given, False)

    @rule(owner=users, event_id=st.integers(0, 30).map(str))
    def retract(self, owner: Owner, event_id: str):
        self.log.retract(owner, event_id).result()
        self.model.retract(owner, event_id)

    @rule(owner=users, event=events.filter(lambda event: event.event_id is not None))
    def correct(self, owner: Owner, event: NewEvent):
        self.log.correct(owner, event).result()
        self.model.correct(owner, event)

    @rule(owner=users)
    def forget(self, owner: Owner):
        assert self.log.forget(owner).result() == len(self.model.kept[owner])
        self.store.drop(owner)
        self.model.forget(owner)

    @rule(owner=users)
    def ask(self, owner: Owner):
        self.check(owner, self.served)

    @rule(owner=users, given=st.lists(events, max_size=3))
    def ask_with_events(self, owner: Owner, given: list[NewEvent]):
        states = self.states[self.served]
        record, _ = states.current(owner)
        answered = states.with_events(record, given)
        assert set(answered.state.seen) >= {event.item_id for event in self.model.history(owner)}
        assert states.current(owner)[0].state == record.state

    @rule()
    def swap_releases(self):
        self.served = 1 - self.served

    @rule(flush=st.booleans())
    def crash(self, flush: bool):
        if flush:
            self.store.flush()
        self.store.cold.close()
        self.log.close()
        self.open()

    @rule(owner=users)
    def evict(self, owner: Owner):
        for record in self.store.memory.records():
            self.store._spill(record)
        self.store.memory.drop(owner)

    @rule(owner=users)
    def damage(self, owner: Owner):
        key = owner.key(self.log.salt)
        for release in self.releases:
            whole = self.store.cold._key(owner, release.state_fingerprint)  # type: ignore[attr-defined]
            head = self.engine.read_part(whole, HEAD)
            if head is not None:
                self.engine.write(whole, {HEAD: head[:-40] + bytes([head[-40] ^ 1]) + head[-39:]}, ())
        assert key

    @invariant()
    def the_log_counts_right(self):
        if hasattr(self, "log"):
            for owner in USERS:
                assert self.log.head(owner).num_events == len(self.model.kept[owner])

    def check(self, owner: Owner, served: int) -> None:
        states, history = self.states[served], self.model.history(owner)
        record, _ = states.current(owner)
        _, stored = self.log.read(owner)
        mine = [(e.item_id, e.timestamp, e.event_id, e.event_type) for e in stored]
        assert mine == [(e.item_id, e.timestamp, e.event_id, e.event_type) for e in history]
        model = self.releases[served].model
        assert record.state == model.append(model.new_state(), stored)
        assert (record.num_events, record.seq) == (len(history), self.log.head(owner).last_seq)

    def teardown(self):
        try:
            if hasattr(self, "log"):
                for owner in USERS:
                    for served in (0, 1):
                        self.check(owner, served)
        finally:
            if hasattr(self, "log"):
                self.store.cold.close()
                self.log.close()
            if hasattr(self, "folder"):
                shutil.rmtree(self.folder)


STEPS = int(os.environ.get("KSA_STORY_STEPS", "10000"))
"""Steps in all: 10^4 in CI, 10^5 with `make nightly FULL=1`."""
Story.TestCase.settings = settings(
    deadline=None, max_examples=max(1, STEPS // 50), stateful_step_count=50, print_blob=True, suppress_health_check=[]
)
TestStory = Story.TestCase
