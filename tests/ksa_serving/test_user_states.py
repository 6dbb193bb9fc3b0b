import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksa_serving import state_plan, user_states
from ksa_serving.errors import EventLogError
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.release import Release
from ksa_serving.testing import ToyState, toy_release
from ksa_serving.user_states import FEW_EVENTS, UserStates
from ksa_serving.user_view import UserView
from recsys_ksa.order import TieKind

ANN, BOB = Owner("ann"), Owner("bob")
TIES: list[TieKind] = ["id", "arrival", "hash"]


@dataclass
class World:
    release: Release
    log: EventLog
    store: MemoryStateStore
    states: UserStates

    def recomputed(self, owner: Owner) -> ToyState:
        """One pass over the log's events, written without the code under test."""
        events = sorted(self.log.read(owner)[1], key=lambda event: event.order(self.release.tie))
        return self.release.model.append(self.release.model.new_state(), events)


def make_world(folder: Path, tie: TieKind = "arrival", max_bytes: int = 10**6, step: int = 3) -> World:
    release = toy_release(tie)
    log = EventLog(folder, tie)
    store = MemoryStateStore(max_bytes)
    return World(release, log, store, UserStates(release, log, store, rebuild_step_events=step))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = make_world(tmp_path)
    yield world
    world.log.close()


events = st.builds(
    NewEvent,
    item_id=st.sampled_from("abc"),
    timestamp=st.integers(0, 6),
    event_id=st.one_of(st.none(), st.text("0123456789", min_size=1, max_size=2)),
    event_type=st.sampled_from([None, "view"]),
)
steps = st.lists(
    st.tuples(
        st.sampled_from([ANN, BOB]),
        st.sampled_from(["post", "post", "post-and-catch-up", "ask", "drop"]),
        st.lists(events, max_size=4),
    ),
    max_size=12,
)


@pytest.mark.parametrize("tie", TIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps, max_bytes=st.sampled_from([100, 10**6]))
def test_a_state_equals_the_log_after_any_story(tie: TieKind, steps: list, max_bytes: int):
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), tie, max_bytes)
        for owner, step, given_events in steps:
            if step.startswith("post"):
                world.log.append(owner, given_events)
            if step == "post-and-catch-up":
                world.states.catch_up(owner)
            if step == "drop":
                world.store.drop(owner)
            if step == "ask":
                record, _ = world.states.current(owner)
                assert record.state == world.recomputed(owner)
                assert (record.num_events, record.seq) == (
                    world.log.head(owner).num_events,
                    world.log.head(owner).last_seq,
                )
        for owner in (ANN, BOB):
            held = world.states.held(owner)
            record, source = world.states.current(owner)
            assert record.state == world.recomputed(owner)
            assert source == (
                "none" if not record.num_events else "host" if held and held.seq == record.seq else source
            )
        world.log.close()


@pytest.mark.parametrize("tie", TIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kept=st.lists(events, max_size=6), asked=st.lists(events, max_size=4))
def test_events_of_a_request_serve_as_if_they_were_kept(tie: TieKind, kept: list[NewEvent], asked: list[NewEvent]):
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), tie)
        world.log.append(ANN, kept)
        before, _ = world.states.current(ANN)
        answered = world.states.with_events(before, asked)
        assert world.states.current(ANN)[0] == before  # nothing was kept, nothing changed
        world.log.append(ANN, asked)
        assert answered.state == world.states.current(ANN)[0].state
        world.log.close()


def test_a_user_without_events_is_answered_and_not_held(world: World):
    record, source = world.states.current(ANN)
    assert (record.num_events, record.seq, source) == (0, 0, "none")
    assert len(world.store) == 0


def test_states_are_not_built_before_someone_asks(world: World):
    world.log.append(ANN, [NewEvent("a", 1)])
    world.states.catch_up(ANN)
    assert len(world.store) == 0


def test_a_held_state_is_appended_not_rebuilt(world: World):
    world.log.append(ANN, [NewEvent("a", 1)])
    assert world.states.current(ANN)[1] == "rebuilt"
    world.log.append(ANN, [NewEvent("b", 2)])
    world.states.catch_up(ANN)
    held = world.states.held(ANN)
    assert held is not None
    assert held.num_events == 2
    assert world.states.current(ANN)[1] == "host"
    assert dict(world.states.rebuilds) == {"absent": 1}


def test_a_late_event_rewinds_the_state_and_appends_the_rest(world: World):
    world.log.append(ANN, [NewEvent(f"i{n}", 10 * n) for n in range(60)])
    old, _ = world.states.current(ANN)
    assert world.log.append(ANN, [NewEvent("b", 555)]).outcomes == ["late"]
    record, source = world.states.current(ANN)
    assert source == "host"
    assert record.state == world.recomputed(ANN)
    assert old.state.num_events == 60  # the old value stays what it was
    assert dict(world.states.rebuilds) == {"absent": 1}
    assert dict(world.states.replays) == {"late": 1}


def test_a_late_event_reads_no_more_of_the_log_than_it_must(world: World):
    world.log.append(ANN, [NewEvent(f"i{n}", 10 * n) for n in range(5000)])
    world.states.current(ANN)
    world.log.append(ANN, [NewEvent("late", 49_905)])
    read: list[int] = []
    newest = UserView.newest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UserView, "newest", lambda view, count: read.append(count) or newest(view, count))
        record, _ = world.states.current(ANN)
    assert record.state == world.recomputed(ANN)
    assert sum(read) < 1100  # to the last mark of the history hash


def test_what_is_too_long_for_an_answer_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading 100,000 events keeps Python from others for a third of a second."""
    world = make_world(tmp_path)
    states = UserStates(world.release, world.log, world.store, inline_events=100)
    world.log.append(ANN, [NewEvent(f"i{n}", 10 * n) for n in range(3000)])
    states.settle(ANN)
    world.log.append(ANN, [NewEvent("late", 5)])
    read: list[int] = []
    newest = UserView.newest
    monkeypatch.setattr(UserView, "newest", lambda view, count: read.append(count) or newest(view, count))
    record, source = states.current(ANN)
    assert (record.num_events, source, sum(read)) == (3000, "degraded", 0)
    world.store.drop(ANN)
    assert states.current(ANN)[1] == "degraded"
    assert sum(read) <= 100  # the newest alone
    assert states.settle(ANN).state == world.recomputed(ANN)
    world.log.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=st.lists(events, max_size=20), late=st.lists(events, max_size=20))
@pytest.mark.parametrize("tie", TIES)
def test_states_made_with_rests_are_those_made_without(tie: TieKind, first: list[NewEvent], late: list[NewEvent]):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(user_states, "RESTING_STEP_EVENTS", 2)
        patch.setattr(state_plan, "RESTING_READ_EVENTS", 3)
        world, rests = make_world(Path(folder), tie, step=100), list[float]()
        states = world.states.resting(rests.append)
        for events in (first, late):
            world.log.append(ANN, events)
            assert states.settle(ANN).state == world.recomputed(ANN)
        num_events = world.log.head(ANN).num_events
        assert len(rests) >= num_events / 3
        world.log.close()


def test_a_history_whose_only_event_was_retracted_is_known_up_to_its_tombstone(world: World):
    world.log.append(ANN, [NewEvent("a", 5, "e1")])
    world.states.current(ANN)
    assert world.log.retract(ANN, "e1").result().outcomes == ["accepted"]
    record, source = world.states.current(ANN)
    assert (record.num_events, record.seq, source) == (0, world.log.head(ANN).last_seq, "none")


@pytest.mark.parametrize("tie", TIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
def test_states_had_together_are_those_had_alone(tie: TieKind, steps: list):
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), tie)
        for owner, step, given_events in steps:
            if step.startswith("post"):
                world.log.append(owner, given_events)
                continue
            for each, current in zip((ANN, BOB), world.states.current_together([ANN, BOB])):
                alone, _ = world.states.current(each)
                if current is not None:
                    record, source = current
                    assert (record.state, record.seq, record.chain) == (alone.state, alone.seq, alone.chain)
                    assert record.last_order == alone.last_order
                    assert source == ("host" if record.num_events else "none")
                assert alone.state == world.recomputed(each)
        world.log.close()


def test_states_that_need_more_than_a_few_events_are_not_had_together(world: World):
    assert world.states.current_together([ANN]) == [None]  # not held
    world.log.append(ANN, [NewEvent("a", 5, "e1")])
    world.states.current(ANN)
    world.log.append(ANN, [NewEvent("b", 6)])
    world.log.append(BOB, [NewEvent("b", 6)])
    together, absent = world.states.current_together([ANN, BOB])
    assert absent is None
    assert together is not None
    assert together[0].state == world.recomputed(ANN)
    for events in ([NewEvent("c", 1)], [NewEvent("d", n) for n in range(10, 11 + FEW_EVENTS)]):  # late; many
        world.log.append(ANN, events)
        assert world.states.current_together([ANN]) == [None]
        world.states.current(ANN)
    world.log.retract(ANN, "e1").result()
    assert world.states.current_together([ANN]) == [None]


def test_retracted_and_corrected_events_leave_the_state_of_the_rest(world: World):
    world.log.append(ANN, [NewEvent(f"i{n}", 10 * n, f"e{n}") for n in range(40)])
    world.states.current(ANN)
    assert world.log.retract(ANN, "e30").result().outcomes == ["accepted"]
    assert world.log.retract(ANN, "e30").result().outcomes == ["duplicate"]
    assert world.log.retract(ANN, "nope").result().outcomes == ["unknown"]
    assert world.log.append(ANN, [NewEvent("i30", 300, "e30")]).outcomes == ["duplicate"]  # not brought back
    record, _ = world.states.current(ANN)
    assert record.num_events == 39
    assert record.state == world.recomputed(ANN)
    world.log.correct(ANN, NewEvent("other", 200, "e20")).result()
    record, _ = world.states.current(ANN)
    assert record.state == world.recomputed(ANN)
    assert "i20" not in record.state.seen
    assert dict(world.states.rebuilds) == {"absent": 1}


def test_what_would_take_long_is_answered_degraded_and_settled_later(tmp_path: Path):
    world = make_world(tmp_path)
    states = UserStates(world.release, world.log, world.store, inline_events=50)
    world.log.append(ANN, [NewEvent(f"i{n}", 10 * n) for n in range(200)])
    record, source = states.current(ANN)
    assert (source, world.store.get(ANN, record.fingerprint)) == ("degraded", None)
    assert 0 < record.num_events < 200
    assert states.settle(ANN).state == world.recomputed(ANN)
    assert states.current(ANN)[1] == "host"
    world.log.append(ANN, [NewEvent("late", 5)])
    record, source = states.current(ANN)
    assert (source, record.num_events) == ("degraded", 200)  # what was held before
    assert states.settle(ANN).state == world.recomputed(ANN)
    world.log.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: replace(record, num_events=7),
        lambda record: replace(record, generation=3),
        lambda record: replace(record, seq=1),
        lambda record: replace(record, chain=bytes(16)),
    ],
)
def test_a_record_that_disagrees_with_the_log_is_never_used(world: World, damage):
    world.log.append(ANN, [NewEvent("a", 5), NewEvent("b", 6)])
    record, _ = world.states.current(ANN)
    world.store.drop(ANN)
    world.store.put(damage(record))
    again, source = world.states.current(ANN)
    assert (again, source) == (record, "rebuilt")
    assert sum(world.states.rebuilds.values()) == 2


def test_a_state_of_another_model_is_never_used(world: World):
    world.log.append(ANN, [NewEvent("a", 5)])
    world.states.current(ANN)
    other = UserStates(toy_release(fingerprint="other"), world.log, world.store)
    assert other.held(ANN) is None
    record, source = other.current(ANN)
    assert (record.fingerprint, source) == ("other", "rebuilt")


def test_a_log_that_lost_events_is_refused(world: World):
    world.log.append(ANN, [NewEvent("a", 5), NewEvent("b", 6)])
    world.log._connection.execute("DELETE FROM events WHERE item_id = 'b'")
    with pytest.raises(EventLogError, match="expected 2 events"):
        world.states.current(ANN)
