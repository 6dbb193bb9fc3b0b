"""Recorded passes are passes: padded to their sizes they leave the rows and give the answers of those that are not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from memories import all_rows, arrive, build, draw_history, relative, small_config

from recsys_ksa.config import ModelConfig
from recsys_ksa.model.append import Arrivals, append_events, ask, empty_memory
from recsys_ksa.model.network import Network
from recsys_ksa.model.pages import PagePool
from recsys_ksa.model.state import UserMemory

HERE = Path(__file__).parent


def check(network: Network, rng: np.random.Generator, impl: str, bound: float, most: int, steps: int) -> None:
    """Random users of a growing crowd get events; beside each recorded pass the same is done without pages."""
    from recsys_ksa.model.recorded import Recorder

    config, device = network.config, network.start.device
    pool = PagePool(config, 1 << 24, network.state_dtype, network.dtype, device)
    pool.recorder = Recorder(network, pool, impl)

    def arrivals(counts: list[int]) -> Arrivals:
        part = arrive(*[draw_history(rng, count) for count in counts])
        assert part.event_type is not None
        columns = (part.item_index, part.event_type, part.gap_bucket)
        return Arrivals(part.counts, *(column.to(device) for column in columns))

    plain: list[UserMemory] = [empty_memory(network)]
    paged: list[UserMemory] = [pool.empty]
    for _ in range(steps):
        plain.append(empty_memory(network))
        paged.append(pool.empty)
        chosen = rng.permutation(len(plain))[: int(rng.integers(1, len(plain) + 1))].tolist()
        more = arrivals([int(rng.integers(1, most + 1)) if rng.random() < 0.5 else 1 for _ in chosen])
        grown = append_events(network, [plain[at] for at in chosen], more, "torch")
        held = append_events(network, [paged[at] for at in chosen], more, impl, pool)
        for at, one, other in zip(chosen, grown, held):
            plain[at], paged[at] = one, other
        buckets = rng.integers(0, 40, len(plain)).tolist()
        assert relative(ask(network, paged, buckets, impl, pool=pool), ask(network, plain, buckets, "torch")) < bound
    for one, other in zip(plain, paged):
        assert one.num_events == other.num_events
        if one.num_events:
            assert relative(all_rows(other).float(), all_rows(one).float()) < bound
            assert relative(other.last_input[None], one.last_input[None]) < bound


def random_config(rng: np.random.Generator) -> ModelConfig:
    return small_config(
        chunk_size=int(rng.integers(2, 6)),
        window_chunks=int(rng.integers(0, 4)),
        summaries_per_chunk=int(rng.integers(1, 4)),
        max_visible_chunks=None if rng.random() < 0.5 else int(rng.integers(0, 4)),
        layers=["summary"] * int(rng.integers(1, 4)),
        attention=str(rng.choice(["summary", "summary", "window"])),
        head_dim=16,
    )


def test_recorded_passes_equal_others_in_the_interpreter(seed: int) -> None:
    pytest.importorskip("triton")
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import numpy as np, torch
from ksa_kernels.summary_append import triton_append
from test_recorded import build, check, random_config
torch.set_num_threads(1)
triton_append.MOST_SPLITS = 2
rng = np.random.default_rng({seed})
check(build(random_config(rng), 0).float(), rng, "triton", 1e-4, most=5, steps=3)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_one_pass_sets_the_next_does_not_find() -> None:
    pytest.importorskip("triton")
    from recsys_ksa.model.recorded import Numbers

    numbers = Numbers(torch.int64, torch.device("cpu"), {"rows": (5,), "table": (3, 2)}, {"rows": 9})
    numbers.set(rows=np.arange(5), table=np.ones((3, 2), np.int64))
    numbers.set(rows=np.array([7]), table=np.full((1, 2), 4))
    assert numbers["rows"].tolist() == [7, 9, 9, 9, 9]
    assert numbers["table"].tolist() == [[4, 4], [0, 0], [0, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_recorded_passes_equal_others(dtype: torch.dtype, bound: float, seed: int, rng: np.random.Generator) -> None:
    for turn in range(4):
        network = build(random_config(rng), seed % 2**31 + turn).float().cuda()
        network.precision = "bf16" if dtype is torch.bfloat16 else "float32"
        check(network, rng, "triton", bound, most=40, steps=20)
