"""What a data set must hold after some logs, said by loops over rows: slow, obvious, what the tests compare with."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from recsys_ksa.order import order_key


@dataclass
class Reference:
    """The rules of the data set for logs appended one after the other; rows are dicts of a log's columns."""

    tie: str
    num_buckets: int
    forgotten: set[str] = field(default_factory=set)
    items: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    users: dict[str, int] = field(default_factory=dict)
    histories: dict[str, list] = field(default_factory=dict)
    arrivals: int = 0

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add a log."""
        new = []
        for arrival, row in enumerate(rows, self.arrivals):
            if row["user_id"] not in self.forgotten and not self._is_duplicate(row):
                ids = {"event_id": row.get("event_id"), "event_type": row.get("event_type"), "arrival": arrival}
                key = order_key(self.tie, row["timestamp"], row["item_id"], **ids)  # pyright: ignore[reportArgumentType]
                self.histories.setdefault(row["user_id"], []).append((key, arrival, row))
                new.append(row)
        self.arrivals += len(rows)
        for history in self.histories.values():
            history.sort(key=lambda event: event[:2])
        for item in self._by_first_time(new, "item_id", self.items):
            self.items[item] = len(self.items) + 1
        for kind in sorted({row.get("event_type") for row in new} - {None} - set(self.types), key=str.encode):
            self.types[kind] = len(self.types) + 1
        for user in self._by_first_time(new, "user_id", self.users):
            bucket = int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big") % self.num_buckets
            taken = sum(index % self.num_buckets == bucket for index in self.users.values())
            self.users[user] = bucket + self.num_buckets * taken

    def rows(self) -> list[dict[str, Any]]:
        """Return what the parts hold, users by index."""
        rows = []
        for user, index in sorted(self.users.items(), key=lambda entry: entry[1]):
            events = self.histories.get(user)
            if events:
                rows.append(
                    {
                        "user_id": user,
                        "user_index": index,
                        "item_index": [self.items[row["item_id"]] for *_, row in events],
                        "timestamp": [row["timestamp"] for *_, row in events],
                        "tie": [key[1] for key, *_ in events],
                        "event_id": [row.get("event_id") for *_, row in events],
                        "event_type": [self.types.get(row.get("event_type"), 0) for *_, row in events],
                    }
                )
        return rows

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return each item's number of events and first time."""
        times = {item: list[int]() for item in self.items}
        for history in self.histories.values():
            for *_, row in history:
                times[row["item_id"]].append(row["timestamp"])
        return {item: (len(seen), min(seen)) for item, seen in times.items() if seen}

    def _is_duplicate(self, row: dict[str, Any]) -> bool:
        kept = [other for *_, other in self.histories.get(row["user_id"], [])]
        if row.get("event_id") is not None:
            return any(other.get("event_id") == row["event_id"] for other in kept)
        same = ("item_id", "timestamp", "event_type")
        return any(
            other.get("event_id") is None and all(other.get(name) == row.get(name) for name in same) for other in kept
        )

    @staticmethod
    def _by_first_time(rows: list[dict[str, Any]], column: str, known: dict[str, int]) -> list[str]:
        first: dict[str, int] = {}
        for row in rows:
            first[row[column]] = min(first.get(row[column], row["timestamp"]), row["timestamp"])
        return sorted(set(first) - set(known), key=lambda name: (first[name], name.encode()))
