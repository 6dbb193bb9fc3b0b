"""What is served now, what was served before, and what could be: releases come and go without a request noticing.

A request takes `Service.served` once, at its start, and uses nothing else: so no answer mixes two releases, and an
activation is one assignment. States of two fingerprints live side by side in the stores until the older retires.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ksa_serving.batcher import Batcher
from ksa_serving.errors import ReleaseError
from ksa_serving.events import Owner
from ksa_serving.models import Question, Scored
from ksa_serving.release import Release, load_release
from ksa_serving.user_states import Current, UserStates
from recsys_ksa.errors import RecsysKsaError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A release with its states, and what asks for them and answers from them many users at once."""

    release: Release
    states: UserStates
    updates: Batcher[Owner, Current | None]
    """`UserStates.current_together`."""
    answers: Batcher[Question, Scored]
    """`Model.recommend`."""
    long_answers: Batcher[Question, Scored]
    """The same for long histories, so that nobody else waits for their many own items."""
    long_history_events: int

    async def answer(self, question: Question, deadline: float) -> Scored:
        """Return the answer to a question; see `Batcher.ask`."""
        is_long = question.state.num_events > self.long_history_events
        return await (self.long_answers if is_long else self.answers).ask(question, deadline)

    @property
    def num_waiting(self) -> int:
        """Questions that wait."""
        return self.answers.num_waiting + self.long_answers.num_waiting


class Releases:
    """The releases of one process: one active, one to roll back to, others loaded. Called under the service's lock.

    Args:
        first: the release active from the start.
        root: folder of runs that may be loaded; None: none may.
        prepare: turns a release into what serves it.
        load: loads one by its folder.
    """

    def __init__(
        self,
        first: Release,
        root: Path | None,
        prepare: Callable[[Release], Served],
        load: Callable[[Path], Release] = load_release,
    ):
        self._root = root
        self._prepare = prepare
        self._load = load
        self.active = prepare(first)
        self.previous: Served | None = None
        self.loaded: dict[str, Served] = {}

    def load(self, run: str) -> Served:
        """Load a run of the releases' folder; slow, changes nothing that is served.

        Raises:
            ReleaseError: no such name, a damaged run, or one that cannot take the active one's place.
        """
        if self._root is None:
            raise ReleaseError("release: this service was started without --releases; it serves one run.")
        path = self._root / run
        if not run or Path(run).name != run or run.startswith(".") or path.is_symlink() or not path.is_dir():
            raise ReleaseError("release: expected the name of a folder in --releases, got another.")
        try:
            release = replace(self._load(path), name=run)
        except RecsysKsaError as error:
            raise ReleaseError(f"release {run}: {error}") from error
        mine = self.active.release
        if (release.tie, release.clock) != (mine.tie, mine.clock):
            raise ReleaseError(
                f"release {run}: expected tie {mine.tie} and clock {mine.clock} as the event log's, got "
                f"{release.tie} and {release.clock}. Start a new service for it."
            )
        self.loaded[run] = self._prepare(release)
        return self.loaded[run]

    def activate(self, run: str) -> Served:
        """Put a loaded release in the active one's place; that one can be rolled back to.

        Raises:
            ReleaseError: it is not loaded.
        """
        if run not in self.loaded:
            raise ReleaseError("release: expected one that is loaded, got another. Load it first.")
        self.previous, self.active = self.active, self.loaded.pop(run)
        return self.active

    def roll_back(self) -> Served:
        """Put the previous release back in place.

        Raises:
            ReleaseError: there is none.
        """
        if self.previous is None:
            raise ReleaseError("release: expected a previous one to roll back to, got none.")
        self.active, self.previous = self.previous, self.active
        return self.active

    def fingerprints(self) -> set[str]:
        """Return the state fingerprints that may still be asked for."""
        held = [self.active, *self.loaded.values(), *([self.previous] if self.previous else [])]
        return {served.release.state_fingerprint for served in held}
