"""What `ksa prepare` does, in vectorised pandas: the peer that loads everything. Run by prepare.py.

Same input, same work: rows checked, duplicates dropped, ties audited, items and users numbered, histories ordered and
written as Parquet by bucket, split positions, content hash, the loader's uncompressed Arrow copy; and, as `ksa prepare`
does, the sha256 of every file that was read or written, and all of it on the disk at the end.
"""

import hashlib
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

NUM_BUCKETS = 64


def main(log: Path, target: Path) -> None:
    """Prepare a folder of Parquet parts into `target`."""
    rows = pd.concat([pd.read_parquet(file) for file in sorted(log.glob("*.parquet"))], ignore_index=True)
    rows["arrival"] = np.arange(len(rows))
    text = rows["user_id"].notna() & (rows["user_id"] != "") & rows["item_id"].notna() & (rows["item_id"] != "")
    rows = rows[text & rows["timestamp"].between(0, 4_102_444_800)]

    user, users = pd.factorize(rows["user_id"])
    item, items = pd.factorize(rows["item_id"])
    events = pd.DataFrame({"user": user, "item": item, "timestamp": rows["timestamp"], "arrival": rows["arrival"]})
    del rows
    audit(events, items)
    events = events.drop_duplicates(["user", "item", "timestamp"])

    item_index, item_table = number_items(events, items)
    user_index = number_users(events, users)
    events = pd.DataFrame(
        {
            "user_index": user_index[events["user"].to_numpy()],
            "item_index": item_index[events["item"].to_numpy()],
            "timestamp": events["timestamp"].to_numpy(),
            "arrival": events["arrival"].to_numpy(),
        }
    ).sort_values(["user_index", "timestamp", "arrival"])
    histories = group(events, users, user_index)

    target.mkdir()
    pq.write_table(item_table, target / "items.parquet", compression="zstd")
    bucket = histories.column("user_index").to_numpy() % NUM_BUCKETS
    for number in range(NUM_BUCKETS):
        part = histories.filter(pa.array(bucket == number))
        pq.write_table(part, target / f"part-{number:05d}.parquet", compression="zstd", use_dictionary=False)
    print(content_hash(histories))
    with pa.OSFile(str(target / "histories.arrow"), "wb") as sink, pa.ipc.new_file(sink, histories.schema) as writer:
        writer.write_table(histories.combine_chunks())
    for path in [*log.glob("*.parquet"), *target.iterdir()]:
        with path.open("rb") as file:
            print(path.name, hashlib.file_digest(file, "sha256").hexdigest())
    for path in [*target.iterdir(), target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def audit(events: pd.DataFrame, items: pd.Index) -> None:
    """Measure the order inside ties."""
    rank = pd.Series(items).rank(method="dense").to_numpy()
    ordered = events.sort_values(["user", "timestamp", "arrival"])
    user, timestamp, item = (ordered[name].to_numpy() for name in ("user", "timestamp", "item"))
    tied = (user[1:] == user[:-1]) & (timestamp[1:] == timestamp[:-1]) & (item[1:] != item[:-1])
    greater = (rank[item[1:]] > rank[item[:-1]])[tied].mean() if tied.any() else 0.0
    print(f"P(next id > id | tie) = {greater:.4f}")


def number_items(events: pd.DataFrame, items: pd.Index) -> tuple[np.ndarray, pa.Table]:
    """Number items by (first time, id)."""
    seen = events.groupby("item")["timestamp"].agg(["size", "min"])
    table = pd.DataFrame(
        {"item": seen.index, "item_id": items[seen.index], "count": seen["size"], "first": seen["min"]}
    )
    table = table.sort_values(["first", "item_id"])
    index = np.zeros(len(items), dtype=np.int32)
    index[table["item"]] = np.arange(1, len(table) + 1)
    return index, pa.Table.from_pandas(table, preserve_index=False)


def number_users(events: pd.DataFrame, users: pd.Index) -> np.ndarray:
    """Number users by (first time, id) within their bucket."""
    raw = [int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big") % NUM_BUCKETS for user in users]
    first = events.groupby("user")["timestamp"].min()
    table = pd.DataFrame({"user": first.index, "first": first, "user_id": users[first.index]})
    table["bucket"] = np.array(raw)[table["user"]]
    table = table.sort_values(["first", "user_id"])
    table["n"] = table.groupby("bucket").cumcount()
    index = np.zeros(len(users), dtype=np.int64)
    index[table["user"]] = table["bucket"] + NUM_BUCKETS * table["n"]
    return index


def group(events: pd.DataFrame, users: pd.Index, user_index: np.ndarray) -> pa.Table:
    """Return one row a user, with split positions."""
    user, timestamp = events["user_index"].to_numpy(), events["timestamp"].to_numpy()
    first = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    offsets = np.append(first, len(user)).astype(np.int64)
    order = np.argsort(user_index)
    tie = events["arrival"].to_numpy().astype(">u8").tobytes()
    ends = pa.py_buffer(np.arange(len(user) + 1, dtype=np.int64) * 8)
    ties = pa.Array.from_buffers(pa.large_binary(), len(user), [None, ends, pa.py_buffer(tie)])
    lists = {"item_index": pa.array(events["item_index"]), "timestamp": pa.array(timestamp), "tie": ties}
    bounds = pa.array(offsets)
    columns = {"user_id": pa.array(users[order]), "user_index": pa.array(user[first])}
    columns |= {name: pa.LargeListArray.from_arrays(bounds, values) for name, values in lists.items()}
    end = timestamp.max()
    for name, days in (("global_valid", 42), ("global_test", 28)):
        before = np.append(0, np.cumsum(timestamp < end - days * 86_400))
        columns[name] = pa.array((before[offsets[1:]] - before[offsets[:-1]]).astype(np.int32))
    begins = np.append(True, (timestamp[1:] != timestamp[:-1]) | (user[1:] != user[:-1]))
    rows = np.flatnonzero(begins)
    last = np.searchsorted(rows, offsets[1:]) - 1
    columns["loo_test"] = pa.array((rows[last] - offsets[:-1]).astype(np.int32))
    columns["loo_valid"] = pa.array((rows[np.maximum(last - 1, 0)] - offsets[:-1]).astype(np.int32))
    return pa.table(columns)


def content_hash(histories: pa.Table) -> str:
    """Hash each user's buffers, then the digests in order."""
    digests = []
    lists = [histories.column(name).combine_chunks() for name in ("item_index", "timestamp")]
    offsets = lists[0].offsets.to_pylist()
    arrays = [column.values.to_numpy() for column in lists]
    for first, last in pairwise(offsets):
        digest = hashlib.sha256()
        for values in arrays:
            digest.update(values[first:last].tobytes())
        digest.update(np.full(last - first, 8).tobytes())
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(digests)).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
