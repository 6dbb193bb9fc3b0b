"""The command `ksa`: finds its verbs by the entry-point group `ksa.commands` and runs one of them.

A verb is a `Verb` object named by an entry point; its module imports nothing heavy at the top, so a verb
loads only its own libraries. Mistakes of the user end as one line on standard error and exit code 2.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version

from recsys_ksa.errors import RecsysKsaError, UsageError

GROUP = "ksa.commands"


@dataclass(frozen=True)
class Verb:
    """One verb of `ksa`: a line of help, one example, its arguments, and what it does."""

    summary: str
    example: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{self.prog}: {message}. See `{self.prog} --help`.")


def verb_entry_points() -> dict[str, EntryPoint]:
    """Return the installed verbs by name; nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def load_verb(name: str) -> Verb:
    """Import the verb `name` and nothing else.

    Raises:
        UsageError: no such verb, or a package it needs is not installed.
    """
    points = verb_entry_points()
    if name not in points:
        raise UsageError(f"ksa: expected a verb ({', '.join(points)}), got {name!r}. See `ksa --help`.")
    try:
        return points[name].load()
    except ImportError as error:
        raise UsageError(f"ksa {name}: cannot be loaded: {error}. Run `make setup`, then `ksa doctor`.") from error


def call_verb(name: str, arguments: Sequence[str]) -> None:
    """Run a verb in this process; errors are raised, not printed. Verbs call each other through this."""
    verb = load_verb(name)
    parser = _Parser(
        prog=f"ksa {name}",
        description=verb.summary,
        epilog=f"example:\n  {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.configure(parser)
    verb.run(parser.parse_args(list(arguments)))


def add_user_features(parser: argparse.ArgumentParser) -> None:
    """Add the option that tells a verb of the user, `--user-features`: a JSON object as requests have it."""
    parser.add_argument(
        "--user-features",
        metavar="JSON",
        type=_json_object,
        default={},
        help="""what is known of the user, of what the run reads: '{"country": "de", "age": 31}'""",
    )


def _json_object(text: str) -> dict[str, object]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r} ({error})") from error
    if not isinstance(told, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return told


def _help() -> str:
    lines = ["usage: ksa VERB ...", "", "The recommender that remembers a user's whole life.", "", "verbs:"]
    for name in verb_entry_points():
        try:
            verb = load_verb(name)
            lines += [f"  {name:<10} {verb.summary}", f"             {verb.example}"]
        except UsageError as error:
            lines.append(f"  {name:<10} {error}")
    return "\n".join([*lines, "", "`ksa VERB --help` shows a verb's arguments."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ksa`; return its exit code: 0, or 2 after a mistake of the user."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"recsys-ksa {version('recsys-ksa')}")
        return 0
    try:
        call_verb(arguments[0], arguments[1:])
    except (RecsysKsaError, ValueError) as error:
        # The kernels' typed errors are ValueErrors of their own package, which this module must not import.
        if not isinstance(error, RecsysKsaError) and not type(error).__module__.startswith("ksa_"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0
