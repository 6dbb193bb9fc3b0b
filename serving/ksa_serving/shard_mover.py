"""Carries virtual shards from process to process, one step after the other, so that every step can be made again.

Beside the map that holds lies, while virtual shards move, the map to come; both are files of the operator. A step:

1. Old and new owners are told the map to come. From then on what moves is read, but not written.
2. Each old owner's users are read, page by page, and kept by the new owner; then both count the same.
3. The map to come holds: old owners answer no more, new owners do.
4. The proxy's files are written, and the proxy told to read them.
5. The old owners let go. The file of the map to come takes the place of the other.

Whatever dies in between, process or mover: made again from the first, the step finds done what was done.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from ksa_serving.errors import ShardError
from ksa_serving.messages import ExportRequest, OwnershipAnswer, Problem, ReleasedAnswer, TallyRequest
from ksa_serving.shard_rows import Cursor, Page, Tally
from ksa_serving.shards import NUM_VIRTUAL_SHARDS, Ownership, Process, ShardMap, first_map, next_map
from recsys_ksa.durable import sync

Answer = TypeVar("Answer")


class MapFiles:
    """The map that holds and the one to come, and what the proxy reads: `shards.map` and `shards.cfg` beside them.

    Args:
        file: of the map that holds.
    """

    def __init__(self, file: Path):
        self.file = file
        self._coming = file.with_suffix(".next.json")

    def held(self) -> ShardMap | None:
        """Return the map that holds; None where there is none yet.

        Raises:
            ShardError: it cannot be read.
        """
        return _read_map(self.file)

    def coming(self) -> ShardMap | None:
        """Return the map to come of a move that was begun and not finished."""
        return _read_map(self._coming)

    def begin(self, coming: ShardMap) -> None:
        """Write down the map to come."""
        _write(self._coming, msgspec.json.format(msgspec.json.encode(coming), indent=1))

    def hold(self, held: ShardMap) -> None:
        """Write down the map that holds; none is to come any more."""
        _write(self.file, msgspec.json.format(msgspec.json.encode(held), indent=1))
        self.cancel()

    def cancel(self) -> None:
        """Forget the map to come."""
        self._coming.unlink(missing_ok=True)

    def tell_proxy(self, held: ShardMap) -> None:
        """Write what HAProxy reads: the process of each virtual shard, and where each process is, by room."""
        lines = [f"epoch {held.epoch}", *(f"{shard} {owner}" for shard, owner in enumerate(held.owners))]
        _write(self.file.with_name("shards.map"), "\n".join([*lines, ""]).encode())
        servers = {name: f"    server {name} {process.address}" for name, process in sorted(held.processes.items())}
        rooms = ((name, server, room) for name, server in servers.items() for room in ("writing", "asking"))
        backends = [f"backend {name}:{room} from {room}\n{server}" for name, server, room in rooms]
        anyone = "\n".join(["backend anyone from all", *servers.values()])
        _write(self.file.with_name("shards.cfg"), "\n\n".join([*backends, anyone, ""]).encode())


class Mover:
    """Moves virtual shards.

    Args:
        files: where the maps are.
        http: sends the token of an operator, where one is needed.
        reload: tells the proxy to read its files again.
        patience: seconds for which a process that does not answer is asked again.
        on_step: told how many virtual shards have moved.
    """

    def __init__(
        self,
        files: MapFiles,
        http: httpx.Client,
        reload: Callable[[], None],
        patience: float = 30.0,
        on_step: Callable[[int], object] = lambda moved: None,
    ):
        self._files = files
        self._http = http
        self._reload = reload
        self._patience = patience
        self._on_step = on_step

    def move(self, processes: dict[str, Process], most: int = 128) -> ShardMap:
        """Give each process an equal share; what was begun before is finished first. Return the map that holds then.

        Args:
            most: virtual shards that move in one step.

        Raises:
            ShardError: a process does not answer, or refuses; calling again goes on.
        """
        held = self._files.held() or self._first(processes)
        coming = self._files.coming()
        if coming is None or coming.epoch <= held.epoch:
            self._files.cancel()
            self._settle(held)
            coming = next_map(held, processes, most)
        while coming is not None:
            self._files.begin(coming)
            self._carry_out(held, coming)
            self._files.hold(coming)
            self._on_step(sum(old != new for old, new in zip(held.owners, coming.owners)))
            held = coming
            coming = next_map(held, processes, most)
        return held

    def cancel(self) -> None:
        """Undo the step that was begun: old owners write again, new ones let go of what they were given.

        Raises:
            ShardError: there is none, or its map holds already at a process; or it was undone, but for processes that
                do not answer: the next move tells them.
        """
        held, coming = self._files.held(), self._files.coming()
        if held is None or coming is None or coming.epoch <= held.epoch:
            raise ShardError("cancel: expected a move that was begun, got none.")
        sources = {source for source, _ in _ways(held, coming)}
        for source in sources:
            if _epoch(self._owned(held.processes[source])) >= coming.epoch:
                raise ShardError("cancel: expected a map that holds nowhere yet; it does. Finish the move.")
        self._files.cancel()
        away: list[str] = []
        processes = {**coming.processes, **held.processes}
        for name in sorted(processes, key=lambda name: name not in sources):
            try:
                self._reset(name, processes[name], held)
            except ShardError:
                away.append(name)
        if away:
            raise ShardError(f"cancel: undone, but {', '.join(away)} did not answer; the next move tells them.")

    def _first(self, processes: dict[str, Process]) -> ShardMap:
        """Return the first map: it gives all to the one process that has users, or to the first by name.

        To one: what that one is sent meanwhile is its own.
        """
        filled = {name: process for name, process in processes.items() if self._owned(process).num_users}
        if len(filled) > 1:
            raise ShardError(
                f"map: expected one process with users before there is a map, got {', '.join(sorted(filled))}. Start "
                "with one; send the others' events again."
            )
        held = first_map(filled or {name: processes[name] for name in sorted(processes)[:1]})
        self._files.hold(held)
        return held

    def _settle(self, held: ShardMap) -> None:
        """See that every process and the proxy know the map that holds, and that nobody keeps others' users."""
        for name, process in held.processes.items():
            if self._owned(process).ownership != Ownership(name, held):
                self._reset(name, process, held)
        self._files.tell_proxy(held)
        self._reload()

    def _carry_out(self, held: ShardMap, coming: ShardMap) -> None:
        """Make one step."""
        processes = {**held.processes, **coming.processes}
        ways = _ways(held, coming)
        sources, targets = {source for source, _ in ways}, {target for _, target in ways}
        known = {name: self._owned(process) for name, process in processes.items()}
        before = {name for name in known if _epoch(known[name]) < coming.epoch}
        for name in sorted((sources | targets) & before):
            if _began(known[name]) not in (None, coming.move):  # a step that was undone while this one was away
                self._reset(name, processes[name], held)
            self._own(processes[name], Ownership(name, held, coming))
        for source, target in ways:
            if source in before:  # else all of them were given over before the map to come held anywhere
                self._give_over(held.moved(source, target, coming), processes[source], target, processes[target])
        for name in [*sorted(sources), *sorted(targets - sources), *sorted(set(processes) - sources - targets)]:
            self._own(processes[name], Ownership(name, coming))
        self._files.tell_proxy(coming)
        self._reload()
        for source in sorted(sources):
            self._release(processes[source])

    def _give_over(self, shards: set[int], source: Process, name: str, target: Process) -> None:
        """Copy the users of some virtual shards to the process of this name, and compare."""
        for page in self._pages(source, name):
            self._call(target, "POST", "/import", msgspec.msgpack.encode(page), OwnershipAnswer)
        asked = msgspec.json.encode(TallyRequest(sorted(shards)))
        had, has = (self._call(process, "POST", "/tally", asked, Tally) for process in (source, target))
        if had != has:
            raise ShardError(f"move to {name}: expected what the old owner has ({had}), got {has}. Nothing was let go.")

    def _pages(self, source: Process, target: str) -> Iterator[Page]:
        after: Cursor | None = Cursor()
        while after is not None:
            asked = msgspec.json.encode(ExportRequest(target, after))
            page = self._call(source, "POST", "/export", asked, Page)
            yield page
            after = page.after

    def _owned(self, process: Process) -> OwnershipAnswer:
        return self._call(process, "GET", "", None, OwnershipAnswer)

    def _own(self, process: Process, ownership: Ownership) -> None:
        self._call(process, "PUT", "", msgspec.json.encode(ownership), OwnershipAnswer)

    def _reset(self, name: str, process: Process, held: ShardMap) -> None:
        """Tell a process the map that holds, and have it let go of what others own."""
        self._own(process, Ownership(name, held))
        self._release(process)

    def _release(self, process: Process) -> None:
        while self._call(process, "POST", "/release", None, ReleasedAnswer).users:
            pass

    def _call(self, process: Process, method: str, path: str, body: bytes | None, kind: type[Answer]) -> Answer:
        """Return the answer of a process; one that is away is asked again, for every call can be made twice."""
        url = f"http://{process.admin}/admin/shards{path}"
        until = time.monotonic() + self._patience
        while True:
            try:
                response = self._http.request(method, url, content=body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    packed = response.headers["content-type"] == "application/msgpack"
                    return (msgspec.msgpack if packed else msgspec.json).decode(response.content, type=kind)
                reason = _detail(response)
                if response.status_code != 503:
                    raise ShardError(f"{url}: refused: {reason}")
            if time.monotonic() > until:
                raise ShardError(f"{url}: expected an answer, got: {reason}. Start the process, then go on.")
            time.sleep(0.1)


def planned(held: ShardMap, processes: dict[str, Process]) -> ShardMap:
    """Return the map that `move` would end with."""
    return next_map(held, processes, NUM_VIRTUAL_SHARDS) or held


def _ways(held: ShardMap, coming: ShardMap) -> list[tuple[str, str]]:
    """Return who gives to whom."""
    return sorted({(old, new) for old, new in zip(held.owners, coming.owners) if old != new})


def _epoch(answer: OwnershipAnswer) -> int:
    return 0 if answer.ownership is None else answer.ownership.map.epoch


def _began(answer: OwnershipAnswer) -> str | None:
    """Return the move of which a process was told and not yet that it is done."""
    return answer.ownership.next.move if answer.ownership and answer.ownership.next else None


def _detail(response: httpx.Response) -> str:
    try:
        return msgspec.json.decode(response.content, type=Problem).detail
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"{response.status_code} {response.reason_phrase}"


def _read_map(file: Path) -> ShardMap | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=ShardMap)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"{file}: expected a shard map, got: {error}.") from error


def _write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, on disk when this returns."""
    fresh = file.with_suffix(f"{file.suffix}.new")
    with open(fresh, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(fresh, file)
    sync(file.parent)
