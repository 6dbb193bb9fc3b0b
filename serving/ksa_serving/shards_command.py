"""`ksa shards`: give each process of a service an equal share of the users, while they are served."""

import argparse
import os
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_ksa.cli import Verb
from recsys_ksa.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from ksa_serving.shards import Process


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["plan", "move", "cancel"], help="show, do, or undo what was begun")
    parser.add_argument("map", type=Path, metavar="MAP", help="the shard map, as shards.json; made if it is new")
    parser.add_argument(
        "--processes",
        type=Path,
        metavar="FILE",
        help='TOML: for each process a table [NAME] with address = "HOST:PORT" and admin = "HOST:PORT"',
    )
    parser.add_argument("--reload", default="", metavar="COMMAND", help="makes HAProxy read its files again")
    parser.add_argument(
        "--at-once", type=int, default=128, metavar="N", help="virtual shards of a step, of 1,024 (default %(default)s)"
    )
    parser.add_argument(
        "--token-variable", default="KSA_TOKEN", metavar="NAME", help="environment variable with the bearer token"
    )


def _run(args: argparse.Namespace) -> None:
    import httpx
    from tqdm import tqdm

    from ksa_serving.client import authorization
    from ksa_serving.shard_mover import MapFiles, Mover, planned
    from ksa_serving.shards import NUM_VIRTUAL_SHARDS, first_map

    if not 1 <= args.at_once <= NUM_VIRTUAL_SHARDS:
        raise UsageError(f"ksa shards: --at-once: expected 1 to {NUM_VIRTUAL_SHARDS}, got {args.at_once}.")
    try:
        files, reload = MapFiles(args.map), shlex.split(args.reload)
    except ValueError as error:
        raise UsageError(f"ksa shards: --reload: expected a command, got {args.reload!r}: {error}.") from error
    if not args.map.parent.is_dir():
        raise UsageError(f"ksa shards: {args.map}: expected a file in a folder that is there.")
    headers = authorization(os.environ.get(args.token_variable))
    if args.action == "cancel":
        with httpx.Client(headers=headers, timeout=120) as http:
            Mover(files, http, lambda: _reload(reload)).cancel()
        print("undone: every process owns what it owned before")
        return
    if args.processes is None:
        raise UsageError(f"ksa shards {args.action}: expected --processes FILE, got none.")
    processes = read_processes(args.processes)
    held = files.held()
    wanted = planned(held or first_map(processes), processes)
    moving = sum(old != new for old, new in zip(held.owners, wanted.owners)) if held else 0
    if args.action == "move":
        bar = tqdm(total=moving, unit=" virtual shards")
        with httpx.Client(headers=headers, timeout=120) as http, bar:
            mover = Mover(files, http, lambda: _reload(reload), on_step=bar.update)
            wanted = mover.move(processes, args.at_once)
    before, after = Counter(held.owners if held else []), Counter(wanted.owners)
    for name in sorted(before | after):
        print(f"{name}: {before[name]} -> {after[name]} of {NUM_VIRTUAL_SHARDS} virtual shards")
    print(f"{moving} {'moved' if args.action == 'move' else 'would move'}; epoch {wanted.epoch}")


def read_processes(file: Path) -> "dict[str, Process]":
    """Return where the processes are.

    Raises:
        ConfigError: the file cannot be read, or names none.
    """
    import msgspec

    from ksa_serving.shards import Process, ProcessName

    try:
        processes = msgspec.toml.decode(file.read_bytes(), type=dict[ProcessName, Process])
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file}: expected a table for each process, got: {error}.") from error
    if not processes:
        raise ConfigError(f"{file}: expected at least one process, got none.")
    return processes


def _reload(command: list[str]) -> None:
    """Run the command that makes the proxy read its files again.

    Raises:
        ShardError: it failed.
    """
    from ksa_serving.errors import ShardError

    try:
        subprocess.run(command or ["true"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ShardError(
            f"--reload: expected the proxy to read its files, got: {error}. Mend it, then go on."
        ) from error


verb = Verb(
    summary="give each process an equal share of the users, while they are served",
    example='ksa shards move shards.json --processes processes.toml --reload "systemctl reload haproxy"',
    configure=_configure,
    run=_run,
)
