"""How many requests are worked on at once; beyond it they are refused before anything is done for them.

A queue that stays is no reserve: everyone waits longer and nobody more is answered. Writing events and answering from
states have a room each, so that neither keeps the other out.
"""

from dataclasses import dataclass

ENTERED = "ksa_room"
"""In a request's scope: the room it was let into before it was parsed; whoever answers it leaves that."""


class Room:
    """Counts requests under way. Used on one event loop."""

    def __init__(self, most: int):
        self.under_way = 0
        self._most = most

    @property
    def is_crowded(self) -> bool:
        """Whether more than half of it is taken."""
        return 2 * self.under_way > self._most

    def enter(self) -> bool:
        """Return whether one more may be worked on; whoever may leaves afterwards."""
        entered = self.under_way < self._most
        self.under_way += entered
        return entered

    def leave(self) -> None:
        """Make room for another."""
        self.under_way -= 1


@dataclass(frozen=True)
class Rooms:
    """writing: calls that keep, correct, retract or delete. asking: all others about users."""

    writing: Room
    asking: Room
