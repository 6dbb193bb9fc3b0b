import random

import pytest
import torch

from ksa_kernels import QKV, ChunkLayout, summary_attention
from ksa_kernels.errors import ImplUnavailableError, ShapeError
from ksa_kernels.summary_attention import fused_cpu, small, torch_blocked
from ksa_kernels.testing import error_budget, make_layout, make_qkv, relative_error

from .cases import Case, outputs_and_gradients, random_case

IMPLS = ["reference", "torch"]
RULE = {"chunk_size": 4, "summaries_per_chunk": 2, "window_chunks": 1}


def assert_equal_within(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        if one.numel():
            assert (one - other).abs().max() <= tolerance


@pytest.mark.parametrize("seed", range(8))
def test_torch_equals_reference_forward_and_backward(seed):
    rng = random.Random(seed)
    for draw in range(8):
        case = random_case(rng)
        expected = outputs_and_gradients(case, "reference", seed=draw)
        actual = outputs_and_gradients(case, "torch", seed=draw)
        assert_equal_within(actual[0], expected[0], 1e-10)
        assert_equal_within(actual[1], expected[1], 1e-10)


def test_random_cases_take_every_way_through_the_code(rng):
    layouts = [random_case(rng).layout for _ in range(200)]
    ways = [(small.plan(layout) is not None, fused_cpu.is_dense(layout)) for layout in layouts]
    assert {(True, False), (False, True), (False, False)} <= set(ways)


@pytest.mark.parametrize("lengths", [[300], [1, 0, 299], [64] * 5])
def test_bounded_pieces_give_the_same_sums(lengths, monkeypatch):
    case = Case(lengths, {**RULE, "max_visible_chunks": None}, 2, 1)
    expected = outputs_and_gradients(case, "torch", seed=1)
    monkeypatch.setattr(torch_blocked, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(torch_blocked, "MOST_KEPT", 0)
    actual = outputs_and_gradients(case, "torch", seed=1)
    assert_equal_within(actual[0] + actual[1], expected[0] + expected[1], 1e-12)


def sees(asker, key, k, window, visible):
    """Whether a token sees another, by the rule's words. A token is ("event", i) or ("summary", chunk, slot)."""
    if asker[0] == "summary":
        if key[0] == "event":
            return key[1] // k == asker[1]
        return key[1] == asker[1] and key[2] <= asker[2]
    chunk = asker[1] // k
    if key[0] == "event":
        recent = window is None or key[1] // k >= chunk - window
        return recent and key[1] <= asker[1]
    if window is None:
        return False
    remembered = key[1] < chunk - window
    return remembered and (visible is None or key[1] >= chunk - window - visible)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(3))
def test_visibility_is_the_rule(impl, seed):
    rng = random.Random(seed)
    for _ in range(4):
        n, k, m = rng.randint(1, 60), rng.choice([1, 2, 3, 5, 8]), rng.choice([0, 1, 2])
        window, visible = rng.choice([None, 0, 1, 2]), rng.choice([None, 0, 1, 3])
        layout = make_layout([n], chunk_size=k, summaries_per_chunk=m, window_chunks=window, max_visible_chunks=visible)
        tokens = [("event", i) for i in range(n)] + [("summary", c, j) for c in range(n // k) for j in range(m)]
        count = len(tokens)
        # queries and keys of zeros weigh all visible keys alike; one-hot values then show which they are
        zeros = torch.zeros(count, 1, count, dtype=torch.float64)
        values = torch.eye(count, dtype=torch.float64)[:, None]
        out = summary_attention(
            QKV(zeros[:n], zeros[:n], values[:n]), QKV(zeros[n:], zeros[n:], values[n:]), layout, impl=impl
        )
        found = torch.cat([out.events, out.summaries])[:, 0] > 0
        expected = torch.tensor([[sees(asker, key, k, window, visible) for key in tokens] for asker in tokens])
        assert torch.equal(found, expected)
        lse = torch.cat([out.events_lse, out.summaries_lse])[:, 0]
        assert (lse - expected.sum(1).double().log()).abs().max() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [7, 50, None])
def test_a_window_over_the_whole_history_is_causal_attention(impl, window):
    layout = make_layout([32, 0, 5, 29], chunk_size=4, summaries_per_chunk=1, window_chunks=window)
    events, summaries = make_qkv(layout)
    out = summary_attention(events, summaries, layout, impl=impl)
    for start, stop in [(0, 32), (32, 37), (37, 66)]:
        q, k, v = (each[start:stop].transpose(0, 1) for each in events)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
        assert (out.events[start:stop] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_the_future_never_changes_the_past(impl):
    full, cut = 90, 53
    whole = make_layout([full], max_visible_chunks=5, **RULE)
    past = make_layout([cut], max_visible_chunks=5, **RULE)
    events, summaries = make_qkv(whole, seed=3)
    closed = 2 * (cut // 4)
    expected = summary_attention(
        QKV(*(each[:cut] for each in events)), QKV(*(each[:closed] for each in summaries)), past, impl=impl
    )
    for each in (*events, *summaries):
        assert each.shape[0] > (cut if each.shape[0] == full else closed)
    events = QKV(*(torch.cat([each[:cut], 9 * each[cut:]]) for each in events))
    out = summary_attention(events, summaries, whole, impl=impl)
    assert (out.events[:cut] - expected.events).abs().max() < 1e-12
    assert (out.summaries[:closed] - expected.summaries).abs().max() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_equals_its_users_one_by_one(impl, rng):
    case = random_case(rng)._replace(rule={**RULE, "max_visible_chunks": 3}, lengths=[0, 1, 3, 4, 5, 70, 200])
    layout = case.layout
    events, summaries = make_qkv(layout, seed=5)
    batch = summary_attention(events, summaries, layout, impl=impl)
    first = first_summary = 0
    for n in case.lengths:
        stop, stop_summary = first + n, first_summary + n // 4 * 2
        alone = summary_attention(
            QKV(*(each[first:stop] for each in events)),
            QKV(*(each[first_summary:stop_summary] for each in summaries)),
            make_layout([n], **case.rule),
            impl=impl,
        )
        assert_equal_within([batch.events[first:stop]], [alone.events], 1e-12)
        assert_equal_within([batch.summaries[first_summary:stop_summary]], [alone.summaries], 1e-12)
        first, first_summary = stop, stop_summary


@pytest.mark.parametrize("seed", range(4))
def test_queries_on_top_of_a_state_equal_rows_of_the_full_computation(seed):
    rng = random.Random(seed)
    for _ in range(6):
        n, k, m = rng.randint(1, 120), rng.choice([1, 3, 4, 8]), rng.choice([0, 1, 2])
        window, visible = rng.choice([None, 0, 1, 2]), rng.choice([None, 0, 1, 3])
        start = rng.choice([0, n - 1, n, rng.randint(0, n)])
        rule = {
            "chunk_size": k,
            "summaries_per_chunk": m,
            "window_chunks": window,
            "max_visible_chunks": visible,
        }
        whole = make_layout([n], **rule)
        key_start = 0 if window is None else max(0, start // k - window) * k
        rest = make_layout([n], query_start=[start], key_start=[key_start], **rule)
        events, summaries = make_qkv(whole, num_heads=4, num_kv_heads=2, seed=seed)
        expected = summary_attention(events, summaries, whole, impl="torch")
        asking, given = start // k * m, rest.spans[0].first_key_chunk * m
        out = summary_attention(
            QKV(events.query[start:], events.key[key_start:], events.value[key_start:]),
            QKV(summaries.query[asking:], summaries.key[given:], summaries.value[given:]),
            rest,
            impl="torch",
        )
        assert_equal_within([out.events, out.events_lse], [expected.events[start:], expected.events_lse[start:]], 1e-12)
        assert_equal_within([out.summaries], [expected.summaries[asking:]], 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_leaving_out_summaries_that_no_event_sees_changes_no_event(impl, rng):
    for _ in range(6):
        lengths, window = [rng.choice([0, 1, 30, rng.randint(0, 90)]) for _ in range(3)], rng.choice([0, 1, 3, None])
        rule = {"chunk_size": rng.choice([1, 4, 7]), "summaries_per_chunk": 2, "window_chunks": window}
        layout, less = (make_layout(lengths, unseen_summaries=unseen, **rule) for unseen in (True, False))
        events, summaries = make_qkv(layout, requires_grad=True, seed=rng.randint(0, 10**6))
        expected = summary_attention(events, summaries, layout, impl=impl).events
        seen = torch.cat([torch.zeros(0, dtype=torch.bool), *(_is_seen(span, layout) for span in layout.spans)])
        kept = QKV(*(each[seen] for each in summaries))
        assert less.num_query_summaries == int(seen.sum())
        out = summary_attention(events, kept, less, impl=impl).events
        assert_equal_within([out], [expected], 1e-12)
        weights = torch.randn_like(expected)
        gradients = (
            torch.autograd.grad((each * weights).sum(), [*events, *summaries[1:]], materialize_grads=True)
            for each in (out, expected)
        )
        assert_equal_within(*gradients, 1e-11)


def _is_seen(span, layout):
    """Whether the history's last event sees each of its summaries through the window; then some event does."""
    n, k, m, window = span.num_events, layout.chunk_size, layout.summaries_per_chunk, layout.window_chunks
    seen = [sees(("event", n - 1), ("summary", chunk, 0), k, window, None) for chunk in range(n // k)]
    return torch.tensor(seen, dtype=torch.bool).repeat_interleave(m)


@torch.no_grad()
def test_one_event_attends_in_place_to_summaries_behind_the_window(rng):
    for _ in range(20):
        n = rng.randint(1, 60)
        start = max(0, (n - 1) // 4 - 1) * 4
        layout = ChunkLayout.from_offsets([0, n], **RULE, query_start=[n - 1], key_start=[start])
        num_events, num_summaries = layout.num_key_events, layout.num_key_summaries
        rows = torch.randn(num_events + num_summaries, 2, 1, 8, dtype=torch.float64)
        queries = [torch.randn(size, 2, 8, dtype=torch.float64) for size in (1, layout.num_query_summaries)]
        together = rows[:num_events], rows[num_events:]
        apart = [part.clone() for part in together]
        outputs = [
            summary_attention(*(QKV(q, *kv.unbind(1)) for q, kv in zip(queries, parts)), layout, impl=impl)
            for parts, impl in ((together, "torch"), (apart, "torch"), (apart, "reference"))
        ]
        assert_equal_within(outputs[0], outputs[2], 1e-12)
        assert_equal_within(outputs[1], outputs[2], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_lower_precision_stays_within_its_budget(dtype, impl):
    case = Case([0, 3, 40, 170], {**RULE, "window_chunks": 2}, 4, 2)
    exact, _ = make_qkv_pair(case, torch.float64)
    layout = case.layout
    events, summaries = make_qkv(layout, num_heads=4, num_kv_heads=2, dtype=dtype)
    out = summary_attention(events, summaries, layout, impl=impl)
    assert out.events.dtype is dtype
    assert out.events_lse.dtype is torch.float32
    for actual, expected in zip(out, exact, strict=True):
        assert relative_error(actual, expected) <= error_budget(dtype)


def make_qkv_pair(case, dtype):
    layout = case.layout
    inputs = make_qkv(layout, num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, dtype=dtype)
    return summary_attention(*inputs, layout, impl="reference"), inputs


def test_gradients_pass_gradcheck():
    for rule in ({**RULE, "max_visible_chunks": 2}, {**RULE, "summaries_per_chunk": 0, "window_chunks": None}):
        layout = make_layout([26, 3, 5], **rule)
        assert small.plan(layout) is None
        events, summaries = make_qkv(layout, head_dim=2, num_heads=2, num_kv_heads=1, requires_grad=True)

        def run(*tensors, layout=layout):
            return tuple(summary_attention(QKV(*tensors[:3]), QKV(*tensors[3:]), layout, impl="torch"))

        assert torch.autograd.gradcheck(run, (*events, *summaries), fast_mode=True)


def kept_bytes(length: int) -> int:
    layout = make_layout([length], chunk_size=16, summaries_per_chunk=1, window_chunks=2)
    events, summaries = make_qkv(layout, num_heads=1, head_dim=8, dtype=torch.float32, requires_grad=True)
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        summary_attention(events, summaries, layout, impl="torch")
    return kept


def test_memory_kept_for_the_backward_pass_is_linear_in_the_length():
    short, long = kept_bytes(1024), kept_bytes(4096)
    assert long <= 4.01 * short
    assert long < 4096 * 8 * 4 * 8, "a few copies of one [N, D] tensor"


def test_layouts_without_summaries_take_none_for_them():
    layout = make_layout([9, 3], chunk_size=4, summaries_per_chunk=0, window_chunks=1)
    events, summaries = make_qkv(layout)
    out = summary_attention(events, None, layout)
    assert torch.equal(out.events, summary_attention(events, summaries, layout).events)
    assert out.summaries.shape == (0, 2, 16)


def test_no_events_at_all_give_empty_outputs():
    layout = make_layout([0, 0], **RULE)
    for impl in IMPLS:
        out = summary_attention(*make_qkv(layout), layout, impl=impl)
        assert [tuple(each.shape) for each in out] == [(0, 2, 16), (0, 2, 16), (0, 2), (0, 2)]


def bad_inputs():
    layout = make_layout([9, 3], **RULE)
    events, summaries = make_qkv(layout, num_heads=4, num_kv_heads=2)
    strided = torch.randn(12, 4, 32, dtype=torch.float64)[..., ::2]
    return layout, events, summaries, strided


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda e, s, _: (e._replace(query=e.query[:-1]), s),
            r"events.query must have shape \[12, 4, 16\].*\[11, 4, 16\]",
        ),
        (
            lambda e, s, _: (e._replace(value=e.value[:-1]), s),
            r"events.value must have shape \[12, 2, 16\].*\[11, 2, 16\]",
        ),
        (lambda e, s, _: (e, s._replace(key=s.key[1:])), r"summaries.key must have shape \[4, 2, 16\].*\[3, 2, 16\]"),
        (lambda e, s, _: (e, None), r"summaries.query must have shape \[4, 4, 16\].*\[0, 4, 16\]"),
        (lambda e, s, _: (e._replace(query=e.query[0]), s), r"events.query must be \[rows, H, D\]"),
        (
            lambda e, s, _: (e._replace(key=e.key[:, [0, 0, 0]]), s),
            r"H_kv a divisor of events.query's H = 4.*12, 3, 16",
        ),
        (
            lambda e, s, _: (e._replace(key=e.key.float()), s),
            r"events.key must have .* dtype torch.float64: got torch.float32",
        ),
        (lambda e, s, _: (QKV(*(x.int() for x in e)), s), r"events.query must be float16.*got torch.int32"),
        (lambda e, s, x: (e._replace(query=x), s), r"events.query must be contiguous .* expected stride 1, got 2"),
        (
            lambda e, s, _: (QKV(*(x.to("meta") for x in e)), s),
            r"layout must be on events.query's device meta: got cpu",
        ),
        (
            lambda e, s, _: (e, s._replace(value=s.value.to("meta"))),
            r"summaries.value must be on events.query's device",
        ),
    ],
)
def test_tensors_that_disagree_are_refused_by_name(spoil, message):
    layout, events, summaries, strided = bad_inputs()
    with pytest.raises(ShapeError, match=message):
        summary_attention(*spoil(events, summaries, strided), layout)


def test_an_implementation_that_cannot_run_here_is_refused():
    layout, events, summaries, _ = bad_inputs()
    with pytest.raises(ImplUnavailableError, match="got 'flash'"):
        summary_attention(events, summaries, layout, impl="flash")
