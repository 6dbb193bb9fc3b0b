import argparse
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from ksa_serving.command import check_host, configure, listen, prepare_state_dir, run, verb
from ksa_serving.errors import EventLogError
from ksa_serving.event_log import EventLog
from recsys_ksa.cli import load_verb, main
from recsys_ksa.errors import UsageError


def test_the_verb_is_installed_with_an_example():
    assert load_verb("serve") is not None
    assert verb.example.startswith("ksa serve ")
    parser = argparse.ArgumentParser()
    configure(parser)
    args = parser.parse_args(["runs/demo", "--port", "8000", "--state-dir", "state"])
    assert (args.host, args.insecure_no_auth) == ("127.0.0.1", False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", ""])
def test_beyond_loopback_is_refused_without_the_flag(host: str):
    with pytest.raises(UsageError, match="--insecure-no-auth"):
        check_host(host, insecure_no_auth=False)
    check_host(host, insecure_no_auth=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_flag(host: str):
    check_host(host, insecure_no_auth=False)


def test_a_port_that_is_taken_or_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port), "--state-dir", str(tmp_path / "s")]) == 2
    with pytest.raises(UsageError, match="Choose another"):
        listen("127.0.0.1", 70_000)
    message = capsys.readouterr().err
    assert f"127.0.0.1 port {port}" in message
    assert len(message.splitlines()) == 1


def test_a_run_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", str(tmp_path / "nope"), "--port", "0", "--state-dir", str(tmp_path / "s")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("RunError: ")
    assert len(message.splitlines()) == 1


def test_the_state_directory_is_made_for_its_owner_alone(tmp_path: Path):
    made = prepare_state_dir(tmp_path / "new" / "state")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    tightened = prepare_state_dir(tmp_path / "open")
    assert stat.S_IMODE(tightened.stat().st_mode) == 0o700


def test_a_state_directory_that_is_a_link_or_file_is_refused(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(UsageError, match="expected a directory"):
            prepare_state_dir(tmp_path / name)


def test_a_state_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UsageError, match="another user's"):
        prepare_state_dir(tmp_path)


def test_a_state_directory_in_use_is_refused(tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the verb sets thread variables for its own process
    log = EventLog(tmp_path, "arrival")
    parser = argparse.ArgumentParser()
    configure(parser)
    args = parser.parse_args([str(tiny_run), "--port", "0", "--state-dir", str(tmp_path)])
    before = set(threading.enumerate())
    with pytest.raises(EventLogError, match="another process serves from it"):
        run(args)
    assert set(threading.enumerate()) <= before
    log.close()
