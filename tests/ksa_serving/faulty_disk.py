"""A disk beneath SQLite that loses power and fails as a test says: a VFS in Python (apsw), no file system driver.

What SQLite writes goes to real files, as to the system's page cache, and is also remembered until it is synced. When
the process is killed all that was written is there. When the power goes, of what was not synced

- each 512-byte sector of a write is there or not, whatever the order in which they were written; a file may have
  grown before its new sectors were written, and then has zeros or rubbish there;
- new names and removals are there or not, until the folder was synced: SQLite does that with the first sync of each
  journal and write-ahead log that it opens.

Taken for granted, as SQLite does: a sector is written whole or not at all, bytes beside a write stay as they were
(`SQLITE_IOCAP_POWERSAFE_OVERWRITE`), and what a sync that succeeded covers is there. A sync that *fails* may have lost
for good what it was to bring to the disk, also if the next one succeeds, as on Linux.
"""

import contextlib
import hashlib
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import apsw

SECTOR = 512
NAME = "ksa-faulty"
Fault = Literal["write-error", "sync-error", "full", "read-only", "read-error"]
FAULTS: tuple[Fault, ...] = ("write-error", "sync-error", "full", "read-only", "read-error")
SYNC_FOLDER_TOO = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL
Write = tuple[int, bytes | None]
"""Where, and what; None: the file was cut or grown to there."""


@dataclass
class DiskFile:
    """durable: what a power cut leaves. waiting: written since the last sync. named: whether the name is durable."""

    name: str
    durable: bytearray
    named: bool
    waiting: list[Write] = field(default_factory=list)

    def sync(self) -> None:
        for write in self.waiting:
            apply(self.durable, write)
        self.waiting.clear()


class Disk:
    """One folder's disk. A crash or a power cut gives a new one, in another folder.

    fault: what fails from now on. fault_share: of operations that fail for once, by chance. goes_on: while it is not
    set, syncs do not end. trusts_syncs: False for a disk that says it has synced and has not. cut_at: the operation in
    which the power goes; cut_in: what that was. operations: writes, syncs and removals so far. trace: a hash of all.
    """

    def __init__(self, folder: Path, draw: random.Random):
        self.folder = folder
        self.draw = draw
        self.fault: Fault | None = None
        self.fault_share = 0.0
        self.cut_at: int | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.syncing = False
        self.operations = 0
        self.cut_in: str | None = None
        self.off = False
        self.faults = 0
        self.trusts_syncs = True
        self._files: dict[str, DiskFile] = {}
        self._removed: dict[str, bytes] = {}
        self._doing = ""
        self.trace = hashlib.sha256()

    def crash(self, to: Path) -> "Disk":
        """Return the disk as the next process finds it: all that was written is there."""
        self.off = True
        to.mkdir()
        for file in self.folder.iterdir():
            if file.name != "lock" and not file.name.endswith("-shm"):
                shutil.copyfile(file, to / file.name)
        return Disk(to, self.draw)

    def cut_power(self, to: Path) -> "Disk":
        """Return the disk as it is when the power is back."""
        self.off = True
        to.mkdir()
        for name, content in self._removed.items():
            if name not in self._files and self.draw.random() < 0.5:
                (to / name).write_bytes(content)
        for name, file in self._files.items():
            if file.named or self.draw.random() < 0.5:
                (to / name).write_bytes(self._survivors(file))
        return Disk(to, self.draw)

    def opened(self, name: str) -> DiskFile:
        """Return what is known of a file that SQLite opens."""
        if self.off:
            raise apsw.CantOpenError("the power is off")
        path = self.folder / name
        if not path.exists() and self.fault == "read-only":
            raise apsw.CantOpenError("read-only file system")
        if name not in self._files:
            is_there = path.exists()
            self._files[name] = DiskFile(name, bytearray(path.read_bytes() if is_there else b""), is_there)
        return self._files[name]

    def write(self, file: DiskFile, write: Write, grows: bool) -> None:
        """Take a write, or fail."""
        self._doing = f"write {file.name}"
        self.trace.update(b"%d:%b" % (write[0], write[1] or b""))
        fault = self._begin("write-error", "full", "read-only")
        if fault == "full":
            if grows:
                raise apsw.FullError("no space left on device")
        elif fault is not None:
            raise failure(apsw.SQLITE_IOERR_WRITE, fault)
        file.waiting.append(write)
        self._end()

    def sync(self, file: DiskFile, syncs_folder: bool) -> None:
        """Bring to the disk what waits, or fail."""
        self._doing = f"sync {file.name}"
        fault = self._begin("sync-error", "write-error")
        self.syncing = True
        self.goes_on.wait()
        self.syncing = False
        if fault is not None:
            file.waiting[:] = [write for write in file.waiting if self.draw.random() < 0.5]
            raise failure(apsw.SQLITE_IOERR_FSYNC, fault)
        if self.trusts_syncs:
            file.sync()
            if syncs_folder:
                self.sync_folder()
        self._end()

    def sync_folder(self) -> None:
        """Bring names to the disk."""
        self._removed.clear()
        for file in self._files.values():
            file.named = True

    def remove(self, name: str, syncs_folder: bool) -> None:
        """Forget a file, or fail."""
        self._doing = f"remove {name}"
        fault = self._begin("write-error", "read-only")
        if fault is not None:
            raise failure(apsw.SQLITE_IOERR_DELETE, fault)
        file = self._files.pop(name, None)
        if file is not None and file.named:
            self._removed[name] = bytes(file.durable)
        if syncs_folder:
            self.sync_folder()
        self._end()

    def read(self) -> None:
        """Fail where reading does."""
        if self.off or self.fault == "read-error":
            raise failure(apsw.SQLITE_IOERR_READ, "the power is off" if self.off else "read-error")

    def _begin(self, *faults: Fault) -> Fault | None:
        """Count an operation that may meet one of `faults`; return which."""
        if self.off:
            raise failure(apsw.SQLITE_IOERR, "the power is off")
        self.operations += 1
        self.trace.update(self._doing.encode())
        if self.operations == self.cut_at and self.draw.random() < 0.5:  # before it; else in its midst
            self._end()
        found = self.fault if self.fault in faults else None
        if found is None and self.draw.random() < self.fault_share:
            found = self.draw.choice(faults)
        self.faults += found is not None
        return found

    def _end(self) -> None:
        if self.operations == self.cut_at:
            self.off, self.cut_in = True, self._doing
            raise failure(apsw.SQLITE_IOERR, "the power is off")

    def _survivors(self, file: DiskFile) -> bytes:
        """Return what is left of a file: what was synced, and of the rest what chance decides."""
        content, waiting = bytearray(file.durable), list(file.waiting)
        how = self.draw.choice(["nothing", "prefix", "any"])
        if how == "nothing":
            return bytes(content)
        share = self.draw.random()
        if how == "prefix":
            end = self.draw.randint(0, len(waiting))
            for write in waiting[:end]:
                apply(content, write)
            waiting, share = waiting[end : end + 1], 0.5
        else:
            self.draw.shuffle(waiting)
        for write in waiting:
            for sector in sectors(write):
                if self.draw.random() < share:
                    apply(content, sector)
                elif sector[1] is not None and sector[0] >= len(file.durable) and self.draw.random() < 0.5:
                    rubbish = self.draw.randbytes(len(sector[1])) if self.draw.random() < 0.5 else bytes(len(sector[1]))
                    apply(content, (sector[0], rubbish))
        return bytes(content)


def apply(content: bytearray, write: Write) -> None:
    """Change a file's content as a write does."""
    at, data = write
    if data is None:
        content[:] = content[:at] + bytes(max(0, at - len(content)))
        return
    if len(content) < at:
        content.extend(bytes(at - len(content)))
    content[at : at + len(data)] = data


def sectors(write: Write) -> Iterator[Write]:
    """Yield a write in the parts that are there whole or not at all."""
    at, data = write
    if data is None:
        yield write
        return
    start = at
    while start < at + len(data):
        end = min(start // SECTOR * SECTOR + SECTOR, at + len(data))
        yield start, data[start - at : end - at]
        start = end


def failure(code: int, reason: str) -> apsw.Error:
    """Return what makes SQLite see an I/O error of this kind."""
    error = apsw.IOError(reason)
    error.extendedresult = code
    return error


class FaultyVfs(apsw.VFS):
    """All SQLite files of this process; those in folders of a `Disk` go through it."""

    def __init__(self, randomness: random.Random | None = None):
        super().__init__(NAME, "unix")
        self._randomness = randomness
        self._disks: dict[Path, Disk] = {}

    def mount(self, disk: Disk) -> Disk:
        """Have files in the disk's folder go through it from now on; it is returned."""
        self._disks[disk.folder] = disk
        return disk

    def disk_of(self, name: str) -> tuple[Disk | None, str]:
        """Return the disk of a path, and the path's last part."""
        path = Path(name)
        return self._disks.get(path.parent), path.name

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        """Open a file."""
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        disk, last = (None, "") if path is None else self.disk_of(path)
        if disk is None:
            return apsw.VFSFile("unix", name, flags)
        return FaultyFile(disk, last, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """Remove a file."""
        disk, last = self.disk_of(filename)
        if disk is not None and not last.endswith("-shm"):
            disk.remove(last, syncdir)
        super().xDelete(filename, syncdir)

    def xSleep(self, microseconds: int) -> int:
        """Sleep while another connection has a lock, for whom no time needs to pass where all is one thread."""
        return microseconds if self._randomness is not None else super().xSleep(microseconds)

    def xRandomness(self, numbytes: int) -> bytes:
        """Return what salts a write-ahead log."""
        return super().xRandomness(numbytes) if self._randomness is None else self._randomness.randbytes(numbytes)

    def excepthook(self, *error: object) -> bool:
        """Say nothing of failures that SQLite cannot hand on: they were asked for."""
        return True


class FaultyFile(apsw.VFSFile):
    """A file on a `Disk`."""

    def __init__(self, disk: Disk, last: str, name: Any, flags: list[int]):
        self._disk = disk
        self._syncs_folder = bool(flags[0] & apsw.SQLITE_OPEN_CREATE and flags[0] & SYNC_FOLDER_TOO)
        self._file = disk.opened(last)
        super().__init__("unix", name, flags)

    def xRead(self, amount: int, offset: int) -> bytes:
        """Read."""
        self._disk.read()
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:
        """Write."""
        self._disk.write(self._file, (offset, bytes(data)), offset + len(data) > super().xFileSize())
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:
        """Cut, or grow."""
        self._disk.write(self._file, (newsize, None), False)
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:
        """Bring to the disk what was written. The real file is not synced: its machine stays on."""
        self._disk.sync(self._file, self._syncs_folder)
        self._syncs_folder = False

    def excepthook(self, *error: object) -> bool:
        """Say nothing, as the VFS."""
        return True


@contextlib.contextmanager
def faulty_disks(randomness: random.Random | None = None) -> Iterator[FaultyVfs]:
    """SQLite files of this process go through disks that are mounted.

    Args:
        randomness: in place of SQLite's own; and no time passes while a lock is waited for. None: both as ever.
    """
    default = apsw.vfs_names()[0]
    vfs = FaultyVfs(randomness)
    apsw.set_default_vfs(NAME)
    apsw.randomness(0)  # SQLite asks for randomness anew
    try:
        yield vfs
    finally:
        apsw.set_default_vfs(default)
        apsw.randomness(0)
        vfs.unregister()
