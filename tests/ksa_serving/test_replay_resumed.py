"""`ksa replay --resume`: killed at any user, however often, it ends with what a replay that nobody stopped gives."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksa_serving.cold_store import ColdStateStore
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.lmdb_engine import MOST_UNCLOSED, LmdbEngine
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.release import Release, load_release
from ksa_serving.user_states import UserStates
from recsys_ksa.cli import main
from recsys_ksa.model.seen import SeenItems

NUM_USERS = 20
CUT = """
import os, signal, sys
from ksa_serving import replay_command
from recsys_ksa.cli import main

whole, journaled = replay_command.replay, int(sys.argv[1])

def cut(*given):
    for number, user in enumerate(whole(*given)):
        if number == journaled:
            os.kill(os.getpid(), signal.SIGKILL)
        yield user

replay_command.replay = cut
sys.exit(main(sys.argv[2:]))
"""
"""Ends a replay once a user's state is on the disk and before the journal knows it."""


@pytest.fixture(scope="module")
def release(tiny_run: Path) -> Release:
    return load_release(tiny_run)


def fill(release: Release, folder: Path, rng: np.random.Generator) -> None:
    """Keep users' events and some of their states; the first one's lacks its own items."""
    folder.mkdir()
    log = EventLog(folder, release.tie)
    store = ColdStateStore(LmdbEngine(folder, 1 << 26), {release.state_fingerprint: release.model}, log.salt)
    states = UserStates(release, log, MemoryStateStore(1 << 26))
    for user in range(NUM_USERS):
        owner, times = Owner(f"u{user}"), 1_600_000_000 + np.sort(rng.integers(0, 10**7, rng.integers(1, 60)))
        log.append(owner, [NewEvent(f"i{rng.integers(1, 50)}", int(time), f"{n:02}") for n, time in enumerate(times)])
        record = states.current(owner)[0]
        if user == 0:
            store.put(replace(record, state=replace(record.state, seen=SeenItems.empty())))
        elif user % 3 == 0:
            store.put(record)
    store.close()
    log.close()


def kept(release: Release, folder: Path) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Return each user's rebuilt state as bytes."""
    log = EventLog(folder, release.tie)
    store = ColdStateStore(LmdbEngine(folder, 1 << 26), {release.state_fingerprint: release.model}, log.salt)
    found: list[tuple[bytes, dict[bytes, bytes]]] = []
    for owner in log.owners():
        record = store.get(owner, release.state_fingerprint)
        assert record is not None
        parts = release.model.dump(record.state)
        found.append((parts.about, {name: parts.segments[name] for name in parts.segments}))
    store.close()
    log.close()
    return found


def test_a_replay_that_was_killed_goes_on_to_the_same_end(
    release: Release, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
):
    state, part = tmp_path / "state", tmp_path / "new.part"
    fill(release, state, rng)

    def replayed(*arguments: str, source: Path = state) -> tuple[int, str]:
        try:
            status = main(["replay", str(tiny_run), "--state-dir", str(source), *arguments])
        except SystemExit as end:
            status = int(str(end.code))
        told = capsys.readouterr()
        return status, told.out + told.err

    status, told = replayed("--out", str(tmp_path / "whole"))
    assert status == 1
    assert "(history: 1)" in told
    new, salted = ["--out", str(tmp_path / "new")], "0123456789abcdef"
    assert replayed("--resume")[0] == 2
    assert "is not there" in replayed(*new, "--resume")[1]
    status_nowhere, told_nowhere = replayed("--out", str(tmp_path / "nowhere" / "new"))
    assert status_nowhere == 2
    assert "No such file or directory" in told_nowhere
    cuts = [int(cut) for cut in rng.integers(0, 4, MOST_UNCLOSED + 2)]  # fewer than there are users
    for turn, cut in enumerate(cuts):
        command = ["replay", str(tiny_run), "--state-dir", str(state), *new, *["--resume"] * (turn > 0)]
        ended = subprocess.run([sys.executable, "-c", CUT, str(cut), *command], capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        journal = part / "replayed"
        assert len(journal.read_text().splitlines()) == sum(cuts[: turn + 1])
        with journal.open("a") as torn:
            torn.write(salted[: rng.integers(len(salted))])
        log = EventLog(state, release.tie)  # the service goes on; what is replayed is of one instant
        log.append(Owner(f"u{turn}"), [NewEvent("i1", 1_700_000_000 + turn)])
        log.close()
    assert "Add --resume" in replayed(*new)[1]
    assert "with other settings" in replayed(*new, "--resume", "--set", "cold_parity=int8")[1]
    fill(release, tmp_path / "other", rng)
    assert "another log" in replayed(*new, "--resume", source=tmp_path / "other")[1]
    assert not (tmp_path / "new").exists()
    assert replayed(*new, "--resume") == (status, told)
    assert (tmp_path / "new" / "digests.txt").read_bytes() == (tmp_path / "whole" / "digests.txt").read_bytes()
    assert kept(release, tmp_path / "new") == kept(release, tmp_path / "whole")
    assert not part.exists()


def test_a_replay_whose_rebuilt_states_are_gone_says_so(
    release: Release, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
):
    fill(release, tmp_path / "state", rng)
    command = ["replay", str(tiny_run), "--state-dir", str(tmp_path / "state"), "--out", str(tmp_path / "new")]
    ended = subprocess.run([sys.executable, "-c", CUT, "3", *command], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (tmp_path / "new.part" / "new" / "cold.lmdb").write_bytes(rng.bytes(1 << 14))
    assert main([*command, "--resume"]) == 2
    assert "has lost its states" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "new.part" / "old")
    (tmp_path / "new.part" / "origin").unlink()  # as where copying was cut off: all is begun anew
    with pytest.raises(SystemExit, match="1"):
        main([*command, "--resume"])
    assert len((tmp_path / "new" / "digests.txt").read_text().splitlines()) == NUM_USERS
