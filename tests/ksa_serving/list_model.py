"""What the service promises to know of its users, as lists: what tests of log and states are compared with."""

from collections import defaultdict

from ksa_serving.events import NewEvent, Owner
from recsys_ksa.order import TieKind, order_key


class ListModel:
    """What the service promises to know of its users, as lists."""

    def __init__(self, tie: TieKind):
        self.tie: TieKind = tie
        self.kept: defaultdict[Owner, list[tuple[int, NewEvent]]] = defaultdict(list)
        self.gone: defaultdict[Owner, set[bytes]] = defaultdict(set)
        self.arrivals = 0

    def append(self, owner: Owner, event: NewEvent) -> None:
        known = event.identity in self.gone[owner] or any(
            other.identity == event.identity for _, other in self.kept[owner]
        )
        if not known:
            self.arrivals += 1
            self.kept[owner].append((self.arrivals, event))

    def retract(self, owner: Owner, event_id: str) -> None:
        identity = b"i" + event_id.encode()
        if any(event.identity == identity for _, event in self.kept[owner]):
            self.kept[owner] = [pair for pair in self.kept[owner] if pair[1].identity != identity]
            self.gone[owner].add(identity)

    def correct(self, owner: Owner, event: NewEvent) -> None:
        if any(other == event for _, other in self.kept[owner]):
            return
        self.kept[owner] = [pair for pair in self.kept[owner] if pair[1].identity != event.identity]
        self.gone[owner].discard(event.identity)
        self.append(owner, event)

    def forget(self, owner: Owner) -> None:
        self.kept[owner], self.gone[owner] = [], set()

    def history(self, owner: Owner) -> list[NewEvent]:
        def key(pair: tuple[int, NewEvent]) -> tuple:
            arrival, e = pair
            named = {"event_id": e.event_id, "event_type": e.event_type, "arrival": arrival}
            return order_key(self.tie, e.timestamp, e.item_id, **named), arrival

        return [event for _, event in sorted(self.kept[owner], key=key)]
