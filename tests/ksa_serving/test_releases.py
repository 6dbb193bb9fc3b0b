"""Releases come and go under load: no answer mixes two, none is lost, and what cannot be served is refused."""

import asyncio
import hashlib
import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ksa_serving import release_calls, state_plan, user_states, workers
from ksa_serving.errors import ReleaseError
from ksa_serving.event_log import EventLog
from ksa_serving.events import StoredEvent
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.messages import EventMessage, EventsRequest, RecommendRequest, WarmingInfo
from ksa_serving.models import Question
from ksa_serving.release import Release, load_release
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import ToyModel, toy_release
from recsys_ksa.bundle import write_manifest
from recsys_ksa.cli import call_verb
from recsys_ksa.errors import RunError

NOW = 1_700_000_000
NUM_SWAPS = int(os.environ.get("KSA_SWAPS", "30"))
"""100 with `make nightly`, 1,000 with FULL=1."""


class NamedToy(ToyModel):
    """A toy whose answers depend on its name, so that a mix of two would show."""

    def _scores(self, state: Any, request_time: int | None) -> dict[str, float]:
        name = hashlib.sha256(state.history_hash + self._fingerprint.encode()).digest()
        return super()._scores(replace(state, hashes=(*state.hashes, name)), request_time)


def release(name: str, **fields: Any) -> Release:
    made = toy_release(fingerprint=name)
    return replace(
        made,
        model=NamedToy(fingerprint=name),
        model_version=f"m-{name}",
        index_version=f"i-{name}",
        name=name,
        **fields,
    )


@pytest.fixture
def service(tmp_path: Path):
    """A service of release `a`, which can load `b` and `c`; `late` is of another tie."""
    for name in ("a", "b", "c", "late"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "state").mkdir()
    made = {name: release(name) for name in "abc"} | {"late": release("late", tie="hash")}
    log = EventLog(tmp_path / "state", "arrival")
    settings = ServeSettings(warm_users=50)
    store, runs = MemoryStateStore(10**7), tmp_path / "runs"
    yield Service(made["a"], log, store, settings, clock=lambda: NOW, releases=runs, load=lambda path: made[path.name])
    log.close()


def test_a_swap_storm_mixes_nothing_and_loses_nothing(service: Service):
    """Users ask and post while releases are activated and rolled back; each answer is that of the release it names."""

    async def story() -> None:
        sent = {f"u{n}": 0 for n in range(6)}
        answers: list[Any] = []
        stop = asyncio.Event()

        async def user(name: str) -> None:
            draw = random.Random(name)
            while not stop.is_set():
                n = sent[name]
                posted = await service.events.post(
                    name, EventsRequest([EventMessage(f"item-{n % 40}", 1000 + n, f"e{n}")])
                )
                assert posted.results[0].status == "accepted"
                sent[name] += 1
                answer = await service.questions.recommend(
                    name, RecommendRequest(k=3, request_time=draw.choice([None, 9999]))
                )
                answers.append((name, sent[name], answer))

        users = [asyncio.create_task(user(name)) for name in sent]
        until = time.monotonic() + 300
        for turn in count():
            versions = {answer.model_version for _, _, answer in answers}
            if turn >= NUM_SWAPS and len(versions) == 3:  # on a slow disk nobody may have met one of them so far
                break
            assert time.monotonic() < until
            name = "bca"[turn % 3]
            await service.operator.load(name)
            await service.operator.activate(name)
            if turn % 5 == 4:
                await service.operator.roll_back()
                await service.operator.roll_back()
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*users)
        assert {answer.model_version for _, _, answer in answers} == {"m-a", "m-b", "m-c"}
        for _, num_sent, answer in answers:
            served = answer.model_version[2:]
            assert answer.index_version == f"i-{served}"
            assert answer.num_events == num_sent
            model = NamedToy(fingerprint=served)
            events = [StoredEvent(n, f"item-{n % 40}", 1000 + n, f"e{n}", None, None) for n in range(num_sent)]
            state = model.append(model.new_state(), events)
            (expected,) = model.recommend([Question(state, 3, answer.request_time)])
            assert [(item.item_id, item.score) for item in answer.items] == expected
        await service.close()

    asyncio.run(story())


def test_two_fingerprints_live_until_the_older_is_gone(service: Service):
    async def story() -> None:
        await service.events.post("ann", EventsRequest([EventMessage("item-1", n, f"e{n}") for n in range(9)]))
        await service.questions.recommend("ann", RecommendRequest())
        await service.operator.load("b")
        assert [info.role for info in service.operator.list().releases] == ["active", "loaded"]
        await service.operator.activate("b")
        warmed = await service.questions.recommend("ann", RecommendRequest())
        assert (warmed.model_version, warmed.state_source) == ("m-b", "host")  # warmed before it was activated
        await service.operator.roll_back()
        back = await service.questions.recommend("ann", RecommendRequest())
        assert (back.model_version, back.state_source) == ("m-a", "host")  # the old state is still there
        await service.operator.roll_back()
        await service.operator.load("c")
        await service.operator.activate("c")  # a is neither active nor previous now
        assert {record.fingerprint for record in service.store.records()} == {"b", "c"}  # type: ignore[attr-defined]
        await service.close()

    asyncio.run(story())


def test_a_release_is_warmed_whole_and_with_rests(
    make_service: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also the state of a user too long for an answer to compute: after the activation nobody is answered degraded."""
    rests: list[float] = []
    monkeypatch.setattr(user_states, "RESTING_STEP_EVENTS", 10)
    monkeypatch.setattr(state_plan, "RESTING_READ_EVENTS", 50)
    monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=rests.append))
    service = make_service(release("a"), ServeSettings(inline_events=20, warm_share=0.2))
    service.releases.loaded["b"] = service.releases._prepare(release("b"))
    monkeypatch.setattr(service.releases, "load", lambda run: service.releases.loaded[run])

    async def story() -> None:
        for user, num in (("short", 5), ("long", 95)):
            await service.events.post(user, EventsRequest([EventMessage("item-1", n, f"e{n}") for n in range(num)]))
        for owner in service.log.owners():
            service.served.states.settle(owner)
        assert rests == []
        await service.operator.load("b")
        assert len(rests) == (1 + 1) + (2 + 10)  # one for each step, of reading and of appending
        await service.operator.activate("b")
        for user in ("short", "long"):
            answer = await service.questions.recommend(user, RecommendRequest())
            assert (answer.model_version, answer.state_source, answer.degraded) == ("m-b", "host", False)
        await service.close()

    asyncio.run(story())


def test_warming_ends_when_the_service_does(make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch):
    """In the midst of a long state: it would have rested for an hour."""
    monkeypatch.setattr(user_states, "RESTING_STEP_EVENTS", 10)
    service = make_service(release("a"))
    service.releases.loaded["b"] = service.releases._prepare(release("b"))
    monkeypatch.setattr(service.releases, "load", lambda run: service.releases.loaded[run])
    steps: list[float] = []

    def sleep(seconds: float) -> None:
        steps.append(seconds)
        service.workers.draining = len(steps) == 3

    monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=sleep))

    async def story() -> None:
        await service.events.post("ann", EventsRequest([EventMessage("item-1", n, f"e{n}") for n in range(95)]))
        for owner in service.log.owners():
            service.served.states.settle(owner)
        await service.operator.load("b")
        assert len(steps) == 3
        await service.close()

    asyncio.run(story())


def test_how_far_the_warming_is_can_be_asked_and_is_logged(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(user_states, "RESTING_STEP_EVENTS", 10)
    monkeypatch.setattr(release_calls, "TOLD_SECONDS", 0.0)
    service = make_service(release("a"))
    service.releases.loaded["b"] = service.releases._prepare(release("b"))
    monkeypatch.setattr(service.releases, "load", lambda run: service.releases.loaded[run])
    told: list[WarmingInfo | None] = []
    asked = SimpleNamespace(sleep=lambda seconds: told.append(service.operator.list().warming))
    monkeypatch.setattr(workers, "time", asked)
    caplog.set_level(logging.INFO, "ksa_serving")

    async def story() -> None:
        for user, num in (("ann", 5), ("bob", 25)):
            await service.events.post(user, EventsRequest([EventMessage("item-1", n, f"e{n}") for n in range(num)]))
        for owner in service.log.owners():
            service.served.states.settle(owner)
        assert (await service.operator.load("b")).warming is None
        await service.close()

    asyncio.run(story())
    assert all(told)
    assert {(one.run, one.to_warm) for one in told if one} == {("b", 2)}
    assert sorted({one.warmed for one in told if one}) == [0, 1]
    assert "release b: states of 1 of 2 users" in caplog.text


@pytest.mark.parametrize("name", ["nope", "", "..", "../runs/b", "b/", "/etc", "late"])
def test_what_cannot_take_its_place_is_refused_and_serving_goes_on(service: Service, name: str):
    async def story() -> None:
        with pytest.raises(ReleaseError):
            await service.operator.load(name)
        with pytest.raises(ReleaseError):
            await service.operator.activate("b")
        with pytest.raises(ReleaseError):
            await service.operator.roll_back()
        assert (await service.questions.recommend("ann", RecommendRequest())).model_version == "m-a"
        await service.close()

    asyncio.run(story())


def test_a_link_in_the_releases_folder_is_refused(service: Service, tmp_path: Path):
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "b")
    with pytest.raises(ReleaseError):
        service.releases.load("link")


@pytest.mark.service
def test_releases_over_http_on_the_admin_listener(tiny_run: Path, tmp_path: Path):
    import httpx

    from ksa_serving.app import create_app
    from ksa_serving.command import listen
    from ksa_serving.server import ReadyServer, server_config

    shutil.copytree(tiny_run, tmp_path / "runs" / "next")
    (tmp_path / "state").mkdir()
    first = load_release(tiny_run)
    log = EventLog(tmp_path / "state", first.tie)
    service = Service(first, log, MemoryStateStore(10**7), releases=tmp_path / "runs")
    listeners = [listen("127.0.0.1", 0), listen("127.0.0.1", 0)]
    ports = [listener.getsockname()[1] for listener in listeners]
    app = create_app(service, admin_port=ports[1])
    server = ReadyServer(server_config(app, service), service, "ready")
    thread = threading.Thread(target=server.run, kwargs={"sockets": listeners})
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    user, admin = (f"http://127.0.0.1:{port}" for port in ports)
    http = httpx.Client(timeout=120)
    assert http.post(f"{user}/admin/load", json={"run": "next"}).status_code == 404
    assert http.post(f"{admin}/v1/users/ann/recommend", json={}).status_code == 404
    refused = http.post(f"{admin}/admin/load", json={"run": "../next"})
    assert (refused.status_code, refused.json()["code"]) == (409, "release-refused")
    assert http.post(f"{admin}/admin/load", json={"run": "next"}).status_code == 200
    assert http.post(f"{admin}/admin/activate", json={"run": "next"}).status_code == 200
    names = [info["run"] for info in http.get(f"{admin}/admin/releases").json()["releases"]]
    assert names[0] == "next"
    assert http.post(f"{user}/v1/users/ann/recommend", json={}).status_code == 200
    assert http.post(f"{admin}/admin/rollback").status_code == 200
    assert http.get(f"{user}/readyz").status_code == 200
    assert http.post(f"{admin}/admin/drain").json()["draining"] is True
    assert http.get(f"{user}/readyz").status_code == 503
    assert http.post(f"{user}/v1/users/ann/recommend", json={}).status_code == 200
    http.close()
    server.should_exit = True
    thread.join()
    for listener in listeners:
        listener.close()


def test_a_run_is_served_by_the_approximate_index_in_it(tiny_run: Path, tmp_path: Path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    with pytest.raises(RunError, match="expected an approximate index, got no such file"):
        load_release(run, "ivf")
    call_verb("index", [str(run), "--kind", "ivf"])
    exact, approximate = load_release(run), load_release(run, "ivf")
    assert approximate.index_version != exact.index_version
    assert approximate.state_fingerprint == exact.state_fingerprint
    assert "IVF" in approximate.index_source
    assert exact.index_recall == 1.0
    assert approximate.index_recall >= 0.98


def test_a_release_whose_index_is_bad_or_missing_is_refused_and_serving_goes_on(tiny_run: Path, tmp_path: Path):
    """In a bundle whose files are as its manifest says: only the recall can tell, and tells before it is served."""
    (tmp_path / "state").mkdir()
    first = Path(shutil.copytree(tiny_run, tmp_path / "first"))
    call_verb("index", [str(first), "--kind", "ivf", "--export", str(tmp_path / "runs" / "good")])
    bad = Path(shutil.copytree(tmp_path / "runs" / "good", tmp_path / "runs" / "bad"))
    lists = load_file(bad / "index" / "ivf.safetensors")
    lists["centroids"] = lists["centroids"].clone()
    lists["list_index"] = torch.zeros_like(lists["list_index"])  # every item in a list that questions do not look into
    lists["centroids"] = torch.cat([-lists["centroids"].sum(0, keepdim=True), lists["centroids"]])
    save_file(lists, bad / "index" / "ivf.safetensors")
    record = json.loads((bad / "index" / "ivf.json").read_text())
    record |= {"lists_hash": hashlib.sha256((bad / "index" / "ivf.safetensors").read_bytes()).hexdigest(), "probes": 1}
    (bad / "index" / "ivf.json").write_text(json.dumps(record))
    write_manifest(bad, load_release(first).model_version)
    shutil.copytree(tiny_run, tmp_path / "runs" / "none")

    async def story() -> None:
        release = load_release(first, "ivf")
        log = EventLog(tmp_path / "state", release.tie)
        service = Service(
            release,
            log,
            MemoryStateStore(10**7),
            releases=tmp_path / "runs",
            load=lambda run: load_release(run, "ivf"),
        )
        for name, message in (("bad", r"release bad: .*recall@100 of at least 0\.98"), ("none", "ksa index")):
            with pytest.raises(ReleaseError, match=message):
                await service.operator.load(name)
        await service.operator.load("good")
        await service.operator.activate("good")
        answer = await service.questions.recommend("ann", RecommendRequest())
        assert answer.index_version == release.index_version
        assert f"ksa_index_recall {release.index_recall}" in service.metrics.text().decode()
        await service.close()
        log.close()

    asyncio.run(story())
