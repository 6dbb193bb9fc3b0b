"""Calls by which users move between processes; `ksa shards` makes them, on the listener for operators.

In this order: the old owner is told the map to come, and refuses to write what it gives away; its users are exported
and kept by the new owner; both are told that the map holds; the old owner lets go. Each call can be made again.
"""

import asyncio
from collections.abc import Collection

from ksa_serving.errors import ShardError
from ksa_serving.event_log import EventLog
from ksa_serving.messages import ExportRequest, OwnershipAnswer, ReleasedAnswer
from ksa_serving.shard_rows import Page, Tally
from ksa_serving.shards import Ownership, virtual_shard
from ksa_serving.state_store import StateStore
from ksa_serving.upkeep import Upkeep
from ksa_serving.user_locks import UserLocks
from ksa_serving.workers import Workers

RELEASED_TOGETHER = 500
"""Users taken out in one call."""


class ShardCalls:
    """One process's part of a move. They run on one event loop."""

    def __init__(self, log: EventLog, store: StateStore, locks: UserLocks, workers: Workers, upkeep: Upkeep):
        self._log = log
        self._store = store
        self._locks = locks
        self._workers = workers
        self._upkeep = upkeep
        self._owning = asyncio.Lock()

    async def owned(self) -> OwnershipAnswer:
        """Return what this process knows."""
        return OwnershipAnswer(self._log.ownership, (await self._workers.run(self._log.counts))[0])

    async def own(self, told: Ownership) -> OwnershipAnswer:
        """Take on a map, or the one to come beside the one that holds; on disk when this returns.

        Raises:
            ShardError: it is older than what this process knows, another's, or its users are not where it says.
        """
        async with self._owning:
            known = self._log.ownership
            if known == told:
                return await self.owned()
            if told.next is not None and told.next.epoch != told.map.epoch + 1:
                raise ShardError(f"map: expected epoch {told.map.epoch + 1} next, got {told.next.epoch}.")
            if known is not None and known.name != told.name:
                raise ShardError(
                    f"map: expected {known.name}'s, got {told.name}'s. Mend the addresses of the processes."
                )
            if known is not None and not _follows(told, known):
                raise ShardError(
                    f"map: expected one that follows epoch {known.map.epoch}, move {known.map.move}, got epoch "
                    f"{told.map.epoch}, move {told.map.move}."
                )
            await asyncio.wrap_future(self._log.own(told))
            return await self.owned()

    async def export(self, asked: ExportRequest) -> Page:
        """Return a part of the users on their way to a process; they are not written any more.

        Raises:
            ShardError: none are on their way.
        """
        known = self._log.ownership
        if known is None or known.next is None:
            raise ShardError("export: expected virtual shards on their way, got none.")
        shards = known.map.moved(known.name, asked.target, known.next)
        return await self._workers.run_slowly(self._log.read_page, shards, known.next.move, known.name, asked.after)

    async def keep(self, page: Page) -> OwnershipAnswer:
        """Keep a part of the users on their way here; on disk when this returns.

        Raises:
            ShardError: they are not expected, or have events here already.
        """
        known = self._log.ownership
        if known is None or known.next is None or known.next.move != page.move:
            raise ShardError("import: expected users of the move that this process was told of, got others.")
        expected = known.map.moved(page.source, known.name, known.next)
        if not {virtual_shard(user.user_id) for user in page.users} <= expected:
            raise ShardError(f"import: expected users that go from {page.source} to {known.name}, got others.")
        await asyncio.wrap_future(self._log.keep_page(page))
        return await self.owned()

    async def tally(self, shards: Collection[int]) -> Tally:
        """Return what is kept of all users in some virtual shards, to be compared with another process."""
        return await self._workers.run_slowly(self._log.tally, frozenset(shards))

    async def release(self) -> ReleasedAnswer:
        """Take out some users who are another process's; from the disks they go in the background.

        Raises:
            ShardError: a move is under way.
        """
        known = self._log.ownership
        if known is None or known.next is not None:
            raise ShardError("release: expected a map that holds and no move under way.")
        owners = await self._workers.run_slowly(self._log.not_owned, known, RELEASED_TOGETHER)
        for owner in owners:
            async with self._locks.of(owner):  # so that no state is put after it was dropped
                await self._workers.run(self._store.drop, owner)
        if owners:
            await asyncio.wrap_future(self._log.let_go(owners))
            self._upkeep.purge()
        return ReleasedAnswer(len(owners))


def _follows(told: Ownership, known: Ownership) -> bool:
    """Return whether a process may be told so: the same map with or without a next one, or the next one."""
    if told.map.epoch == known.map.epoch:
        return told.map.move == known.map.move and None in (told.next, known.next)
    return told.map.epoch > known.map.epoch and (known.next is None or known.next.move == told.map.move)
