"""Users go from log to log with all that is known of them, and come back; nothing is lost, doubled or revived."""

import random
from pathlib import Path

import pytest
from hand_driven import done, hand_driven_logs

from ksa_serving.errors import NotOwnerError, ShardError
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.shard_rows import Cursor, Page, read_page
from ksa_serving.shards import NUM_VIRTUAL_SHARDS, Ownership, Process, first_map, virtual_shard

EVERYONE = frozenset(range(NUM_VIRTUAL_SHARDS))
RESIDENT = Owner("resident")
PROCESS = Process("127.0.0.1:1", "127.0.0.1:2")


@pytest.fixture
def logs(tmp_path: Path):
    opened = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        opened.append(EventLog(tmp_path / name, "arrival"))
    yield opened
    for log in opened:
        log.close()


def carry(source: EventLog, target: EventLog, move: str, rows: int = 7, again: bool = True) -> list[Page]:
    """Send everyone's rows in small pages, each of them twice, while the new log keeps others' events too."""
    pages: list[Page] = []
    after: Cursor | None = Cursor()
    while after is not None:
        with source._reader() as connection:  # as `EventLog.read_page`, in smaller pages
            page = read_page(connection, EVERYONE, move, "source", after, rows)
        for _ in range(1 + again):
            target.keep_page(page).result()
            target.append(RESIDENT, [NewEvent("milk", len(pages))])
        pages.append(page)
        after = page.after
    return pages


def give(log: EventLog, name: str) -> None:
    """Make the log one of several, so that it asks what others told it of deleted users."""
    log.own(Ownership(name, first_map({name: PROCESS}))).result()


def story(log: EventLog, draw: random.Random, users: int, steps: int, start: int = 0) -> None:
    """Keep, correct, retract and delete at random."""
    sent: dict[Owner, list[str]] = {}
    for step in range(start, start + steps):
        owner = Owner(f"u{draw.randrange(users)}", draw.choice(["", "shop"]))
        what = draw.random()
        known = draw.choice([*sent.get(owner, []), f"e{draw.randrange(max(1, step))}"])
        if what < 0.1:
            log.retract(owner, known).result()
        elif what < 0.2:
            log.correct(owner, NewEvent(f"c{step}", draw.randrange(1000), known)).result()
        elif what < 0.23:
            log.forget(owner).result()
        else:
            sent.setdefault(owner, []).append(f"e{step}")
            events = [NewEvent(f"i{n}", draw.randrange(1000), f"e{step}") for n in range(draw.randint(1, 2))]
            log.append(owner, [*events, NewEvent(f"i{step}", draw.randrange(1000), None, "buy", 1.5)])


def told(log: EventLog) -> dict[Owner, object]:
    """What a log says of everyone who moves, but sequence numbers."""
    result = {}
    for owner in log.owners():
        if owner == RESIDENT:
            continue
        head, events = log.read(owner)
        result[owner] = (head.num_events, head.chain, [(e.item_id, e.timestamp, e.event_id, e.value) for e in events])
    return result


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_a_log_that_was_carried_says_the_same_and_knows_what_it_knew(logs: list[EventLog], seed: int, rows: int):
    source, target, _ = logs
    target.append(RESIDENT, [NewEvent("bread", n) for n in range(9)])  # has numbers of its own
    draw = random.Random(seed)
    story(source, draw, users=8, steps=60)
    before = told(source)
    carry(source, target, "m1", rows)
    assert told(target) == before
    movers = EVERYONE - {virtual_shard(RESIDENT.user_id)}
    assert target.tally(movers) == source.tally(movers)
    with target._reader() as connection:  # each tombstone names what it retracts, by the new numbers
        dangling = connection.execute(
            "SELECT count(*) FROM events t LEFT JOIN events e ON e.seq = t.retracts AND e.user_key = t.user_key"
            " WHERE t.retracts IS NOT NULL AND (e.live IS NULL OR e.live = 1)"
        ).get
    assert dangling == 0
    for owner in source.owners():  # read-your-writes survives: no number is lower than it was
        assert target.head(owner).last_seq >= source.head(owner).last_seq
    # From here on both logs answer alike: duplicates, conflicts, corrections and retractions of old ids included.
    for step in range(60):
        owner = Owner(f"u{draw.randrange(8)}", "")
        event_id = f"e{draw.randrange(70)}"
        event = NewEvent(f"i{draw.randrange(3)}", draw.randrange(1000), event_id)
        calls = [
            lambda log, o=owner, e=event: log.append(o, [e]).outcomes,
            lambda log, o=owner, e=event_id: log.retract(o, e).result().outcomes,
            lambda log, o=owner, e=event: log.correct(o, e).result().outcomes,
        ]
        call = calls[step % 3]
        assert call(source) == call(target)
    assert {o: t[2] for o, t in told(source).items()} == {o: t[2] for o, t in told(target).items()}  # type: ignore[index]


def test_users_keep_their_order_of_arrival_among_events_of_one_second(logs: list[EventLog]):
    source, target, _ = logs
    target.append(RESIDENT, [NewEvent(f"r{n}", 5) for n in range(50)])
    for n in range(20):
        source.append(Owner("ann"), [NewEvent(f"i{19 - n}", 5)])
    carry(source, target, "m1")
    target.append(Owner("ann"), [NewEvent("last", 5)])
    assert [e.item_id for e in target.read(Owner("ann"))[1]] == [*(f"i{19 - n}" for n in range(20)), "last"]


def test_moves_without_end_do_not_use_up_the_numbers(logs: list[EventLog], seed: int):
    """A hundred moves to and fro in parts, events in between: the highest number is what was kept and moved."""
    draw = random.Random(seed)
    halves = [frozenset(range(512)), frozenset(range(512, NUM_VIRTUAL_SHARDS))]
    source, target, _ = logs
    home = {Owner(f"u{n}"): source for n in range(6)}
    moved = kept = 0
    for number in range(100):
        for half in halves:
            owner, log = draw.choice(list(home.items()))
            log.append(owner, [NewEvent(f"i{kept}", kept)])
            kept += 1
            after: Cursor | None = Cursor()
            while after is not None:
                with source._reader() as connection:
                    page = read_page(connection, half, f"m{number} {min(half)}", "source", after, 5)
                target.keep_page(page).result()
                moved += sum(len(user.entries) for user in page.users)
                after = page.after
            movers = [owner for owner in home if virtual_shard(owner.user_id) in half]
            source.let_go(movers).result()
            home |= dict.fromkeys(movers, target)
        source, target = target, source
    assert sum(source.head(owner).num_events for owner in home) == kept
    assert max(source.head(owner).last_seq for owner in home) <= moved + kept


def test_deleted_users_stay_deleted_in_every_log_they_could_come_back_in(logs: list[EventLog]):
    a, b, c = logs
    ann, bob = Owner("ann"), Owner("bob")
    a.append(ann, [NewEvent("secret", 1, "e1")])
    a.append(bob, [NewEvent("milk", 1, "e1")])
    a.forget(ann).result()
    for log, name in zip(logs, "abc"):
        give(log, name)
    carry(a, b, "m1")
    assert b.owners() == [bob, RESIDENT]
    b.append(ann, [NewEvent("new", 2, "e1")])  # a new life, of a later generation than any before
    assert b.head(ann).generation == 1
    b.forget(ann).result()
    carry(b, c, "m2")
    c.append(ann, [NewEvent("newer", 3, "e1")])
    assert c.head(ann).generation == 2
    assert [event.item_id for event in c.read(ann)[1]] == ["newer"]
    a.let_go([bob]).result()
    carry(c, a, "m3")  # and home again
    assert a.head(ann).generation == 2
    assert [event.item_id for event in a.read(ann)[1]] == ["newer"]
    assert [event.item_id for event in a.read(bob)[1]] == ["milk"]


def test_users_who_were_let_go_leave_neither_rows_nor_bytes(logs: list[EventLog], tmp_path: Path):
    source = logs[0]
    owners = [Owner(f"user-{n}") for n in range(30)]
    for owner in owners:
        source.append(owner, [NewEvent(f"secret-{n}", n) for n in range(20)])
    source.append(Owner("stays"), [NewEvent("milk", 1)])
    source.let_go(owners).result()
    assert source.owners() == [Owner("stays")]
    assert source.head(owners[0]).last_seq == 0
    while source.purging:
        pass
    with source._reader() as connection:
        assert connection.execute("SELECT count(*) FROM users").get == 1
        assert connection.execute("SELECT count(*) FROM events").get == 1
    for file in (tmp_path / "a").iterdir():
        assert b"secret-" not in file.read_bytes()
        assert b"user-" not in file.read_bytes()


def test_a_user_who_began_to_move_is_not_written_even_if_the_call_was_let_in(logs: list[EventLog]):
    """What is read out after the refusal began is all there is."""
    log, ann = logs[0], Owner("ann")
    here, there = (first_map({name: PROCESS}) for name in ("here", "there"))
    log.own(Ownership("here", here)).result()
    log.append(ann, [NewEvent("milk", 1, "e1")])
    before = log.read(ann)
    log.own(Ownership("here", here, there)).result()
    calls = [
        lambda: log.submit(ann, [NewEvent("tea", 2, "e2")]),
        lambda: log.correct(ann, NewEvent("tea", 1, "e1")),
        lambda: log.retract(ann, "e1"),
        lambda: log.forget(ann),
    ]
    for call in calls:
        with pytest.raises(NotOwnerError, match="is moving"):
            call().result()
    assert log.read(ann) == before
    log.own(Ownership("here", here)).result()  # the move was given up
    assert log.append(ann, [NewEvent("tea", 2, "e2")]).outcomes == ["accepted"]


def test_a_user_who_was_let_go_and_comes_without_rows_starts_anew(logs: list[EventLog]):
    source, ann = logs[0], Owner("ann")
    source.append(ann, [NewEvent("milk", 1, "e1")])
    source.let_go([ann]).result()
    assert source.append(ann, [NewEvent("tea", 1, "e1")]).outcomes == ["accepted"]
    assert source.owners() == [ann]
    assert [event.item_id for event in source.read(ann)[1]] == ["tea"]
    source.check()


def test_a_user_who_has_events_in_the_new_log_is_refused_and_nothing_is_changed(logs: list[EventLog]):
    source, target, _ = logs
    for log in (source, target):
        log.append(Owner("ann"), [NewEvent("milk", 1)])
    before = told(target)
    with pytest.raises(ShardError, match="new here"):
        carry(source, target, "m1")
    assert told(target) == before
    assert target.writer.healthy


def test_a_first_map_is_refused_that_gives_away_a_user_kept_in_the_same_commit(tmp_path: Path):
    with hand_driven_logs(random.Random(1)):
        log = EventLog(tmp_path, "arrival")
        kept = log.submit(Owner("ann"), [NewEvent("milk", 1)])
        told = log.own(Ownership("here", first_map({"there": PROCESS})))
        log.writer.step()
        assert kept.result().outcomes == ["accepted"]
        with pytest.raises(ShardError, match="got others"):
            told.result()
        assert log.ownership is None
        done(log, log.own(Ownership("here", first_map({"here": PROCESS}))))
        log.close()


def test_what_a_process_does_not_own_is_not_written_even_if_the_call_was_let_in(logs: list[EventLog], tmp_path: Path):
    log = logs[0]
    held = first_map({"here": PROCESS, "there": PROCESS})
    users = [f"u{n}" for n in range(40)]
    log.own(Ownership("here", held)).result()
    for user in users:
        mine = held.owners[virtual_shard(user)] == "here"
        calls = [
            lambda u=user: log.append(Owner(u), [NewEvent("milk", 1, "e1")]),
            lambda u=user: log.correct(Owner(u), NewEvent("tea", 1, "e1")).result(),
            lambda u=user: log.retract(Owner(u), "e1").result(),
            lambda u=user: log.forget(Owner(u)).result(),
        ]
        for call in calls:
            if mine:
                call()
            else:
                with pytest.raises(Exception, match="another process's"):
                    call()
    log.close()
    again = EventLog(tmp_path / "a", "arrival")
    assert again.ownership == Ownership("here", held)  # on disk, before anything else is written
    again.close()
