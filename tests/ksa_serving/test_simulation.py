"""A shard set in one thread, seeded: clients, processes, disks, cold stores, moves and releases, and everything fails.

Simulated are time, the order in which work happens, disks (torn and lost writes, faults, power cuts), the cold store's
engine, the network between client and process (lost replies, cancelled calls, old maps), ends of processes at any
write, and chance. Real are the event log on SQLite, group commit, states and stores, batches, moves and releases; the
model is the toy. Not simulated: HTTP and its framework, threads that interleave *within* a function, LMDB and Redis.

Each user's events come from one client, which sends a call again until it is answered. So at every answer, and at the
end, what the service knows of a user is what the list model knows: nothing lost, nothing twice.
"""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import apsw
import msgspec
import pytest
from faulty_disk import Disk, Fault, FaultyVfs, faulty_disks
from hand_driven import hand_driven_logs
from list_model import ListModel
from simulated import Life, SimulatedEngine, SimulatedLoop, SimulatedThread, Trace

from ksa_serving import log_writer, state_plan
from ksa_serving.cold_store import ColdStateStore
from ksa_serving.context import Context
from ksa_serving.errors import DeadlineError, EventLogError, NotOwnerError, OverloadedError, ShardError
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner, StoredEvent
from ksa_serving.messages import EventMessage, EventsRequest, ExportRequest, RecommendRequest, TallyRequest
from ksa_serving.models import Question
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.shard_mover import MapFiles, Mover
from ksa_serving.shard_rows import Page
from ksa_serving.shards import NUM_VIRTUAL_SHARDS, Edge, Ownership, Process, ShardMap, virtual_shard
from ksa_serving.testing import ToyModel, toy_release
from ksa_serving.tiered_store import TieredStateStore

T = TypeVar("T")
NUM_RUNS = int(os.environ.get("KSA_SIMULATIONS", "40"))
"""10^4 with `make nightly FULL=1`."""
NUM_LONG_RUNS, LONG = max(1, NUM_RUNS // 100), max(1, min(100, NUM_RUNS // 10))
"""100 with FULL=1, each as long as 100 others: some thousand faults."""
NOW = 1_700_000_000
USERS = [f"u{number}" for number in range(4)]
PASSING = (ConnectionError, EventLogError, OverloadedError, NotOwnerError, DeadlineError, asyncio.CancelledError)
"""After these a client sends again."""
FAULTS: tuple[Fault, ...] = ("write-error", "sync-error", "full", "read-only", "read-error")
EXPECTED = {"ends", "disk_fault", "disk_chance", "cold_store", "release", "move"}
EXPECTED |= {"host", "store", "rebuilt", "ConnectionError", "EventLogError", "NotOwnerError"}
"""What some run meets; the rarest, `NotOwnerError`, one in six: runs go on until they have."""
PATIENCE = 300.0
"""Simulated seconds in which a call has to succeed."""


class Killed(BaseException):
    """The mover ends here."""


class Files(MapFiles):
    """A mover's maps, kept in memory: they outlive movers. `seen` are those that the proxy was told, oldest first."""

    def __init__(self) -> None:
        self._held: ShardMap | None = None
        self._next: ShardMap | None = None
        self.seen: list[ShardMap] = []

    def held(self) -> ShardMap | None:
        return self._held

    def coming(self) -> ShardMap | None:
        return self._next

    def begin(self, coming: ShardMap) -> None:
        self._next = coming

    def hold(self, held: ShardMap) -> None:
        self._held, self._next = held, None

    def cancel(self) -> None:
        self._next = None

    def tell_proxy(self, held: ShardMap) -> None:
        if not self.seen or self.seen[-1] is not held:
            self.seen.append(held)


class SimulatedProcess:
    """One process: its disk and cold store outlive it."""

    def __init__(self, world: "World", name: str):
        self.name = name
        self.address = Process(f"{name}:1", f"{name}:2")
        self.service: Service | None = None
        self.life = Life()
        self.engine = SimulatedEngine(world.draw)
        self.usually = world.draw.choice([0.0, 0.05]), world.draw.choice([0.0, 0.1, 0.3])
        self.engine.fault_share, self.engine.lie_share = self.usually
        self._world = world
        self._lives = 0
        folder = world.folder / f"{name}-0"
        folder.mkdir()
        self.disk = world.vfs.mount(Disk(folder, world.draw))

    def start(self) -> None:
        """Open the log; where that fails, try again later."""
        self.life = Life()
        try:
            self.service = self.life.context.run(self._open)
        except (EventLogError, apsw.Error):
            self._world.loop.call_later(0.2, self.end, False)

    def _open(self) -> Service:
        world = self._world
        log = EventLog(self.disk.folder, world.tie, late_horizon=20, clock=lambda: NOW)
        log._connection.wal_autocheckpoint(world.draw.choice([2, 10, 100]))
        models: dict[str, Any] = {}
        cold = ColdStateStore(self.engine, models, log.salt)
        cold.owe(log.deleted())
        toy = ToyModel(world.tie)
        store = TieredStateStore(600, cold, lambda n: toy.replay_start(n) > 0, spill_events=4, largest_share=0.8)
        settings = ServeSettings(
            spill_events=4, inline_events=25, audit_share=0.2, catch_up_seconds=0.05, purge_after_seconds=0.1
        )
        release = toy_release(world.tie, fingerprint="one")
        load = lambda path: toy_release(world.tie, fingerprint=path.name)  # noqa: E731
        return Service(release, log, store, settings, lambda: NOW, models, world.folder / "releases", load)

    def end(self, power_cut: bool) -> None:
        """End the process wherever it is, and start the next."""
        self.life.end()
        self.disk.off = True
        self.count_faults()
        service, self.service = self.service, None
        if service is not None:
            self._world.met.update(service.store.misses)
            let_go(service.log)
        self._lives += 1
        folder = self._world.folder / f"{self.name}-{self._lives}"
        old, gone = self.disk, self.disk.folder
        self.disk = self._world.vfs.mount(old.cut_power(folder) if power_cut else old.crash(folder))
        if power_cut:
            self.engine.lose()
        self._world.trace(self.name, "ended", power_cut, old.trace.hexdigest())
        shutil.rmtree(gone)
        self._world.loop.call_later(self._world.draw.random() * 0.3, self.start)

    def count_faults(self) -> None:
        """Count what failed of the disk and of the cold store since the process started."""
        self._world.met["disk faults"] += self.disk.faults
        self._world.met["store faults"] += self.engine.faults
        self.disk.faults = self.engine.faults = 0

    async def call(self, work: Callable[[Service], Awaitable[T]], cancel_share: float = 0.0) -> T:
        """Return what the process answers to a call that goes through the network."""
        loop, draw = self._world.loop, self._world.draw
        await asyncio.sleep(draw.random() * 0.002)
        if self.service is None or draw.random() < self._world.lost_share:
            raise ConnectionError("nobody is there")
        life, reply = self.life, loop.create_future()
        life.replies[reply] = None
        task = loop.create_task(_awaited(work(self.service)), context=life.context)
        if draw.random() < cancel_share:
            loop.call_later(draw.random() * 0.006, task.cancel, context=life.context)
        task.add_done_callback(lambda done: _hand_over(done, reply), context=life.context)
        try:
            answer = await reply
        finally:
            life.replies.pop(reply, None)
        await asyncio.sleep(draw.random() * 0.002)
        if draw.random() < self._world.lost_share:
            raise ConnectionError("the reply was lost")
        return answer


def let_go(log: EventLog) -> None:
    """Close what a process that has ended had open."""
    log.writer._closed = True  # its steps end
    readers = [log._readers.get_nowait() for _ in range(log._readers.qsize())]
    for connection in (*readers, log._connection):
        with contextlib.suppress(apsw.Error):
            connection.close(force=True)
    log._lock_file.close()


async def _awaited(work: Awaitable[T]) -> T:
    return await work


def _hand_over(done: "asyncio.Task[Any]", reply: "asyncio.Future[Any]") -> None:
    if reply.done():
        return
    if done.cancelled():
        reply.set_exception(ConnectionError("cancelled"))
    elif (error := done.exception()) is not None:
        reply.set_exception(error)
    else:
        reply.set_result(done.result())


class World:
    """One run."""

    def __init__(self, folder: Path, vfs: FaultyVfs, loop: SimulatedLoop, draw: random.Random, length: int):
        self.length = length
        self.draw, self.folder, self.vfs, self.loop = draw, folder, vfs, loop
        self.tie: Any = draw.choice(["arrival", "id", "hash"])
        self.model = ListModel(self.tie)
        self.toy = ToyModel(self.tie, "one")
        self.trace = Trace()
        self.met = Counter[str]()
        self.lost_share = draw.choice([0.0, 0.02, 0.1])
        self.cancel_share = draw.choice([0.0, 0.05, 0.3])
        self.files = Files()
        self.calm = False
        self._number = 0
        for name in ("one", "two", "three"):
            (folder / "releases" / name).mkdir(parents=True)
        self.processes = {name: SimulatedProcess(self, name) for name in ("a", "b")}

    async def run(self) -> None:
        """Live through a story, heal, and compare."""
        for process in self.processes.values():
            process.start()
        trouble = self.loop.create_task(self.trouble())
        await asyncio.gather(*(self.client(user) for user in USERS))
        self.calm = True
        await trouble
        await self.heal()
        await asyncio.gather(*(self.ask(user) for user in USERS))
        self.compare()
        for process in self.processes.values():
            assert process.service is not None
            self.met.update(process.service.store.misses)
            process.count_faults()
            await process.service.close()
            self.trace(process.disk.trace.hexdigest())

    # -- clients ------------------------------------------------------------------------------------------------------

    async def client(self, user: str) -> None:
        """Send one user's calls, one after the other."""
        known: list[str] = []
        for _ in range(self.length * self.draw.randint(4, 20)):
            what = self.draw.random()
            if what < 0.45:
                await self.send(user, known, self.draw.choice([1, 2, 5, 40]))
            elif what < 0.55 and known:
                await self.retract(user, self.draw.choice(known))
            elif what < 0.65 and known:
                await self.correct(user, self.draw.choice(known))
            elif what < 0.70:
                await self.forget(user, known)
            else:
                await self.ask(user)
            await asyncio.sleep(self.draw.random() * 0.1)

    def event(self, event_id: str | None = None) -> NewEvent:
        self._number += 1
        late = self.draw.randrange(1000) if self.draw.random() < 0.2 else 1000 + self._number // 2
        event_id = event_id or self.draw.choice([None, f"e{self._number}"])
        return NewEvent(f"item-{self.draw.randrange(200)}", late, event_id, f"t{self._number}", None)

    async def send(self, user: str, known: list[str], most: int) -> None:
        events = [self.event() for _ in range(self.draw.randint(1, most))]
        again = [event for _, event in self.model.kept[Owner(user)] if self.draw.random() < 0.1]
        events += again
        wire = [EventMessage(e.item_id, e.timestamp, e.event_id, e.event_type, e.value) for e in events]
        answer = await self.until_answered(
            user, True, lambda service, context: service.events.post(user, EventsRequest(wire), context)
        )
        statuses = [result.status for result in answer.results]
        assert set(statuses) <= {"accepted", "duplicate", "late-applied", "late-queued"}, statuses
        assert set(statuses[len(events) - len(again) :]) <= {"duplicate"}
        for event in events:
            self.model.append(Owner(user), event)
        known += [event.event_id for event in events if event.event_id is not None]
        self.trace(user, statuses)

    async def retract(self, user: str, event_id: str) -> None:
        await self.until_answered(user, True, lambda service, context: service.events.retract(user, event_id, context))
        self.model.retract(Owner(user), event_id)

    async def correct(self, user: str, event_id: str) -> None:
        event = self.event(event_id)
        wire = EventMessage(event.item_id, event.timestamp, event_id, event.event_type, event.value)
        await self.until_answered(
            user, True, lambda service, context: service.events.correct(user, event_id, wire, context)
        )
        self.model.correct(Owner(user), event)

    async def forget(self, user: str, known: list[str]) -> None:
        await self.until_answered(user, True, lambda service, context: service.events.forget(user, context))
        self.model.forget(Owner(user))
        known.clear()

    async def ask(self, user: str) -> None:
        """Ask, and compare with what the list model leads to: no call about this user is under way."""
        request = RecommendRequest(k=2, request_time=None)
        answer = await self.until_answered(
            user, False, lambda service, context: service.questions.recommend(user, request, context)
        )
        self.trace(user, answer.state_source, answer.num_events)
        self.met[answer.state_source] += 1
        assert not answer.stale
        if not answer.degraded:
            state = self.expected(user)
            assert answer.num_events == state.num_events
            (scored,) = self.toy.recommend([Question(state, 2, None)])
            assert [(item.item_id, item.score) for item in answer.items] == scored

    def expected(self, user: str) -> Any:
        history = self.model.history(Owner(user))
        stored = [
            StoredEvent(n, e.item_id, e.timestamp, e.event_id, e.event_type, e.value) for n, e in enumerate(history)
        ]
        return self.toy.append(self.toy.new_state(), stored)

    async def until_answered(self, user: str, writing: bool, work: Callable[[Service, Context], Awaitable[T]]) -> T:
        """Send a call again until it is answered."""
        until = self.loop.time() + PATIENCE
        while True:
            process, edge = self.routed(user)

            def asked(service: Service, edge: Edge | None = edge) -> Awaitable[T]:
                return work(service, Context(ownership=service.log.ownership, writing=writing, edge=edge))

            try:
                return await process.call(asked, 0.0 if self.calm else self.cancel_share)
            except PASSING as error:
                last = repr(error)
                self.met[type(error).__name__] += 1
            assert self.loop.time() < until, f"no answer, the last was {last}"
            await asyncio.sleep(self.draw.random() * 0.1)

    def routed(self, user: str) -> tuple[SimulatedProcess, Edge | None]:
        """Return where the proxy sends a user's call; now and then by an old map."""
        seen = self.files.seen
        if not seen:
            return self.processes["a"], None
        chosen = seen[-2] if len(seen) > 1 and not self.calm and self.draw.random() < 0.1 else seen[-1]
        shard = virtual_shard(user)
        return self.processes[chosen.owners[shard]], Edge(shard, chosen.epoch)

    # -- trouble ------------------------------------------------------------------------------------------------------

    async def trouble(self) -> None:
        """Make things happen until the clients are done."""
        moves = self.draw.random() < 0.4
        kinds = [self.ends, self.ends, self.disk_fault, self.disk_chance, self.cold_store, self.release]
        while not self.calm:
            await asyncio.sleep(self.draw.random() * 0.2)
            kind = self.move if moves and self.draw.random() < 0.3 else self.draw.choice(kinds)
            process = self.draw.choice([self.processes[name] for name in sorted(self.processes)])
            self.trace(kind.__name__, process.name, round(self.loop.time(), 6))
            self.met[kind.__name__] += 1
            await kind(process)

    async def ends(self, process: SimulatedProcess) -> None:
        """The process ends at one of its next writes, or where it is."""
        power_cut, disk = self.draw.random() < 0.5, process.disk
        disk.cut_at = disk.operations + self.draw.randint(1, 60)
        for _ in range(50):
            if disk.off:
                break
            await asyncio.sleep(0.01)
        if process.disk is disk:
            process.end(power_cut)

    async def disk_fault(self, process: SimulatedProcess) -> None:
        disk, disk.fault = process.disk, self.draw.choice(FAULTS)
        await asyncio.sleep(self.draw.random() * 0.3)
        disk.fault = None

    async def disk_chance(self, process: SimulatedProcess) -> None:
        disk, disk.fault_share = process.disk, self.draw.random() * 0.1
        await asyncio.sleep(self.draw.random() * 0.3)
        disk.fault_share = 0.0

    async def cold_store(self, process: SimulatedProcess) -> None:
        engine = process.engine
        engine.fault_share, engine.lie_share = self.draw.choice([0.0, 0.3, 1.0]), self.draw.choice([0.0, 0.5])
        await asyncio.sleep(self.draw.random() * 0.3)
        engine.fault_share, engine.lie_share = process.usually

    async def release(self, process: SimulatedProcess) -> None:
        name = self.draw.choice(["one", "two", "three"])

        async def change(service: Service) -> None:
            if self.draw.random() < 0.3 and service.releases.previous is not None:
                await service.operator.roll_back()
            else:
                await service.operator.load(name)
                await service.operator.activate(name)

        with contextlib.suppress(*PASSING):
            await process.call(change)

    async def move(self, _: SimulatedProcess) -> None:
        """Users move between the processes; the mover may end at any step."""
        first = self.files.held() is None  # of whom the operator says that they have users
        wanted = self.draw.choice([["a"], ["a", "b"], ["a", "b"] if first else ["b"]])
        await self._moved(wanted, self.draw.randint(1, 40))

    async def _moved(self, names: list[str], last: float) -> bool:
        """Return whether a mover did what it was to do."""
        processes = {name: self.processes[name].address for name in names}
        done: asyncio.Future[bool] = self.loop.create_future()

        def go() -> None:  # no task: it waits for calls by running the loop from within
            try:
                SimulatedMover(self, last).move(processes, self.draw.choice([200, NUM_VIRTUAL_SHARDS]))
            except (Killed, ShardError) as error:
                self.trace("mover", type(error).__name__)
                done.set_result(False)
            else:
                done.set_result(True)

        self.loop.call_soon(go)
        return await done

    async def heal(self) -> None:
        """Everything works from now on; a move that was begun is finished."""
        self.lost_share = 0.0
        for process in self.processes.values():
            process.disk.fault, process.disk.fault_share, process.disk.cut_at = None, 0.0, None
            process.engine.fault_share = process.engine.lie_share = 0.0
        while any(process.service is None for process in self.processes.values()):
            await asyncio.sleep(0.1)
        if self.files.held() is not None:
            while not await self._moved(["a", "b"], float("inf")):
                await asyncio.sleep(0.1)

    def compare(self) -> None:
        """Find in the logs what the list model has, each user in one of them."""
        found: dict[str, list[NewEvent]] = {}
        for process in self.processes.values():
            assert process.service is not None
            log, states = process.service.log, process.service.served.states
            log.check()
            assert process.service.store.purge()
            assert not {key[:16] for key in process.engine.record_keys()} & log.deleted(), "deleted, and kept cold"
            for owner in log.owners():
                assert owner.user_id not in found, "in two processes"
                _, events = log.read(owner)
                found[owner.user_id] = [
                    NewEvent(e.item_id, e.timestamp, e.event_id, e.event_type, e.value) for e in events
                ]
                model = process.service.served.release.model
                record = states.settle(owner)
                assert record.state == model.append(model.new_state(), events)
                assert self.routed(owner.user_id)[0] is process
        expected = {user: self.model.history(Owner(user)) for user in USERS}
        assert found == {user: history for user, history in expected.items() if history}
        self.trace(sorted(found.items()))


class SimulatedMover(Mover):
    """Calls processes of a world; ends after so many calls.

    It runs the world while it waits, so it must not be called from within a task.
    """

    def __init__(self, world: World, last: float):
        super().__init__(world.files, None, lambda: None, patience=2.0)  # type: ignore[arg-type]
        self._world, self._last, self._calls = world, last, 0

    def _call(self, process: Process, method: str, path: str, body: bytes | None, kind: Any) -> Any:
        name, world = process.address.split(":")[0], self._world
        until = world.loop.time() + self._patience
        while True:
            self._calls += 1
            if self._calls > self._last:
                raise Killed
            task = world.loop.create_task(world.processes[name].call(lambda service: _operator(service, path, body)))
            while not task.done():
                world.loop._run_once()
            error = task.exception()
            if error is None:
                return task.result()
            if not isinstance(error, PASSING):
                raise error if isinstance(error, ShardError) else AssertionError(repr(error))
            if world.loop.time() > until:
                raise ShardError(f"{name}: expected an answer, got: {error!r}")
            waited = world.loop.create_task(asyncio.sleep(0.1))
            while not waited.done():
                world.loop._run_once()


async def _operator(service: Service, path: str, body: bytes | None) -> Any:
    """Answer as the listener for operators does."""
    calls, content = service.shards, body or b""
    if path == "":
        return await (calls.owned() if body is None else calls.own(msgspec.json.decode(content, type=Ownership)))
    if path == "/export":
        return await calls.export(msgspec.json.decode(content, type=ExportRequest))
    if path == "/import":
        return await calls.keep(msgspec.msgpack.decode(content, type=Page))
    if path == "/tally":
        return await calls.tally(msgspec.json.decode(content, type=TallyRequest).virtual_shards)
    assert path == "/release"
    return await calls.release()


@contextlib.contextmanager
def drawn(seed: int) -> Iterator[tuple[random.Random, SimulatedLoop, FaultyVfs]]:
    """Everything that is chance, time or a thread comes from the seed."""
    draw = random.Random(seed)
    loop = SimulatedLoop(draw)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        vfs = stack.enter_context(faulty_disks(draw))
        stack.enter_context(hand_driven_logs(draw))
        patch.setattr(time, "monotonic", loop.time)
        patch.setattr(secrets, "token_hex", lambda size: draw.randbytes(size).hex())
        patch.setattr(log_writer.threading, "Thread", SimulatedThread)
        random.seed(seed)
        asyncio.set_event_loop(loop)
        stack.callback(asyncio.set_event_loop, None)
        stack.callback(loop.close)
        yield draw, loop, vfs


def simulate(seed: int, folder: Path, length: int = 1) -> World:
    """Live through the run of a seed; a longer one has more of everything."""
    folder.mkdir()
    with drawn(seed) as (draw, loop, vfs):
        world = World(folder, vfs, loop, draw, length)
        try:
            loop.run_until_complete(world.run())
        finally:
            for process in world.processes.values():
                if process.service is not None:
                    let_go(process.service.log)
        shutil.rmtree(folder)
        return world


def test_whatever_happens_the_service_knows_what_it_acknowledged(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.CRITICAL)
    met = Counter[str]()
    expected = EXPECTED if NUM_RUNS >= 40 else set[str]()
    for number in range(seed, seed + 10 * NUM_RUNS):
        if number >= seed + NUM_RUNS and expected <= met.keys():
            break
        print(f"KSA_TEST_SEED={number} KSA_SIMULATIONS=1")  # the last one shown is the one that failed
        met += simulate(number, tmp_path / str(number)).met
    print(dict(met))
    assert expected <= met.keys()


def test_whatever_happens_for_long_it_still_does(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL)
    met = Counter[str]()
    for number in range(seed, seed + NUM_LONG_RUNS):
        print(f"KSA_TEST_SEED={number} KSA_SIMULATIONS={NUM_RUNS}")
        met += simulate(number, tmp_path / str(number), LONG).met
    print(dict(met))


def test_a_run_replays_from_its_seed(tmp_path: Path, seed: int):
    first, again = (simulate(seed, tmp_path / name, length=2).trace for name in ("first", "again"))
    assert first.length > 20
    assert first.hexdigest() == again.hexdigest()


def test_a_service_that_takes_late_events_for_new_ones_is_found_out(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """What the test above is worth; about every second run sees it."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(state_plan, "follow", lambda record, events, tie: True)
    with pytest.raises(AssertionError):  # noqa: PT012 - whichever it is
        for number in range(seed, seed + 400):
            simulate(number, tmp_path / str(number))
