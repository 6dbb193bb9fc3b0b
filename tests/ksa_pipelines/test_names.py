import polars as pl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksa_pipelines import names
from ksa_pipelines.names import NameCollector
from ksa_pipelines.spill import read_rows, read_users, write_chunk
from ksa_pipelines.vocab import user_bucket

ROW = st.tuples(
    st.sampled_from(["a", "b", "é", "d"]),
    st.sampled_from(["x", "10", "9", "é", "z" * 40]),
    st.sampled_from([None, "v"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.lists(ROW, min_size=1, max_size=8), min_size=1, max_size=6), st.integers(1, 9))
def test_chunks_hold_what_was_spilled_under_numbers_of_the_whole_log(tmp_path_factory, monkeypatch, logs, group):
    folder = tmp_path_factory.mktemp("chunks")
    monkeypatch.setattr(names, "GROUP", group)
    columns = {"user_id": pl.String, "item_id": pl.String, "event_type": pl.String}
    chunks = []
    for number, rows in enumerate(logs):
        frame = pl.DataFrame(rows, schema=columns, orient="row").with_columns(timestamp=pl.lit(number, pl.Int64))
        frame = frame.with_row_index("__row").cast({"__row": pl.UInt64})
        chunks.append(write_chunk(frame.with_columns(event_id="user_id"), 3, folder / f"chunk-{number}"))

    found = {}
    for column in ("item", "event_type"):
        collector = NameCollector(column, folder)
        for chunk in chunks:
            collector.add(chunk)
        found[column] = collector.names()
    codes = {column: each.of_chunks() for column, each in found.items()}
    items, types = found["item"].values.to_list(), [*found["event_type"].values, None]

    assert items == sorted({item for rows in logs for _, item, _ in rows}, key=str.encode)
    for buckets in (range(1), range(1, 2), range(2, 3), range(3), range(1, 3)):
        users, user_rows = read_users(chunks, buckets)
        ids = users["user_id"]
        bucket_of = {user: user_bucket(user, 3) for rows in logs for user, *_ in rows}
        assert sorted(users.rows()) == sorted(each for each in bucket_of.items() if each[1] in buckets)
        expected = [
            (user, item, kind, number, row, user)
            for number, rows in enumerate(logs)
            for row, (user, item, kind) in sorted(enumerate(rows), key=lambda each: bucket_of[each[1][0]])
            if bucket_of[user] in buckets
        ]
        order = ("user", "item", "event_type", "timestamp", "arrival", "event_id")
        met = read_rows(chunks, codes, user_rows, buckets).select(order).rows() if len(ids) else []
        assert [(ids[user], items[item], types[kind], *rest) for user, item, kind, *rest in met] == expected
