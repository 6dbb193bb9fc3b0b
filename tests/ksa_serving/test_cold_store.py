"""Cold records on real engines: LMDB in a file, Redis as a real server."""

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from held_port import held_port
from msgspec import structs
from simulated import SimulatedEngine

from ksa_serving.cold_store import HEAD, BytesEngine, ColdStateStore, EngineError, open_head, seal_head
from ksa_serving.events import Owner, StoredEvent
from ksa_serving.lmdb_engine import MOST_UNCLOSED, LmdbEngine
from ksa_serving.models import Vocabulary
from ksa_serving.redis_engine import RedisEngine
from ksa_serving.state_store import StateRecord
from ksa_serving.testing import ToyModel
from ksa_serving.tiered_store import TieredStateStore

ANN, BOB = Owner("ann"), Owner("bob")
SALT = b"0" * 16
MODELS = {"f": ToyModel(fingerprint="f"), "new": ToyModel(fingerprint="new")}


def patient_engine(url: str) -> RedisEngine:
    """What waits for a server on a machine that has other work."""
    return RedisEngine(url, timeout=120, whole_timeout=120)


@pytest.fixture(params=["lmdb", "redis"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BytesEngine]:
    if request.param == "lmdb":
        engine: BytesEngine = LmdbEngine(tmp_path, 10**7)
    else:
        engine = patient_engine(request.getfixturevalue("redis_url"))
        engine.remove(b"")
    yield engine
    engine.close()


def record(owner: Owner = ANN, num_events: int = 50, seq: int = 50, fingerprint: str = "f", **fields) -> StateRecord:
    model = MODELS[fingerprint]
    events = [StoredEvent(n, f"{owner.user_id}-{n}", n, None, None, None) for n in range(num_events)]
    state = model.append(model.new_state(), events)
    order = ((num_events - 1, b"tie"), seq)
    made = StateRecord(
        owner, 0, fingerprint, num_events, seq, b"c" * 16, order, (), state, 8 * num_events, Vocabulary(200)
    )
    return replace(made, **fields)


def same(cold: StateRecord | None, put: StateRecord) -> bool:
    """Whether a cold record is what was put, but for what a cold one lacks."""
    state = replace(put.state, window=None)
    return cold is not None and replace(cold, nbytes=0) == replace(put, state=state, cold=True, nbytes=0)


def test_gives_back_what_was_put_but_cold(engine: BytesEngine):
    store = ColdStateStore(engine, MODELS, SALT)
    for owner, num in ((ANN, 50), (BOB, 7), (Owner("ann", "shop"), 64)):
        store.put(record(owner, num))
        assert same(store.get(owner, "f"), record(owner, num))
    assert same(store.get(ANN, "f"), record(ANN, 50))
    assert len(store) == 3
    assert store.nbytes > 0


def test_a_state_larger_than_one_user_may_take_is_not_written(engine: BytesEngine):
    store = ColdStateStore(engine, MODELS, SALT, largest=400)
    store.put(record(ANN, 50))
    assert same(store.get(ANN, "f"), record(ANN, 50))
    store.put(record(BOB, 51))
    store.put(record(ANN, 51, 51))
    assert store.get(BOB, "f") is None
    assert same(store.get(ANN, "f"), record(ANN, 50))  # what it was is still of use
    assert store.misses["too-large"] == 2


def test_records_of_another_parity_are_counted_misses_and_states_are_never_written_as_better_than_they_are(
    engine: BytesEngine,
):
    exact = ColdStateStore(engine, MODELS, SALT)
    rounding = ColdStateStore(engine, {"f": ToyModel(fingerprint="f", cold_parity="int8")}, SALT)
    for mine, other, parity in ((exact, rounding, "exact"), (rounding, exact, "int8")):
        mine.put(record())
        found = mine.get(ANN, "f")
        assert found is not None
        assert found.parity == parity
        assert other.get(ANN, "f") is None
        assert other.misses["parity"] == 1
        assert mine.get(ANN, "f") is None  # it was removed
    exact.put(record(parity="int8"))
    assert exact.get(ANN, "f") is None
    rounding.put(record(parity="int8"))
    assert rounding.get(ANN, "f") is not None


def test_growing_writes_only_what_is_new(engine: BytesEngine, monkeypatch: pytest.MonkeyPatch):
    store = ColdStateStore(engine, MODELS, SALT)
    store.put(record(num_events=64, seq=64))
    written: list[int] = []
    write = engine.write
    monkeypatch.setattr(engine, "write", lambda key, parts, gone: written.append(len(parts)) or write(key, parts, gone))
    longer = record(num_events=73, seq=73)
    store.put(longer)
    assert written == [2]  # the head and one new segment
    assert same(store.get(ANN, "f"), longer)
    shorter = record(num_events=20, seq=99)  # rewound and written again: what is gone is gone
    store.put(shorter)
    assert same(store.get(ANN, "f"), shorter)
    assert len(engine.read(store._key(ANN, "f"))) == 3


def test_another_fingerprint_or_log_is_a_miss(engine: BytesEngine):
    store = ColdStateStore(engine, MODELS, SALT)
    store.put(record())
    assert store.get(ANN, "new") is None
    assert ColdStateStore(engine, MODELS, b"1" * 16).get(ANN, "f") is None
    store.put(record(fingerprint="new"))
    assert store.get(ANN, "f") is not None  # side by side
    store.retire("f")
    assert store.get(ANN, "f") is None
    assert store.get(ANN, "new") is not None


def test_records_swapped_between_users_are_never_used(engine: BytesEngine):
    store = ColdStateStore(engine, MODELS, SALT)
    store.put(record(ANN))
    store.put(record(BOB))
    ann, bob = store._key(ANN, "f"), store._key(BOB, "f")
    ann_parts, bob_parts = engine.read(ann), engine.read(bob)
    engine.write(ann, bob_parts, ())
    assert store.get(ANN, "f") is None
    assert store.misses["owner"] == 1
    engine.write(bob, {HEAD: ann_parts[HEAD]}, ())
    assert store.get(BOB, "f") is None


def test_any_flipped_bit_cut_or_missing_part_is_a_counted_miss(engine: BytesEngine, seed: int):
    draw = random.Random(seed)
    store = ColdStateStore(engine, MODELS, SALT)
    key = store._key(ANN, "f")
    for turn in range(120):
        store.drop(ANN)
        store.put(record())
        parts = engine.read(key)
        name = draw.choice(sorted(parts))
        content = bytearray(parts[name])
        if turn % 3 == 0:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            engine.write(key, {name: bytes(content)}, ())
        elif turn % 3 == 1:
            engine.write(key, {name: bytes(content[: draw.randrange(len(content))]) or b"x"}, ())
        else:
            engine.write(key, {}, [name])
        assert store.get(ANN, "f") is None, (turn, name)
        assert engine.read(key) == {}, "a damaged record is not kept"
    assert store.misses["damaged"] == 120


def test_a_dropped_user_is_gone_in_every_fingerprint(engine: BytesEngine):
    store = ColdStateStore(engine, MODELS, SALT)
    store.put(record())
    store.put(record(fingerprint="new"))
    store.put(record(BOB))
    store.drop(ANN)
    assert store.get(ANN, "f") is None
    assert store.get(ANN, "new") is None
    assert store.get(BOB, "f") is not None


def test_deleting_a_user_asks_redis_of_that_user_alone(redis_url: str, seed: int):
    draw, server = random.Random(seed), redis.Redis.from_url(redis_url)
    engine = patient_engine(redis_url)
    engine.remove(b"")
    store = ColdStateStore(engine, MODELS, SALT)
    others = [Owner(f"user-{n}") for n in range(draw.randrange(150, 400))]
    for owner in [*others, ANN]:
        store.put(record(owner, 20))
    store.put(record(fingerprint="new"))
    server.config_resetstat()
    store.drop(ANN)
    asked = {str(name).removeprefix("cmdstat_"): told["calls"] for name, told in server.info("commandstats").items()}
    assert sum(asked.values()) - asked.get("config|resetstat", 0) - asked.get("info", 0) == 1, asked
    assert store.get(ANN, "f") is None
    assert store.get(ANN, "new") is None
    assert all(same(store.get(owner, "f"), record(owner, 20)) for owner in draw.sample(others, 20))
    assert len(store) == len(others)
    keys = {store._key(owner, "f") for owner in others}
    assert set(engine.record_keys()) == keys
    assert {server.ttl(name) > 0 for name in server.scan_iter()} == {True}  # nothing is kept for ever
    engine.close()


def test_a_fingerprint_that_retires_while_others_are_written_takes_nothing_of_them(redis_url: str, seed: int):
    draw, engine = random.Random(seed), patient_engine(redis_url)
    engine.remove(b"")
    store = ColdStateStore(engine, MODELS, SALT)
    owners = [Owner(f"user-{n}") for n in range(250)]
    for owner in owners:
        store.put(record(owner, 20))
    began, end = threading.Event(), threading.Event()
    written: list[Owner] = []

    def write() -> None:
        while not end.is_set() and len(written) < len(owners):
            store.put(record(owners[len(written)], draw.randrange(1, 60), fingerprint="new"))
            written.append(owners[len(written)])
            began.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert began.wait(120)
    store.retire("f")
    end.set()
    writer.join()
    assert all(store.get(owner, "new") for owner in written)
    assert not any(store.get(owner, "f") for owner in owners)
    engine.close()


def test_less_never_replaces_more(engine: BytesEngine):
    store = ColdStateStore(engine, MODELS, SALT)
    store.put(record(num_events=50, seq=50))
    store.put(record(num_events=40, seq=40))
    assert same(store.get(ANN, "f"), record(num_events=50, seq=50))
    store.put(record(num_events=3, seq=3, generation=1))
    assert same(store.get(ANN, "f"), record(num_events=3, seq=3, generation=1))


def test_memory_before_cold_gives_what_memory_let_go(engine: BytesEngine):
    cold = ColdStateStore(engine, MODELS, SALT)
    store = TieredStateStore(750, cold, lambda num_events: num_events > 10, spill_events=10**9)
    store.put(record(ANN, 50))
    store.put(record(BOB, 5))
    store.put(record(Owner("cat"), 90))  # drives both out; five events are not worth a cold record
    found = store.get(ANN, "f")
    assert found is not None
    assert found.cold
    assert store.get(BOB, "f") is None
    assert store.evictions == 2
    assert store.hits == {"cold": 1}
    store.flush()
    assert same(cold.get(Owner("cat"), "f"), record(Owner("cat"), 90))


def test_what_could_not_be_written_is_written_by_the_next_flush(seed: int):
    engine = SimulatedEngine(random.Random(seed))
    cold = ColdStateStore(engine, MODELS, SALT)
    store = TieredStateStore(10**6, cold, lambda num_events: True, spill_events=100)
    store.put(record(ANN, 100))
    engine.fault_share = 1.0
    store.put(record(ANN, 200, 200))
    store.put(record(BOB, 150, 150))
    store.flush()
    assert store.unwritable_seconds > 0
    engine.fault_share = 0.0
    store.flush()
    assert store.unwritable_seconds == 0
    assert same(cold.get(ANN, "f"), record(ANN, 200, 200))
    assert same(cold.get(BOB, "f"), record(BOB, 150, 150))


def test_a_drop_that_failed_is_owed_until_a_purge_did_it(seed: int):
    engine = SimulatedEngine(random.Random(seed))
    store = ColdStateStore(engine, MODELS, SALT)
    store.put(record())
    engine.fault_share = 1.0
    store.drop(ANN)
    assert not store.purge()
    engine.fault_share = 0.0
    assert store.purge()
    assert not list(engine.record_keys())
    store.put(record(seq=60))  # the next one is nobody's debt
    assert store.purge()
    assert same(store.get(ANN, "f"), record(seq=60))


def test_a_state_of_other_events_than_its_head_tells_is_damaged(engine: BytesEngine):
    store = ColdStateStore(engine, MODELS, SALT)
    store.put(record(num_events=50))
    key = store._key(ANN, "f")
    head = open_head(engine.read(key)[HEAD])
    assert head is not None
    engine.write(key, {HEAD: seal_head(structs.replace(head, num_events=49))}, ())
    assert store.get(ANN, "f") is None
    assert store.misses["damaged"] == 1


def test_lmdb_makes_room_by_removing_the_oldest(tmp_path: Path):
    engine = LmdbEngine(tmp_path, 4_000_000)
    store = ColdStateStore(engine, MODELS, SALT)
    for n in range(400):
        store.put(record(Owner(f"u{n}"), 600))
        assert store.nbytes <= 4_000_000
    assert store.get(Owner("u399"), "f") is not None
    assert store.get(Owner("u0"), "f") is None
    assert 5 < len(store) < 400
    assert store.misses["unwritten"] == 0
    engine.close()


def test_lmdb_compaction_leaves_no_bytes_of_a_dropped_user(tmp_path: Path):
    engine = LmdbEngine(tmp_path, 10**7)
    store = ColdStateStore(engine, MODELS, SALT)
    store.put(record(ANN, 200))
    store.put(record(BOB, 200))
    assert b"ann-7" in (tmp_path / "cold.lmdb").read_bytes()
    store.drop(ANN)
    assert engine.needs_compaction
    engine.compact()
    assert not any(b"ann-" in file.read_bytes() for file in tmp_path.iterdir())
    assert same(store.get(BOB, "f"), record(BOB, 200))
    engine.close()
    again = ColdStateStore(LmdbEngine(tmp_path, 10**7), MODELS, SALT)
    assert same(again.get(BOB, "f"), record(BOB, 200))
    again.close()


def left_of(directory: Path, what: bytes) -> list[str]:
    """Return the files that hold these bytes."""
    return [file.name for file in directory.iterdir() if what in file.read_bytes()]


def test_lmdb_leaves_nothing_of_a_removed_record_in_the_pages_of_others(tmp_path: Path, seed: int):
    """Parts of all sizes, from some bytes in a shared page to several pages of their own."""
    draw = random.Random(seed)
    for turn in range(20):
        (tmp_path / str(turn)).mkdir()
        engine = LmdbEngine(tmp_path / str(turn), 10**7)
        kept: dict[bytes, dict[bytes, bytes]] = {}
        for _ in range(30):
            key, doomed = draw.randbytes(24), draw.random() < 0.3
            text = (b"doomed-" if doomed else b"keeper-") * 1000
            parts = {
                draw.randbytes(4): text[: draw.choice([20, 400, 3000, 4070, 6000])] for _ in range(draw.randint(1, 4))
            }
            engine.write(b"doom" + key[4:] if doomed else b"keep" + key[4:], parts, [])
            if not doomed:
                kept[b"keep" + key[4:]] = parts
        engine.remove(b"doom")
        engine.purge()
        assert not left_of(tmp_path / str(turn), b"doomed-")
        assert {key: engine.read(key) for key in engine.record_keys()} == kept
        assert engine.num_records() == len(kept)
        engine.close()


def test_lmdb_leaves_nothing_of_a_record_that_made_room_for_others(tmp_path: Path):
    engine = LmdbEngine(tmp_path, 10**6)
    engine.write(b"doom" * 6, {b"part": b"doomed-" * 10_000}, [])
    for number in range(1000):
        engine.write(b"keep%020d" % number, {b"part": b"keeper-" * 100}, [])
        if not engine.read(b"doom" * 6):
            break
    assert engine.evictions == 1
    assert left_of(tmp_path, b"doomed-")
    engine.remove(b"doom")
    engine.purge()
    assert not left_of(tmp_path, b"doomed-")
    engine.close()


def test_what_a_crash_left_of_a_deleted_user_goes_though_no_record_tells_of_it(tmp_path: Path):
    """A process ends between the pages of a write and its commit, and a user is deleted before that, or after."""
    for is_known in (True, False):
        ColdStateStore(LmdbEngine(tmp_path, 10**7), MODELS, SALT).close()
        with (tmp_path / "cold.lmdb").open("ab") as file:
            file.write(b"doomed-" * 10_000)
        (tmp_path / "cold.unclosed").write_bytes(b"x")
        store = ColdStateStore(LmdbEngine(tmp_path, 10**7), MODELS, SALT)
        if is_known:
            store.owe([ANN.key(SALT)])
        else:
            assert store.purge()
            assert left_of(tmp_path, b"doomed-"), "nobody was deleted"
            store.close()
            store = ColdStateStore(LmdbEngine(tmp_path, 10**7), MODELS, SALT)
            store.drop(ANN)
        assert store.purge()
        assert not left_of(tmp_path, b"doomed-")
        store.close()


def test_a_file_that_is_no_lmdb_is_started_anew(tmp_path: Path):
    (tmp_path / "cold.lmdb").write_bytes(b"not a database" * 1000)
    store = ColdStateStore(LmdbEngine(tmp_path, 10**6), MODELS, SALT)
    store.put(record())
    assert same(store.get(ANN, "f"), record())
    store.close()


def test_a_file_that_several_processes_did_not_live_to_close_is_started_anew(tmp_path: Path):
    for turn in range(MOST_UNCLOSED):
        store = ColdStateStore(LmdbEngine(tmp_path, 10**6), MODELS, SALT)
        if turn == 0:
            store.put(record())
        assert store.get(ANN, "f") is not None
        store._engine._env.close()  # type: ignore[attr-defined] # the process ends here
    store = ColdStateStore(LmdbEngine(tmp_path, 10**6), MODELS, SALT)
    assert store.get(ANN, "f") is None
    store.put(record())
    store.close()
    for _ in range(2 * MOST_UNCLOSED):
        store = ColdStateStore(LmdbEngine(tmp_path, 10**6), MODELS, SALT)
        assert store.get(ANN, "f") is not None
        store.close()


def test_a_server_that_is_gone_is_a_quick_miss(caplog: pytest.LogCaptureFixture):
    with held_port() as port:
        engine = RedisEngine(f"redis://127.0.0.1:{port}/0", retry_after=3600)
        store = ColdStateStore(engine, MODELS, SALT)
        assert store.get(ANN, "f") is None
        store.put(record())
        store.drop(ANN)
        assert store.misses["unavailable"] == 1
        with pytest.raises(EngineError, match="failed a moment ago"):
            engine.read(b"k" * 24)
        told = [message for message in caplog.messages if message.startswith("cold store: cannot be")]
        assert len(told) == 1  # of the first alone
        store.close()


@pytest.mark.parametrize(
    "answer",
    [
        None,  # never
        b"",  # closed
        b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n*2\r\n$0\r\n\r\n$900\r\nhalf",  # closed half way
        b"+OK\r\n" * 9,
        b"$-1\r\n" * 9,
        b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n:7\r\n:1\r\n" * 3,
        b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n*2\r\n$0\r\n\r\n$4\r\nnone\r\n:1\r\n" * 3,
        b"-LOADING Redis is loading the dataset in memory\r\n" * 9,
        b"\x00\xff garbage \r\n" * 9,
    ],
)
def test_a_server_that_hangs_or_answers_nonsense_is_a_miss(answer: bytes | None):
    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            held.append(connection)
            if answer is not None:
                with contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(answer)
                connection.close()

    held: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve)
    thread.start()
    store = ColdStateStore(RedisEngine(f"redis://127.0.0.1:{server.getsockname()[1]}/0", retry_after=0), MODELS, SALT)
    assert store.get(ANN, "f") is None
    store.put(record())
    store.drop(ANN)
    store.retire("f")
    assert (len(store), store.nbytes) == (0, 0)
    assert not store.purge()
    assert store.misses["unavailable"] + store.misses["damaged"] == 1
    store.close()
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    for connection in held:
        connection.close()
