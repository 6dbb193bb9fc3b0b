"""A release with more items keeps everyone's state but of those who had met the items before it knew them."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from ksa_serving.command import open_store
from ksa_serving.event_log import EventLog
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.messages import EventMessage, EventsRequest, RecommendRequest
from ksa_serving.release import load_release
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import ToyModel, toy_release
from recsys_ksa.architectures import build_network
from recsys_ksa.model.fingerprint import release_hash
from recsys_ksa.recommender import Recommender
from recsys_ksa.run import open_run

USERS = {"at home": ["i1", "i2"], "waits": ["i1", "new-0", "i3"], "waits too": ["new-1"], "never": ["i1", "nobody's"]}


def with_more_items(run: Path, out: Path, num: int, seed: int) -> None:
    """Write a run that knows further items, `new-0` and so on; the rows of all others stay what they are."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "index", ignore_errors=True)
    info = json.loads((run / "run.json").read_text())
    items = pq.read_table(run / "items.parquet")
    added = items.slice(1, 1).to_pylist()[0]
    rows = [{**added, "item_id": f"new-{n}", "item_index": items.num_rows + n} for n in range(num)]
    pq.write_table(pa.concat_tables([items, pa.Table.from_pylist(rows, schema=items.schema)]), out / "items.parquet")
    draw = torch.Generator().manual_seed(seed)
    weights = load_file(run / "model.safetensors")
    for name, value in weights.items():
        if value.dim() and len(value) == items.num_rows:
            weights[name] = torch.cat([value, 0.1 * torch.randn(num, *value.shape[1:], generator=draw)])
    save_file(weights, out / "model.safetensors")
    info |= {"num_items": items.num_rows + num, "num_base_items": items.num_rows}
    (out / "run.json").write_text(json.dumps(info))
    found = open_run(out)
    network = build_network(found.config.model, found.features)
    network.load_state_dict(weights)
    (out / "run.json").write_text(json.dumps({**info, "release_hash": release_hash(network)}))


async def ask(service: Service, user: str) -> Any:
    return await service.questions.recommend(user, RecommendRequest(k=20, request_time=None))


def test_only_users_whose_unknown_items_became_known_are_rebuilt(tiny_run: Path, tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "state").mkdir()
    with_more_items(tiny_run, tmp_path / "runs" / "more", 2, seed=1)
    with_more_items(tiny_run, tmp_path / "runs" / "most", 5, seed=1)  # the same two, and further ones
    with_more_items(tiny_run, tmp_path / "runs" / "others", 2, seed=2)  # other rows under the same names
    first = load_release(tiny_run)
    log = EventLog(tmp_path / "state", first.tie)
    settings = ServeSettings(catch_up_seconds=3600)  # no state is built anew before someone asks
    service = Service(first, log, MemoryStateStore(10**8), settings, releases=tmp_path / "runs")
    library = {name: Recommender.load(tmp_path / "runs" / name) for name in ("more", "most", "others")}

    async def rebuilt_in(name: str | None, run: Recommender | None) -> set[str]:
        """Serve another release; return whose states it built anew, all answers being the library's."""
        if name is None:
            await service.operator.roll_back()
        else:
            await service.operator.load(name)
            await service.operator.activate(name)
        assert service.served.release.state_fingerprint == first.state_fingerprint
        before = service.served.states.rebuilds.copy()
        anew = set()
        for user, items in USERS.items():
            answer = await ask(service, user)
            if answer.state_source == "rebuilt":
                anew.add(user)
            if run is not None:
                state = run.append(run.new_state(), items * 20, list(range(1000, 1000 + 20 * len(items))))
                expected = run.recommend(state, 20, request_time=None)
                assert [item.item_id for item in answer.items] == [item_id for item_id, _ in expected]
                np.testing.assert_allclose([item.score for item in answer.items], [s for _, s in expected], rtol=1e-4)
            assert (await ask(service, user)).state_source == "host"
        causes = service.served.states.rebuilds - before
        assert causes == ({"known-items": len(anew)} if anew else {})
        return anew

    async def story() -> None:
        for user, items in USERS.items():
            events = [EventMessage(item, 1000 + n, f"e{n}") for n, item in enumerate(items * 20)]
            await service.events.post(user, EventsRequest(events))
            assert (await ask(service, user)).state_source == "rebuilt"
        assert await rebuilt_in("more", library["more"]) == {"waits", "waits too"}
        assert await rebuilt_in("most", library["most"]) == set()  # what was known stays what it is
        assert await rebuilt_in("others", library["others"]) == {"waits", "waits too"}
        assert await rebuilt_in(None, library["most"]) == {"waits", "waits too"}
        await service.close()

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
def test_cold_states_remember_which_items_were_known(tmp_path: Path, kind: str):
    """Three of nine users met what a later release knows: three cold states are built anew, once."""
    settings = ServeSettings(state_bytes=20_000, spill_events=8, cold_bytes=10**8)

    def service(num_items: int) -> Service:
        release = toy_release()
        object.__setattr__(release, "model", ToyModel(num_items=num_items))
        log = EventLog(tmp_path, "arrival")
        models: dict[str, Any] = {release.state_fingerprint: release.model}
        store = open_store(kind, tmp_path, models, log, settings)
        return Service(release, log, store, settings, models=models)

    def items(user: int) -> list[str]:
        return [f"item-{n}" for n in range(30)] + [["item-99"], ["item-150"], ["item-199"]][min(2, user // 3)]

    async def posted() -> None:
        one = service(num_items=100)
        for user in range(9):
            events = [EventMessage(item, 1000 + n, f"e{n}") for n, item in enumerate(items(user))]
            await one.events.post(f"u{user}", EventsRequest(events))
            await ask(one, f"u{user}")
        await one.close()

    async def asked(num_items: int) -> dict[str, int]:
        one = service(num_items)
        for user in range(9):
            await ask(one, f"u{user}")
            await ask(one, f"u{user}")
        rebuilds = dict(one.served.states.rebuilds)
        await one.close()
        return rebuilds

    asyncio.run(posted())
    cold = kind == "lmdb"
    assert asyncio.run(asked(180)) == ({"known-items": 3} if cold else {"absent": 9})
    assert asyncio.run(asked(180)) == ({} if cold else {"absent": 9})
    assert asyncio.run(asked(200)) == ({"known-items": 3} if cold else {"absent": 9})
