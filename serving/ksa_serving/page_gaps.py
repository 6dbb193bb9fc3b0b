"""Overwrites the unused middle of SQLite's pages.

A page of a B-tree has its cells at the end and pointers to them at the beginning. SQLite overwrites cells that it frees
(`secure_delete`), but where it moves cells between neighbours it leaves copies in the space between, which nothing
refers to and nothing overwrites: rows that are deleted later survive there. (sqlite.org/fileformat2.html, 1.6.)

Only those bytes are written, which SQLite gives no meaning, so a write that is torn or lost changes no row.
"""

import struct

import apsw

from ksa_serving.errors import EventLogError

HEADER_BYTES = {2: 12, 5: 12, 10: 8, 13: 8}
"""Of a B-tree page's header, by its first byte: the kind of page."""
FIRST_PAGE_SKIPS = 100
"""Bytes of the file's own header."""
MOST_PAGES = 1 << 25
"""Of 4,096 bytes, 137 GB. Other pages begin with the number of a page: below this one their first byte is 0 or 1, which
is no kind of B-tree page."""


def owe_wiping(connection: apsw.Connection) -> None:
    """Keep in the log that all its gaps are to be overwritten, also after a crash."""
    connection.execute("INSERT INTO facts VALUES ('wiping', x'') ON CONFLICT DO NOTHING")


def owes_wiping(connection: apsw.Connection) -> bool:
    """Return whether `owe_wiping` was called since `settle_wiping`."""
    return connection.execute("SELECT 1 FROM facts WHERE name = 'wiping'").fetchone() is not None


def settle_wiping(connection: apsw.Connection) -> None:
    """Keep in the log that its gaps were overwritten."""
    connection.execute("DELETE FROM facts WHERE name = 'wiping'")


def wipe_gaps(connection: apsw.Connection, first: int, count: int) -> bool:
    """Overwrite the gaps of `count` pages from `first` (1 is the first); return whether there are more pages.

    The caller is the only writer, outside a transaction, and the write-ahead log is empty.

    Raises:
        apsw.Error: the disk failed.
        EventLogError: the file has `MOST_PAGES` pages; nothing was overwritten.
    """
    size, num_pages = connection.pragma("page_size"), connection.pragma("page_count")
    if num_pages >= MOST_PAGES:
        raise EventLogError(
            f"event log: expected fewer than {MOST_PAGES} pages to overwrite gaps in, got {num_pages}: what they keep "
            "of deleted rows stays until they are written again. Add a process."
        )
    count = min(count, num_pages - first + 1)
    if count < 1:
        return False
    flags = [apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_READWRITE, 0]
    # By SQLite's own file layer: a descriptor of another kind would let go of the process's locks when it is closed.
    file = apsw.VFSFile(connection.open_vfs, connection.filename, flags)
    try:
        content, wiped = file.xRead(count * size, (first - 1) * size), False
        for number in range(first, first + count):
            page = content[(number - first) * size : (number - first + 1) * size]
            start, end = _gap(page, FIRST_PAGE_SKIPS if number == 1 else 0)
            if page[start:end].strip(b"\0"):
                file.xWrite(bytes(end - start), (number - 1) * size + start)
                wiped = True
        if wiped:
            file.xSync(apsw.SQLITE_SYNC_FULL)
            connection.pragma("shrink_memory")  # the connection's copies of these pages would bring the bytes back
    finally:
        file.xClose()
    return first + count <= num_pages


def _gap(page: bytes, skipped: int) -> tuple[int, int]:
    """Return where a page's gap begins and ends; equal for a page that has none."""
    header = HEADER_BYTES.get(page[skipped]) if len(page) > skipped else None
    if header is None:
        return 0, 0
    num_cells, end = struct.unpack_from(">HH", page, skipped + 3)
    start = skipped + header + 2 * num_cells
    return (start, end) if start <= end <= len(page) else (0, 0)
