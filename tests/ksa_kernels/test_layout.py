import pytest
import torch

from ksa_kernels import ChunkLayout
from ksa_kernels.errors import ShapeError

RULE = {"chunk_size": 4, "summaries_per_chunk": 2, "window_chunks": 1}


def test_whole_histories_have_equal_queries_and_keys():
    layout = ChunkLayout.from_offsets([0, 9, 9, 12, 16], **RULE)
    assert layout.event_query_offsets.tolist() == layout.event_key_offsets.tolist() == [0, 9, 9, 12, 16]
    assert layout.summary_query_offsets.tolist() == layout.summary_key_offsets.tolist() == [0, 4, 4, 4, 6]
    assert layout.event_query_index.tolist() == [*range(9), *range(3), *range(4)]
    assert layout.summary_key_chunk.tolist() == [0, 0, 1, 1, 0, 0]
    assert layout.summary_key_slot.tolist() == [0, 1, 0, 1, 0, 1]
    assert (layout.num_query_events, layout.num_query_summaries) == (16, 6)


def test_queries_on_top_of_a_state_ask_for_the_closed_chunks_they_closed():
    layout = ChunkLayout.from_offsets([0, 18, 20], query_start=[11, 2], key_start=[4, 0], **RULE)
    assert layout.event_query_index.tolist() == [*range(11, 18), *range(2, 2)]
    assert layout.event_key_index.tolist() == [*range(4, 18), 0, 1]
    assert layout.summary_query_chunk.tolist() == [2, 2, 3, 3]
    assert layout.summary_key_chunk.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_capped_visibility_asks_only_for_summaries_that_can_be_seen():
    layout = ChunkLayout.from_offsets([0, 41], max_visible_chunks=2, query_start=[33], key_start=[28], **RULE)
    assert layout.summary_key_chunk.tolist() == [chunk for chunk in range(5, 10) for _ in range(2)]


def test_a_tensor_of_offsets_gives_the_same_layout_as_a_list():
    expected = ChunkLayout.from_offsets([0, 9, 12], **RULE)
    for dtype in (torch.int32, torch.int64):
        layout = ChunkLayout.from_offsets(torch.tensor([0, 9, 12], dtype=dtype), **RULE)
        assert layout.spans == expected.spans
        assert layout.event_key_offsets.dtype is torch.int64


def test_no_users_is_an_empty_layout():
    layout = ChunkLayout.from_offsets([0], **RULE)
    assert layout.num_users == layout.num_query_events == 0
    assert layout.event_query_index.tolist() == layout.summary_key_chunk.tolist() == []


def test_moving_to_the_same_device_changes_nothing():
    layout = ChunkLayout.from_offsets([0, 9], **RULE)
    assert layout.to("cpu") is layout
    assert layout.to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1: got 0"),
        ({"summaries_per_chunk": -1}, "summaries_per_chunk must be at least 0: got -1"),
        ({"window_chunks": -2}, "window_chunks must be at least 0: got -2"),
        ({"max_visible_chunks": -3}, "max_visible_chunks must be at least 0: got -3"),
        ({"offsets": []}, "offsets must start with 0"),
        ({"offsets": [1, 4]}, "offsets must start with 0"),
        ({"offsets": [0, 9, 8]}, r"offsets must not decrease: user 1 has 9 then 8"),
        ({"offsets": torch.tensor([0.0, 3.0])}, "offsets must be a 1-d tensor of integers"),
        ({"offsets": torch.tensor([[0, 3]])}, "offsets must be a 1-d tensor of integers"),
        ({"query_start": [0]}, "query_start must have one entry a user: expected 2, got 1"),
        ({"query_start": [10, 0]}, r"query_start\[0\] must lie in 0..9, the history's length: got 10"),
        ({"query_start": [0, -1]}, r"query_start\[1\] must lie in 0..3"),
        ({"query_start": [9, 0], "key_start": [2, 0]}, r"key_start\[0\] must be a multiple of chunk_size 4 in 0..4"),
        ({"query_start": [9, 0], "key_start": [8, 0]}, r"key_start\[0\] must be .* got 8"),
        ({"window_chunks": None, "query_start": [9, 0], "key_start": [4, 0]}, r"key_start\[0\] must be .* in 0..0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    arguments = {"offsets": [0, 9, 12], **RULE, **changes}
    with pytest.raises(ShapeError, match=message):
        ChunkLayout.from_offsets(arguments.pop("offsets"), **arguments)
