"""`ksa replay`: rebuild every state from the event log and compare with what the cold store leads to."""

import argparse
from pathlib import Path

from recsys_ksa.cli import Verb
from recsys_ksa.errors import StateError, UsageError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run that was served")
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="of the stopped service")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, as given to `ksa serve`"
    )
    parser.add_argument("--store", default="lmdb", metavar="lmdb|URL", help="as given to `ksa serve`")


def _run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    if not (args.state_dir / "events.sqlite").is_file():
        raise UsageError(f"--state-dir: expected a stopped service's directory, found none at {args.state_dir}.")
    from ksa_serving.command import open_store, prepare_state_dir
    from ksa_serving.event_log import EventLog
    from ksa_serving.memory_store import MemoryStateStore
    from ksa_serving.release import load_release
    from ksa_serving.settings import ServeSettings
    from ksa_serving.user_states import UserStates
    from recsys_ksa.config import load_config

    settings = load_config(ServeSettings, None, args.set)
    release = load_release(args.run, cold_parity=settings.cold_parity)
    tolerance = {"exact": settings.audit_tolerance, "int8": settings.audit_tolerance_int8}
    log = EventLog(prepare_state_dir(args.state_dir), release.tie)
    models = {release.state_fingerprint: release.model}
    store = open_store(args.store, args.state_dir, models, log, settings)
    stored = UserStates(release, log, store, settings.rebuild_step_events)
    fresh = UserStates(release, log, MemoryStateStore(1), settings.rebuild_step_events)
    found, different, worst = 0, 0, 0.0
    try:
        log.check()
        for owner in tqdm(log.owners(), unit=" users"):
            if stored.held(owner) is None:
                continue
            found += 1
            record = stored.current(owner)[0]
            difference = release.model.difference(record.state, fresh.current(owner)[0].state)
            worst = max(worst, difference)
            different += difference > tolerance[record.parity]
        users, events = log.counts()
    finally:
        store.close()
        log.close()
    print(f"{events} events of {users} users; {found} states stored, largest difference {worst:.1e}")
    if different:
        raise StateError(
            f"{different} stored states differ from their log by more than rounding. Remove the cold store: it is "
            "rebuilt from the log."
        )


verb = Verb(
    summary="rebuild every state from the event log and compare with the stored ones",
    example="ksa replay runs/demo --state-dir state/",
    configure=_configure,
    run=_run,
)
