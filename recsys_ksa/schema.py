# pyright: standard
# pyarrow has no type stubs.
"""Names and types of every table: logs, prepared data sets, runs. Torch-free (pyarrow).

A prepared data set:

    manifest.json                 what is inside, where it came from, hashes
    items.parquet                 one row an item_index, row 0 is the padding/unknown item
    vocab/event_type.parquet      one row an event_type index (where the log has event types)
    vocab/<side feature>.parquet  one row a category; index 0 is unknown
    users.parquet                 one row a user that is described (where a table of users was given)
    vocab/user_<feature>.parquet  one row a category of users
    histories/part-*.parquet      one row a user, events in order
    cache/histories.arrow         uncompressed copy that the loader maps
    cache/rows-*.arrow            what each part holds, uncompressed, for increments
"""

import pyarrow as pa

FORMAT_VERSION = 2
NUM_BUCKETS = 64
UNKNOWN_ITEM = 0
"""Item index of padding and of items the vocabulary does not know."""
UNKNOWN_CATEGORY = 0

EVENTS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("event_type", pa.string()),
        pa.field("event_id", pa.string()),
    ]
)
"""A log after its column mapping. `event_type` and `event_id` may be absent."""

ITEMS = pa.schema(
    [
        pa.field("item_index", pa.int32(), nullable=False),
        pa.field("item_id", pa.string()),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("first_seen", pa.int64()),
    ]
)
"""items.parquet; then one int32 column `<feature>_index` for each side feature, `<feature>_indices` (list<int32>) for
each that is several categories, `<feature>_vector` (fixed_size_list<float>) for each vector, and `title` (string) where
known. Row r has item_index r; row 0 has item_id null."""

VOCABULARY = pa.schema(
    [pa.field("index", pa.int32(), nullable=False), pa.field("value", pa.string()), pa.field("count", pa.int64())]
)
"""vocab/*.parquet; row 0 is the unknown category (value null)."""

SPLIT_COLUMNS = ("loo_valid", "loo_test", "global_valid", "global_test")
"""int32, one each a user: the position in the history at which the protocol's validation (test) events begin;
the history's length where it has none. `loo-classic` needs no column: length - 2 and length - 1."""


def indices_column(name: str) -> str:
    """Return the column of items.parquet that holds the categories of a feature of several."""
    return f"{name}_indices"


def vector_column(name: str) -> str:
    """Return the column of items.parquet that holds a feature's vectors."""
    return f"{name}_vector"


def user_column(name: str, kind: str) -> str:
    """Return the column of users.parquet that holds a feature, of kind `category`, `list` or `number`."""
    return {"category": f"{name}_index", "list": indices_column(name), "number": f"{name}_value"}[kind]


def user_vocabulary(name: str) -> str:
    """Return the name of the vocabulary of a feature of users."""
    return f"user_{name}"


def histories_schema(*, has_event_type: bool, has_event_id: bool, has_value: bool = False) -> pa.Schema:
    """Return the schema of histories/part-*.parquet, one row a user, events in order.

    The lists hold one entry an event: item_index, timestamp (Unix seconds), tie (see `recsys_ksa.order`),
    and where the log has them event_id, event_type (index into vocab/event_type.parquet) and value (NaN: none).
    """
    fields = [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("user_index", pa.int64(), nullable=False),
        pa.field("item_index", pa.large_list(pa.int32()), nullable=False),
        pa.field("timestamp", pa.large_list(pa.int64()), nullable=False),
        pa.field("tie", pa.large_list(pa.large_binary()), nullable=False),
    ]
    if has_event_id:
        fields.append(pa.field("event_id", pa.large_list(pa.large_string()), nullable=False))
    if has_event_type:
        fields.append(pa.field("event_type", pa.large_list(pa.int8()), nullable=False))
    if has_value:
        fields.append(pa.field("value", pa.large_list(pa.float32()), nullable=False))
    fields += [pa.field(name, pa.int32(), nullable=False) for name in SPLIT_COLUMNS]
    return pa.schema(fields)
