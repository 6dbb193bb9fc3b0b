"""The service over the real library: what it answers is what the library answers."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ksa_serving.events import NewEvent, Owner
from ksa_serving.messages import EventMessage, EventsRequest, RecommendRequest
from ksa_serving.release import Release, load_release
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from recsys_ksa.cli import call_verb, main
from recsys_ksa.errors import RunError
from recsys_ksa.order import TieKind

TIES: list[TieKind] = ["arrival", "id", "hash"]
REPLAYED_EVENTS = int(os.environ.get("KSA_REPLAYED_EVENTS", "20000"))
"""Events of the log that `ksa replay` rebuilds; more with `make nightly`."""


@pytest.fixture(scope="module")
def release(tiny_run: Path) -> Release:
    return load_release(tiny_run)


def with_tie(release: Release, tie: TieKind) -> Release:
    """The same model under another order; the run's own says `arrival`."""
    from ksa_serving.library_model import LibraryModel
    from recsys_ksa import Recommender

    recommender: Any = release.model.recommender
    run = replace(recommender.run, info=recommender.run.info.model_copy(update={"tie": tie}))
    return replace(release, model=LibraryModel(Recommender(run, recommender.network, recommender.index)), tie=tie)


def history(seed: int, length: int) -> list[EventMessage]:
    draw = random.Random(seed)
    times = sorted(1_600_000_000 + draw.randrange(length * 40) // 100 * 100 for _ in range(length))
    return [
        EventMessage(f"i{draw.randrange(60)}", time, f"{n:04}", draw.choice(["view", "buy", "never seen", None]))
        for n, time in enumerate(times)
    ]


async def ask(service: Service, user_id: str, **fields: Any) -> Any:
    return await service.questions.recommend(user_id, msgspec.convert(fields, RecommendRequest))


def assert_same(answer: Any, expected: list[tuple[str, float]]) -> None:
    assert [item.item_id for item in answer.items] == [item_id for item_id, _ in expected]
    np.testing.assert_allclose([item.score for item in answer.items], [score for _, score in expected], rtol=1e-5)


@pytest.mark.parametrize("tie", TIES)
def test_online_equals_library_equals_rebuilt(release: Release, make_service: Callable[..., Service], tie: TieKind):
    release = with_tie(release, tie)
    events = history(5, 90)
    library = release.model.recommender
    state = library.append(
        library.new_state(),
        [event.item_id for event in events],
        [event.timestamp for event in events],
        [event.event_type for event in events],
        event_ids=[event.event_id for event in events],
    )
    at = events[-1].timestamp + 86_400
    expected = library.recommend(state, k=8, request_time=at)
    again = library.recommend(state, k=8, request_time=at, only_seen=True)

    async def story() -> None:
        service = make_service(release, ServeSettings(rebuild_step_events=37))
        draw = random.Random(1)
        place = 0
        while place < len(events):  # in pieces that sometimes overlap and sometimes come in another order
            size = draw.randint(1, 12)
            piece = events[max(0, place - 2) : place + size]
            if tie != "arrival":
                draw.shuffle(piece)
            await service.events.post("ann", EventsRequest(piece))
            if draw.random() < 0.5:
                await ask(service, "ann", k=1)
            place += size
        online = await ask(service, "ann", k=8, request_time=at)
        assert (online.num_events, online.state_source) == (90, "host")
        assert_same(online, expected)
        assert_same(await ask(service, "ann", k=8, request_time=at, list="again"), again)
        service.store.drop(Owner("ann"))
        rebuilt = await ask(service, "ann", k=8, request_time=at)
        assert rebuilt.state_source == "rebuilt"
        assert_same(rebuilt, expected)
        given_events = [msgspec.to_builtins(event) for event in events]
        assert_same(await ask(service, "eve", k=8, request_time=at, events=given_events), expected)
        half = await service.events.post("bob", EventsRequest(events[:45]))
        assert all(result.status == "accepted" for result in half.results)
        assert_same(await ask(service, "bob", k=8, request_time=at, events=given_events), expected)
        await service.close()

    asyncio.run(story())


def test_a_late_event_gives_the_history_in_order(release: Release, make_service: Callable[..., Service]):
    events = history(6, 40)
    library = release.model.recommender

    async def story() -> None:
        service = make_service(release)
        await service.events.post("ann", EventsRequest(events[:20] + events[21:]))
        await ask(service, "ann")
        late = await service.events.post("ann", EventsRequest([events[20]]))
        online = await ask(service, "ann", k=8, request_time=None)
        in_order = sorted(
            enumerate(events[:20] + events[21:] + [events[20]]), key=lambda pair: (pair[1].timestamp, pair[0])
        )
        state = library.append(
            library.new_state(),
            [event.item_id for _, event in in_order],
            [event.timestamp for _, event in in_order],
            [event.event_type for _, event in in_order],
        )
        assert late.results[0].status == "late-applied"
        assert_same(online, library.recommend(state, k=8))
        await service.close()

    asyncio.run(story())


def test_new_users_and_unknown_items_have_answers(release: Release, make_service: Callable[..., Service]):
    async def story() -> None:
        service = make_service(release)
        assert len((await ask(service, "new", k=5)).items) == 5
        assert (await ask(service, "new", k=5, list="again")).items == []
        unknown = EventMessage("no such item", 1_600_000_000)
        await service.events.post("ann", EventsRequest([unknown]))
        answer = await ask(service, "ann", k=1000)
        assert answer.num_events == 1
        assert "no such item" not in {item.item_id for item in answer.items}
        state = await service.questions.state("ann")
        assert state.nbytes > 0
        assert state.state_fingerprint == release.state_fingerprint
        await service.close()

    asyncio.run(story())


def test_answers_from_rounded_rows_say_so_until_the_state_is_computed_anew(tiny_run: Path, tmp_path: Path):
    from ksa_serving.command import open_store
    from ksa_serving.event_log import EventLog

    release = load_release(tiny_run, cold_parity="int8")
    settings = ServeSettings(spill_events=10, cold_parity="int8")
    log = EventLog(tmp_path, release.tie)
    models = {release.state_fingerprint: release.model}
    service = Service(release, log, open_store("lmdb", tmp_path, models, log, settings), settings, models=models)

    async def story() -> None:
        events = history(5, 155)
        await service.events.post("ann", EventsRequest(events[:150]))
        exact = await ask(service, "ann", k=20, request_time=None)
        assert (exact.state_parity, exact.state_source) == ("exact", "rebuilt")
        service.store.flush()
        service.store.memory.drop(Owner("ann"))  # type: ignore[attr-defined]
        rounded = await ask(service, "ann", k=20, request_time=None)
        assert (rounded.state_parity, rounded.state_source) == ("int8", "store")
        assert [item.score for item in rounded.items] != [item.score for item in exact.items]
        scores = {item.item_id: item.score for item in exact.items}
        assert max(abs(item.score - scores.get(item.item_id, item.score)) for item in rounded.items) < 0.5
        assert (await service.questions.state("ann")).state_parity == "int8"
        await service.events.post("ann", EventsRequest(events[150:]))
        assert (await ask(service, "ann")).state_parity == "int8"  # a state keeps what it was made from
        service.store.drop(Owner("ann"))
        assert (await ask(service, "ann")).state_parity == "exact"
        await service.close()

    asyncio.run(story())
    assert main(["replay", str(tiny_run), "--state-dir", str(tmp_path), "--set", "cold_parity=int8"]) == 0


def test_an_index_folder_changes_the_search_and_not_the_answer(release: Release, tiny_run: Path, tmp_path: Path):
    indexed = shutil.copytree(tiny_run, tmp_path / "run")
    call_verb("index", [str(indexed)])
    other = load_release(indexed)
    assert "FAISS" in other.index_source
    assert (other.model_version, other.index_version) == (release.model_version, release.index_version)
    answers = []
    for recommender in (release.model.recommender, other.model.recommender):
        state = recommender.append(recommender.new_state(), ["i1", "i2"], [1_600_000_000, 1_600_000_100])
        answers.append(recommender.recommend(state, k=10, request_time=1_600_000_200))
    assert [item_id for item_id, _ in answers[0]] == [item_id for item_id, _ in answers[1]]


def test_an_index_of_another_run_is_refused(tiny_run: Path, tmp_path: Path):
    indexed = shutil.copytree(tiny_run, tmp_path / "run")
    call_verb("index", [str(indexed)])
    manifest = indexed / "index" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "release_hash": "0" * 64}))
    with pytest.raises(RunError, match="index"):
        load_release(indexed)


def test_replaying_a_running_services_log_finds_what_it_stored_and_what_was_altered(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
):
    from ksa_serving.command import open_store
    from ksa_serving.event_log import EventLog

    release = load_release(tiny_run)
    settings = ServeSettings(spill_events=10)
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    log = EventLog(state_dir, release.tie)
    models = {release.state_fingerprint: release.model}
    store = open_store("lmdb", state_dir, models, log, settings)
    service = Service(release, log, store, settings, models=models)

    def replayed(*arguments: str) -> int:
        try:
            return main(["replay", str(tiny_run), "--state-dir", str(state_dir), *arguments])
        except SystemExit as end:
            return int(str(end.code))

    async def story() -> None:
        for n, user in enumerate(("ann", "bob", "cat")):
            events = history(n, 150)
            await service.events.post(user, EventsRequest(events[:100] + events[101:]))
            await ask(service, user, k=1)
            await service.events.post(user, EventsRequest([events[100]]))  # late
            await ask(service, user, k=1)
        service.store.flush()
        files = {path.name: path.stat().st_mtime_ns for path in state_dir.iterdir() if path.suffix == ".lmdb"}
        assert replayed("--out", str(tmp_path / "first")) == 0
        beside = ["replay", str(tiny_run), "--state-dir", str(state_dir), "--out", str(tmp_path / "second")]
        code = "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"
        subprocess.run([sys.executable, "-c", code, *beside], check=True)  # as an operator does, while it serves
        assert files == {name: (state_dir / name).stat().st_mtime_ns for name in files}
        assert "450 events of 3 users; 3 states stored" in capsys.readouterr().out
        assert replayed("--out", str(tmp_path / "first")) == 2  # it exists
        # A state that says it is the log's, and has another's rows or own items.
        cold, owner = store.cold, Owner("bob")  # type: ignore[attr-defined]
        record = service.served.states.held(owner)
        assert record is not None
        other = service.served.states.held(Owner("ann"))
        assert other is not None
        layers = other.state.memory.layers
        memory = replace(record.state.memory, layers=layers)
        rows = replace(record.state, memory=memory)
        items = replace(record.state, seen=other.state.seen)
        for kind, state in (("rows", rows), ("history", items)):
            cold.drop(owner)
            cold.put(replace(record, state=state))
            capsys.readouterr()
            assert replayed() == 1
            out = capsys.readouterr().out
            assert f"({kind}: 1)" in out
            assert owner.key(log.salt).hex() in out
            assert "bob" not in out
        await service.close()

    asyncio.run(story())
    digests = [(tmp_path / name / "digests.txt").read_text() for name in ("first", "second")]
    assert digests[0] == digests[1]  # of one build, bit by bit
    assert len(digests[0].splitlines()) == 3
    assert not list(tmp_path.glob(".replay-*"))
    again = EventLog(tmp_path / "first", release.tie)
    kept = open_store("lmdb", tmp_path / "first", models, again, settings)
    assert all(kept.get(Owner(user), release.state_fingerprint) is not None for user in ("ann", "bob", "cat"))
    kept.close()
    with again._connection as connection:  # an event that its hash does not name
        connection.execute("UPDATE events SET timestamp = timestamp + 1 WHERE rowid = (SELECT max(rowid) FROM events)")
    again.close()
    state_dir = tmp_path / "first"
    assert replayed() == 1
    assert "(log: 1)" in capsys.readouterr().out


def test_a_long_log_is_replayed_whole(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
):
    from ksa_serving.command import open_store
    from ksa_serving.event_log import EventLog
    from ksa_serving.user_states import UserStates

    release, settings = load_release(tiny_run), ServeSettings()
    log = EventLog(tmp_path, release.tie)
    store = open_store("lmdb", tmp_path, {release.state_fingerprint: release.model}, log, settings)
    states = UserStates(release, log, store)
    lengths = rng.multinomial(REPLAYED_EVENTS - 1000, rng.dirichlet(np.full(30, 0.5)))
    lengths[0] += 1000  # of one user at least a state is stored: those of the shortest are not
    for user, length in enumerate(lengths.tolist()):
        owner, times = Owner(f"u{user}"), 1_600_000_000 + rng.integers(0, 10**7, length)
        given = [NewEvent(f"i{rng.integers(60)}", int(time), f"{n:06}") for n, time in enumerate(times)]
        for cut in range(0, length, 1000):  # in no order: most of them late
            log.append(owner, given[cut : cut + 1000])
            if user % 5 == 0:
                states.current(owner)
    stored = sum(length > 0 for length in lengths[::5])
    store.close()
    log.close()
    assert main(["replay", str(tiny_run), "--state-dir", str(tmp_path), "--out", str(tmp_path / "new")]) == 0
    users = sum(lengths > 0)
    assert len((tmp_path / "new" / "digests.txt").read_text().splitlines()) == users
    told = capsys.readouterr().out
    assert f"{REPLAYED_EVENTS} events of {users} users" in told
    assert 0 < int(told.split("users; ")[1].split()[0]) <= stored


def test_a_bundle_is_served_only_as_it_was_exported(tiny_run: Path, tmp_path: Path):
    shutil.copytree(tiny_run, tmp_path / "run")
    call_verb("index", [str(tmp_path / "run"), "--export", str(tmp_path / "bundle")])
    assert load_release(tmp_path / "bundle").model_version == load_release(tiny_run).model_version
    with (tmp_path / "bundle" / "metrics.jsonl").open("a") as metrics:  # nothing else looks at this file
        metrics.write("{}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl: expected .* bytes with SHA-256"):
        load_release(tmp_path / "bundle")
