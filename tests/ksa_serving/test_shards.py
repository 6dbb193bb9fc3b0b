"""Virtual shards, maps and plans: equal shares, as few moved as can be, and who may write what meanwhile."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksa_serving.errors import InvalidRequestError, NotOwnerError
from ksa_serving.shards import (
    NUM_VIRTUAL_SHARDS,
    Edge,
    Ownership,
    Process,
    ShardMap,
    balanced,
    first_map,
    next_map,
    virtual_shard,
)

SHARDS_OF_USERS = [virtual_shard(f"user-{n}") for n in range(10_000)]
HERE = Process("127.0.0.1:8001", "127.0.0.1:8501")


def processes(*names: str) -> dict[str, Process]:
    return dict.fromkeys(names, HERE)


def moved_all(held: ShardMap, names: set[str], most: int) -> tuple[ShardMap, int, int]:
    """Return the map after all steps, how many virtual shards moved in all, and in how many steps."""
    moved = steps = 0
    while (coming := next_map(held, processes(*names), most)) is not None:
        changed = [old != new for old, new in zip(held.owners, coming.owners)]
        assert sum(changed) <= most
        assert coming.epoch == held.epoch + 1
        assert all(
            since == (coming.epoch if new else old) for since, new, old in zip(coming.since, changed, held.since)
        )
        assert set(coming.owners) <= coming.processes.keys()
        held, moved, steps = coming, moved + sum(changed), steps + 1
    return held, moved, steps


def test_a_virtual_shard_is_the_users_hash_mod_1024():
    digest = hashlib.sha256("ü/ser".encode()).digest()
    assert virtual_shard("ü/ser") == int.from_bytes(digest[:8], "big") % 1024


@given(st.lists(st.sets(st.sampled_from("abcdefghij"), min_size=1), min_size=1, max_size=5), st.integers(60, 1024))
def test_any_story_of_processes_keeps_shares_equal_and_moves_no_more_than_it_must(stories: list[set[str]], most: int):
    held = first_map(processes(*stories[0]))
    for names in stories[1:]:
        before = held
        held, moved, _ = moved_all(before, names, most)
        shares = [held.owners.count(name) for name in names]
        assert sum(shares) == NUM_VIRTUAL_SHARDS
        assert max(shares) - min(shares) <= 1
        assert set(held.processes) == names
        # Least: whoever has too few gets what is missing, of as many larger shares as fit.
        had = sorted((before.owners.count(name) for name in names), reverse=True)
        small, larger = divmod(NUM_VIRTUAL_SHARDS, len(names))
        least = sum(max(0, small + (place < larger) - count) for place, count in enumerate(had))
        assert moved == least


@given(st.integers(1, 30))
def test_one_more_process_takes_its_share_of_users_and_no_others_move(num: int):
    names = {f"p{n}" for n in range(num)}
    held = first_map(processes(*names))
    after, _, _ = moved_all(held, names | {"new"}, NUM_VIRTUAL_SHARDS)
    assert all(new in (old, "new") for old, new in zip(held.owners, after.owners))
    moved = sum(held.owners[shard] != after.owners[shard] for shard in SHARDS_OF_USERS)
    assert moved / len(SHARDS_OF_USERS) <= 1 / (num + 1) + 0.03


def test_a_fair_map_is_left_as_it_is():
    held = first_map(processes("a", "b", "c"))
    assert next_map(held, processes("a", "b", "c")) is None
    assert balanced(held.owners, ["a", "b", "c"]) == held.owners


def test_an_address_that_changed_is_a_new_epoch_that_moves_nobody():
    held = first_map(processes("a", "b"))
    other = {**processes("a"), "b": Process("127.0.0.1:9", "127.0.0.1:10")}
    coming = next_map(held, other)
    assert coming is not None
    assert (coming.owners, coming.epoch, coming.processes) == (held.owners, 2, other)


def code(ownership: Ownership, user: str, writing: bool, edge: Edge | None = None) -> str:
    try:
        ownership.check(user, writing, edge)
    except (NotOwnerError, InvalidRequestError) as error:
        return error.code
    return "ok"


def test_what_moves_is_read_but_not_written_and_then_only_by_its_new_owner():
    held = first_map(processes("a"))
    coming = next_map(held, processes("a", "b"))
    assert coming is not None
    users = [f"u{n}" for n in range(200)]
    goes = {user for user in users if coming.owners[virtual_shard(user)] == "b"}
    assert 0 < len(goes) < 200
    for user in users:
        shard, moves = virtual_shard(user), user in goes
        before, during, after = Ownership("a", held), Ownership("a", held, coming), Ownership("a", coming)
        there = Ownership("b", coming)
        assert [code(before, user, writing) for writing in (False, True)] == ["ok", "ok"]
        assert [code(during, user, writing) for writing in (False, True)] == ["ok", "user-moving" if moves else "ok"]
        assert {code(after, user, writing) for writing in (False, True)} == {"user-elsewhere" if moves else "ok"}
        assert {code(there, user, writing) for writing in (False, True)} == {"ok" if moves else "user-elsewhere"}
        # A writer that chose by an old map is refused where the user has moved since, a reader is not.
        owner = there if moves else after
        assert code(owner, user, True, Edge(shard, 1)) == ("old-epoch" if moves else "ok")
        assert code(owner, user, False, Edge(shard, 1)) == "ok"
        assert code(owner, user, True, Edge(shard, 2)) == "ok"
        assert code(owner, user, True, Edge((shard + 1) % 1024, 2)) == "other-virtual-shard"


@pytest.mark.parametrize("name", ["", "a b", "a\n", "a\nb", "../a", "-a", "ü"])
def test_names_that_would_break_a_proxys_file_are_refused(name: str):
    import msgspec

    held = first_map(processes("a"))
    raw = msgspec.json.encode(held).replace(b'"a"', msgspec.json.encode(name))
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(raw, type=ShardMap)
