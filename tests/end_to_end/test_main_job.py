"""The whole way, as a user walks it: `ksa demo` on a log of one's own, then the service over HTTP."""

import json
import subprocess
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from served_runs import ENVIRONMENT, KSA, served

from recsys_ksa import Recommender
from recsys_ksa.testing import lifelong_log


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `ksa demo --data LOG` leaves."""
    folder = tmp_path_factory.mktemp("demo")
    log = lifelong_log(3, users=80, items=120, median_length=60, days=300)
    pq.write_table(log, folder / "log.parquet")
    done = subprocess.run(
        [*KSA, "demo", "--data", str(folder / "log.parquet"), "--out", str(folder / "out"), "--steps", "20"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    return folder


def test_the_demo_shows_what_it_promises(demo: Path) -> None:
    shown = (demo / "stdout").read_text(encoding="utf-8")
    for promise in ("ndcg@10", "popularity-7d", "again", "new for you", "one event", "mlflow ui", "ksa serve"):
        assert promise in shown.lower()
    rows = json.loads((demo / "out" / "rows.json").read_text(encoding="utf-8"))
    models = {row["model"] for row in rows}
    assert {"ksa", "full", "window", "truncated", "popularity", "personal-frequency", "item-item"} <= models
    assert {"ksa-minus-full", "ksa-minus-personal-frequency"} <= models
    assert {row["request_time"] for row in rows if row["model"] == "ksa"} == {"target", "drawn", "none"}
    bits = ("novelty@10", "popularity-bias@10")  # of no upper bound
    shares = [row["value"] for row in rows if "minus" not in row["model"] and row["metric"] not in bits]
    assert all(0 <= value <= 1 for value in shares)


@pytest.mark.service
def test_the_service_answers_as_the_library_does(demo: Path, tmp_path: Path) -> None:
    run = demo / "out" / "ksa"
    with served(run, "--state-dir", tmp_path / "state") as (url,):
        rec = Recommender.load(run)
        known = [item for item in rec.run.items.item_id if item][:6]
        events = [{"item_id": item, "timestamp": 1_600_000_000 + 900 * at} for at, item in enumerate(known)]
        now = 1_600_100_000
        with httpx.Client(base_url=url, timeout=300) as client:
            done = client.post("/v1/users/anna/events", json={"events": events}).json()
            assert [result["status"] for result in done["results"]] == ["accepted"] * len(events)
            answer = client.post("/v1/users/anna/recommend", json={"k": 5, "request_time": now}).json()
        state = rec.append(rec.new_state(), known, [event["timestamp"] for event in events])
        expected = rec.recommend(state, 5, now)
        assert [item["item_id"] for item in answer["items"]] == [item for item, _ in expected]
        assert answer["num_events"] == len(events)
