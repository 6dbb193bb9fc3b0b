"""Which process owns which users: virtual shards, the map that gives them to processes, and how a map changes.

A user belongs to one of 1,024 *virtual shards*, by the hash of the user id: the proxy and the process compute the same.
A *shard map* gives each virtual shard to one process. Every change of it has a higher *epoch*. While virtual shards
move (`shard_mover.py`), the map that is to come is known beside the one that holds: what the next one gives away is
read, but not written any more.
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Annotated

from msgspec import Meta, Struct

from ksa_serving.errors import InvalidRequestError, NotOwnerError

NUM_VIRTUAL_SHARDS = 1024
ProcessName = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_-]{0,63}\\Z")]
HOST = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*)"
Address = Annotated[str, Meta(pattern=rf"^{HOST}:[0-9]{{1,5}}\Z", description="HOST:PORT")]
Owners = Annotated[list[ProcessName], Meta(min_length=NUM_VIRTUAL_SHARDS, max_length=NUM_VIRTUAL_SHARDS)]
Epochs = Annotated[list[int], Meta(min_length=NUM_VIRTUAL_SHARDS, max_length=NUM_VIRTUAL_SHARDS)]


class Process(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a process listens: for users, and for its operator."""

    address: Address
    admin: Address


class ShardMap(Struct, frozen=True, forbid_unknown_fields=True):
    """One process for each virtual shard, and the epoch from which it has been that one's."""

    epoch: int
    move: Annotated[str, Meta(description="Names the move that led here; no other has this name.")]
    processes: dict[ProcessName, Process]
    owners: Owners
    since: Epochs

    def moved(self, source: str, target: str, after: "ShardMap") -> set[int]:
        """Return the virtual shards that `after` takes from `source` and gives to `target`."""
        pairs = enumerate(zip(self.owners, after.owners))
        return {shard for shard, (old, new) in pairs if (old, new) == (source, target) and old != new}


class Ownership(Struct, frozen=True, forbid_unknown_fields=True):
    """What one process knows: its name, the map that holds, and the one to come while virtual shards move."""

    name: ProcessName
    map: ShardMap
    next: ShardMap | None = None

    def owns(self, user_id: str) -> bool:
        """Return whether the user's events are here."""
        return self.map.owners[virtual_shard(user_id)] == self.name

    def check(self, user_id: str, writing: bool, edge: "Edge | None" = None) -> None:
        """Refuse a request that another process is to answer, or that has to wait until it can.

        Args:
            edge: what the proxy said; None: the request came without one.

        Raises:
            NotOwnerError: the caller tries again, and finds the owner by a newer map.
            InvalidRequestError: the proxy computes virtual shards differently.
        """
        shard = virtual_shard(user_id)
        if edge is not None and edge.virtual_shard != shard:
            detail = (
                f"x-ksa-shard: expected virtual shard {shard} of this user, got {edge.virtual_shard}. Mend the proxy."
            )
            raise InvalidRequestError(detail, "other-virtual-shard")
        if self.map.owners[shard] != self.name:
            detail = f"user: expected one of {self.name}'s by the map of epoch {self.map.epoch}, got another process's."
            raise NotOwnerError(f"{detail} Try again through the proxy.", "user-elsewhere")
        if not writing:
            return
        if edge is not None and edge.epoch < self.map.since[shard]:
            detail = f"x-ksa-epoch: expected {self.map.since[shard]} or newer for this user, got {edge.epoch}."
            raise NotOwnerError(f"{detail} Try again when the proxy has the new map.", "old-epoch")
        if self.next is not None and self.next.owners[shard] != self.name:
            raise NotOwnerError("user: is moving to another process and not written now. Try again.", "user-moving")


class Edge(Struct, frozen=True):
    """What a proxy says of a request: the user's virtual shard, and the epoch of the map by which it chose."""

    virtual_shard: int
    epoch: int


def virtual_shard(user_id: str) -> int:
    """Return the virtual shard of a user: the first 8 bytes of the id's SHA-256 mod 1,024."""
    return int.from_bytes(hashlib.sha256(user_id.encode()).digest()[:8], "big") % NUM_VIRTUAL_SHARDS


def first_map(processes: Mapping[str, Process]) -> ShardMap:
    """Return the map of processes that have no users yet, or of one that has them all."""
    first = sorted(processes)[0]
    owners = balanced([first] * NUM_VIRTUAL_SHARDS, processes)
    return ShardMap(1, secrets.token_hex(8), dict(processes), owners, [1] * NUM_VIRTUAL_SHARDS)


def next_map(held: ShardMap, processes: Mapping[str, Process], most: int = NUM_VIRTUAL_SHARDS) -> ShardMap | None:
    """Return the map one step nearer to `processes` having an equal share each; None where it is that already.

    Args:
        most: virtual shards that move in one step; they are not written meanwhile.
    """
    target = balanced(held.owners, processes)
    moving = [shard for shard in range(NUM_VIRTUAL_SHARDS) if held.owners[shard] != target[shard]][:most]
    if not moving and held.processes == processes:
        return None
    owners, since, epoch = list(held.owners), list(held.since), held.epoch + 1
    for shard in moving:
        owners[shard], since[shard] = target[shard], epoch
    still_there = {name: held.processes[name] for name in sorted(set(owners) - set(processes))}
    return ShardMap(epoch, secrets.token_hex(8), {**processes, **still_there}, owners, since)


def balanced(owners: list[str], names: Collection[str]) -> list[str]:
    """Return an owner for each virtual shard, shares equal to within one, with as few moved as can be."""
    held = Counter(dict.fromkeys(names, 0))
    held.update(owner for owner in owners if owner in held)
    small, larger = divmod(len(owners), len(held))
    by_share = sorted(held, key=lambda name: (-held[name], name))  # who has most may keep one more
    share = {name: small + (place < larger) for place, name in enumerate(by_share)}
    wanting = [name for name in sorted(held) for _ in range(share[name] - held[name])]
    kept = Counter[str]()
    result: list[str] = []
    for owner in owners:
        kept[owner] += 1
        result.append(owner if kept[owner] <= share.get(owner, 0) else wanting.pop())
    return result
