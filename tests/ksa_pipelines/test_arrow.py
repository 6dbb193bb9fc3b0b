import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksa_pipelines.arrow import encode

VALUES = st.lists(st.sampled_from(["a", "b", "é", "", "x" * 40]) | st.text(max_size=3))


def check_codes(values: list[str | None]) -> None:
    codes, distinct = encode(pl.Series("name", values, dtype=pl.String))
    assert distinct.to_list() == list(dict.fromkeys(value for value in values if value is not None))
    assert [None if code < 0 else distinct[int(code)] for code in codes] == values


@given(VALUES | st.lists(st.none() | st.text(max_size=2)))
def test_codes_count_distinct_values_by_first_sight(values):
    check_codes(values)


@pytest.mark.parametrize("values", [["a", "b", "a"], ["b"], []])
def test_texts_of_one_hash_are_told_apart(values, monkeypatch):
    monkeypatch.setattr(pl.Series, "hash", lambda self: pl.Series([7] * len(self), dtype=pl.UInt64))
    check_codes(values)
