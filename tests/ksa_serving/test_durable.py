import os
from pathlib import Path

import pytest

from ksa_serving.command import prepare_state_dir


def test_the_names_of_new_folders_are_synced_before_events_are_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda opened: synced.append(os.fstat(opened).st_ino))
    state = prepare_state_dir(tmp_path / "new" / "state")
    assert synced == [folder.stat().st_ino for folder in (tmp_path / "new", tmp_path)]
    assert state.stat().st_mode & 0o777 == 0o700
    prepare_state_dir(state)
    assert len(synced) == 2
