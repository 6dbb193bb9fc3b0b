"""Tomorrow, as an operator lives it: new events and items reach data set, run, index and a service that goes on."""

import signal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from served_runs import served

from recsys_ksa import Recommender
from recsys_ksa.cli import call_verb
from recsys_ksa.testing import lifelong_log

NOW = 1_700_000_000


def ksa(verb: str, *arguments: object) -> None:
    call_verb(verb, [str(each) for each in arguments])


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(client: httpx.Client, user: str, rec: Recommender, items: list[str]) -> str:
    """Ask for a user's next items, compare with the library, and return where the state came from."""
    answer = post(client, f"/v1/users/{user}/recommend", k=8, request_time=NOW)
    state = rec.append(rec.new_state(), items, range(NOW - len(items), NOW))
    scores = dict(rec.recommend(state, 10_000, NOW))
    answered = {item["item_id"]: item["score"] for item in answer["items"]}
    assert len(answered) == 8
    np.testing.assert_allclose(list(answered.values()), list(scores.values())[:8], rtol=1e-4, atol=1e-5)
    # Whose scores differ by less than rounding may trade places.
    np.testing.assert_allclose([scores[item] for item in answered], list(answered.values()), rtol=1e-4, atol=1e-5)
    return answer["state_source"]


@pytest.mark.service
def test_new_items_are_recommended_the_next_day_and_states_stay(tmp_path: Path, seed: int):
    log = lifelong_log(seed, users=40, items=300, median_length=30)
    today = pc.greater(log["timestamp"], int(np.quantile(log["timestamp"].to_numpy(), 0.4)))
    pq.write_table(log.filter(pc.invert(today)), tmp_path / "yesterday.parquet")
    pq.write_table(log.filter(today), tmp_path / "today.parquet")
    data, run, releases = tmp_path / "data", tmp_path / "run", tmp_path / "releases"
    ksa("prepare", tmp_path / "yesterday.parquet", "--out", data, "--tie", "arrival")
    smoke = Path(__file__).parents[2] / "configs" / "smoke.toml"
    ksa("train", smoke, "--data", data, "--out", run, "--steps", 2, "--set", "model.own_item_bias=true")
    ksa("index", run, "--export", releases / "yesterday")
    ksa("append-log", data, tmp_path / "today.parquet")
    ksa("add-items", run, "--data", data, "--out", tmp_path / "more")
    ksa("index", tmp_path / "more", "--export", releases / "today")

    old, new = (Recommender.load(releases / name) for name in ("yesterday", "today"))
    known = [item for item in old.run.items.item_id if item][:5]
    fresh = next(item for item in new.run.items.item_id if item and item not in old.run.items.index_of)
    histories = {"ann": known * 8, "bob": [*known, fresh] * 8}
    options = ["--state-dir", tmp_path / "state", "--releases", releases]
    with (
        served(releases / "yesterday", *options, "--admin-port", 0, end=signal.SIGKILL) as (url, admin),
        httpx.Client(base_url=url, timeout=300) as client,
        httpx.Client(base_url=admin, timeout=300) as operator,
    ):
        for user, items in histories.items():
            events = [{"item_id": item, "timestamp": NOW - len(items) + at} for at, item in enumerate(items)]
            post(client, f"/v1/users/{user}/events", events=events)
            assert ask(client, user, old, items) == "rebuilt"
            assert ask(client, user, old, items) == "host"
        post(operator, "/admin/load", run="today")
        post(operator, "/admin/activate", run="today")
        assert ask(client, "ann", new, histories["ann"]) == "host"
        again = post(client, "/v1/users/bob/recommend", k=10, list="again", request_time=NOW)
        assert again["state_source"] == "rebuilt"  # met the item before the model knew it
        assert {item["item_id"] for item in again["items"]} == {*known, fresh}
    with (
        served(releases / "today", *options, "--admin-port", 0) as (url, _),
        httpx.Client(base_url=url, timeout=300) as client,
    ):
        for user, items in histories.items():
            ask(client, user, new, items)
