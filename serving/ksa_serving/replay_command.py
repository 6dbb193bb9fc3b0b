"""`ksa replay`: rebuild every state from the event log and compare with what the cold store leads to."""

import argparse
from pathlib import Path

from recsys_ksa.cli import Verb
from recsys_ksa.errors import StateError

TOLERANCE = 1e-5
"""Largest difference of a row, relative to its norm, in float32."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run that was served")
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="of the stopped service")
    parser.add_argument("--store", default="lmdb", metavar="lmdb|URL", help="as given to `ksa serve`")


def _run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ksa_serving.command import open_store, prepare_state_dir
    from ksa_serving.event_log import EventLog
    from ksa_serving.memory_store import MemoryStateStore
    from ksa_serving.release import load_release
    from ksa_serving.settings import ServeSettings
    from ksa_serving.user_states import UserStates

    release = load_release(args.run)
    settings = ServeSettings()
    log = EventLog(prepare_state_dir(args.state_dir), release.tie)
    models = {release.state_fingerprint: release.model}
    store = open_store(args.store, args.state_dir, models, log.salt, settings)
    stored = UserStates(release, log, store, settings.rebuild_step_events)
    fresh = UserStates(release, log, MemoryStateStore(1), settings.rebuild_step_events)
    found, different, worst = 0, 0, 0.0
    try:
        for owner in tqdm(log.owners(), unit=" users"):
            if stored.held(owner) is None:
                continue
            found += 1
            difference = release.model.difference(stored.current(owner)[0].state, fresh.current(owner)[0].state)
            worst = max(worst, difference)
            different += difference > TOLERANCE
        users, events = log.counts()
    finally:
        store.close()
        log.close()
    print(f"{events} events of {users} users; {found} states stored, largest difference {worst:.1e}")
    if different:
        raise StateError(
            f"{different} stored states differ from their log by more than {TOLERANCE}. Remove the cold store: it is "
            "rebuilt from the log."
        )


verb = Verb(
    summary="rebuild every state from the event log and compare with the stored ones",
    example="ksa replay runs/demo --state-dir state/",
    configure=_configure,
    run=_run,
)
