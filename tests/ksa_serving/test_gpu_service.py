"""`ksa serve --set device=cuda` over HTTP: it answers what a service on the CPU answers, also after kill -9."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from recsys_ksa.testing import random_run

NUM_ITEMS = 300
T0 = 1_600_000_000
SHAPE = ["dim=64", "num_heads=2", "num_kv_heads=2", "head_dim=32", "feed_forward_dim=128", "chunk_size=8",
         "window_chunks=4", 'layers=["summary","summary","summary"]']  # fmt: skip


@contextlib.contextmanager
def serving(run: Path, state_dir: Path, device: str) -> Iterator[httpx.Client]:
    """A service in a process of its own; killed at last."""
    code = "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(run), "--port", "0", "--state-dir", str(state_dir)]
    command += ["--set", f"device={device}", "--set", "state_bytes=30000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: "), line
        with httpx.Client(base_url=line.split()[1], timeout=60) as client:
            yield client
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def drawn_call(draw: random.Random, now: int, number: int) -> tuple[str, str, dict[str, Any] | None]:
    """Return a call that changes a user: events in order or late, a correction, or the user's end."""
    user = f"/v1/users/u{draw.randrange(12)}"
    if draw.random() < 0.02:
        return "DELETE", user, None
    count = draw.choice([1, 1, 1, 3, 20, 200])
    times = sorted(now - draw.randrange(50_000 if draw.random() < 0.15 else 60) for _ in range(count))
    events = [
        {"item_id": f"i{draw.randrange(1, NUM_ITEMS + 20)}", "timestamp": time, "event_id": f"{number:04}-{n:03}"}
        for n, time in enumerate(times)
    ]
    return "POST", f"{user}/events", {"events": events}


def same_answers(clients: list[httpx.Client], user: int, now: int, draw: random.Random) -> None:
    """Score, recommend and explain: equal to what float32 on two kinds of processor can differ by."""
    items, exclude = [f"i{n}" for n in draw.sample(range(1, NUM_ITEMS + 1), 60)], draw.random() < 0.5

    def ask(verb: str, **fields: Any) -> list[Any]:
        answers = [client.post(f"/v1/users/u{user}/{verb}", json={"request_time": now, **fields}) for client in clients]
        return [answer.raise_for_status().json() for answer in answers]

    scored = [[one["score"] for one in answer["scores"]] for answer in ask("score", item_ids=items)]
    np.testing.assert_allclose(*scored, rtol=1e-4, atol=1e-4)
    recommended = ask("recommend", k=20, exclude_seen=exclude)
    assert recommended[0]["num_events"] == recommended[1]["num_events"]
    held = [answer["state_source"] for answer in ask("recommend", k=1)]  # just asked, so nothing is left to compute
    assert held == (["host", "gpu"] if recommended[0]["num_events"] else ["none", "none"])
    best = [[one["score"] for one in answer["items"]] for answer in recommended]
    np.testing.assert_allclose(*best, rtol=1e-4, atol=1e-4)
    if recommended[0]["num_events"]:
        told = [[answer["score"], answer["summary_attention"]] for answer in ask("explain", item_id=items[0])]
        np.testing.assert_allclose(*told, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_answers_what_a_cpu_answers(tmp_path: Path, seed: int):
    draw, now = random.Random(seed), T0
    run = random_run(tmp_path / "run", NUM_ITEMS, [f"model.{one}" for one in SHAPE])
    for turn in range(2):  # the second finds what the first had acknowledged when it was killed
        with serving(run, tmp_path / "cpu", "cpu") as cpu, serving(run, tmp_path / "gpu", "cuda") as gpu:
            for user in range(12):
                same_answers([cpu, gpu], user, now, draw)
            for step in range(150):
                now += draw.randrange(600)
                method, path, body = drawn_call(draw, now, 1000 * turn + step)
                told = [client.request(method, path, json=body) for client in (cpu, gpu)]
                assert {answer.status_code for answer in told} <= {200, 202, 204}, [answer.text for answer in told]
                if step % 3 == 0:
                    same_answers([cpu, gpu], draw.randrange(12), now, draw)
