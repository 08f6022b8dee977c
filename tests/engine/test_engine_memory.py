"""What passes cost, what fits, and how limits shrink: measured against passes that really run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_builders import load_tiny
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.ops import LoraSpec
from treadle.engine import memory
from treadle.engine.adapter import AdapterArena, AdapterWeights, adapter_layout
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.head import piece_rows
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.memory import (
    PassCost,
    PassLimits,
    available_host_bytes,
    is_out_of_memory,
    measure_pass_cost,
    pass_limits,
)


def peak_of_pass(base: BaseModel, num_tokens: int, recompute: Recompute) -> int:
    layout = adapter_layout(base.groups, LoraSpec(rank=8, seed=0))
    weights = AdapterWeights(layout, torch.zeros(layout.num_elements), 1.0)
    grads = AdapterArena(layout, torch.zeros(layout.num_elements))
    with memory._peak_bytes(base.device) as peak:
        memory._run_trunk(base, LoraSegment(weights, 0, num_tokens, grads), recompute)
    return peak.num_bytes


@pytest.mark.parametrize("recompute", Recompute)
def test_cost_of_small_passes_foretells_that_of_long_ones(base: BaseModel, recompute: Recompute) -> None:
    cost = measure_pass_cost(base)
    measured = peak_of_pass(base, 256, recompute)
    foretold = cost.num_bytes(256, recompute) - cost.fixed_bytes
    assert measured <= foretold <= measured * memory._MARGIN * 1.02


def test_stronger_recompute_costs_less(base: BaseModel) -> None:
    cost = measure_pass_cost(base).bytes_per_token
    assert cost[Recompute.NONE] > cost[Recompute.SELECTIVE] > cost[Recompute.FULL] > 0


def test_a_pass_without_recompute_keeps_at_least_each_layers_activations(base: BaseModel) -> None:
    """A lower bound by hand: input, normed input and q, k, v; input, normed input, gate, up, their product."""
    config = base.config
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * base.head_dim
    floats = base.num_layers * (4 * base.hidden_size + heads + 3 * config.intermediate_size)
    assert measure_pass_cost(base).bytes_per_token[Recompute.NONE] > 4 * floats


def test_below_float32_a_pass_costs_less_and_the_head_casts(base: BaseModel, model_dir: Path) -> None:
    full = measure_pass_cost(base)
    half = measure_pass_cost(load_tiny(model_dir, dtype="bfloat16"))
    assert half.bytes_per_token[Recompute.NONE] < full.bytes_per_token[Recompute.NONE]
    assert full.fixed_bytes == 4 * piece_rows(base.vocab_size) * base.vocab_size
    assert half.fixed_bytes == 6 * piece_rows(base.vocab_size) * base.vocab_size


def test_live_tensors_are_counted_once_and_until_they_go() -> None:
    given_tensor = torch.zeros(1_000)
    with memory._LiveTensors() as live:
        made = torch.ones(1_000)
        view = made[:500].view(50, 10)
        view.add_(given_tensor[:500].view(50, 10))
        given_tensor.mul_(2)
        assert live.peak_bytes == 4_000
        del made
        torch.empty(1_000)
        assert live.peak_bytes == 8_000, "the view keeps the memory"
        del view
        torch.empty(2_000)
        assert live.peak_bytes == 8_000


COST = PassCost({Recompute.NONE: 1_000.0, Recompute.SELECTIVE: 500.0, Recompute.FULL: 100.0}, fixed_bytes=50_000)


def test_limits_fill_the_room(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_room_bytes", lambda device: 1_050_000)
    assert pass_limits(base, COST) == PassLimits(packed=992, none=992, selective=2_000, full=10_000)
    for mode, limit in ((Recompute.NONE, 992), (Recompute.SELECTIVE, 2_000), (Recompute.FULL, 10_000)):
        assert COST.num_bytes(limit, mode) <= 1_050_000


def test_packs_stay_small_where_a_lone_quantum_may_be_large(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_room_bytes", lambda device: 2**31)
    limits = pass_limits(base, COST)
    assert COST.num_bytes(limits.packed, Recompute.NONE) <= memory._MAX_CPU_PACK_BYTES
    assert limits.packed < limits.none


def test_no_room_at_all_still_leaves_a_block_of_rows(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_room_bytes", lambda device: 0)
    assert pass_limits(base, COST) == PassLimits(packed=16, none=16, selective=16, full=16)


@pytest.mark.parametrize("asked", [100, 1_500, 50_000])
def test_an_operators_pack_is_honoured(base: BaseModel, monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    monkeypatch.setattr(memory, "_room_bytes", lambda device: 1_050_000)
    limits = pass_limits(base, COST, micro_batch_tokens=asked)
    assert limits.packed == asked
    assert limits.none == max(992, asked)
    assert limits.full == max(10_000, asked)


LIMITS = PassLimits(packed=100, none=200, selective=400, full=800)


def test_modes_follow_the_limits() -> None:
    expected = {1: "none", 200: "none", 201: "selective", 400: "selective", 401: "full", 5_000: "full"}
    assert {tokens: LIMITS.mode_of(tokens).value for tokens in expected} == expected


@given(st.lists(st.tuples(st.integers(1, 800), st.integers(1, 8)), max_size=40))
def test_every_out_of_memory_leads_to_a_weaker_try_until_none_is_left(failures: list[tuple[int, int]]) -> None:
    strength = list(Recompute)
    limits = lasting = LIMITS
    for num_tokens, num_quanta in failures:
        before = limits.mode_of(num_tokens)
        # The limits' own assertions keep their order.
        limits = limits.below(num_tokens, num_quanta)
        if num_quanta > 1:
            assert limits.packed < num_tokens
        elif before is not Recompute.FULL:
            assert strength.index(limits.mode_of(num_tokens)) > strength.index(before)
        earlier, lasting = lasting, lasting.towards(limits)
        assert limits.full == lasting.full == LIMITS.full
        for name in ("packed", "none", "selective"):
            fallen = getattr(lasting, name)
            assert fallen >= getattr(limits, name)
            assert getattr(earlier, name) // 2 <= fallen <= getattr(earlier, name)


def test_what_allocators_raise_is_recognised() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(10**16)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(10**17)
    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(of_numpy.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(OSError("not enough memory"))


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  16000 kB\nMemFree:  100 kB\nMemAvailable:  8000 kB\n"}
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(MEMINFO, 8_000 * 1024, id="machine"),
        pytest.param(
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "1000\n",
                f"{V2}/a/memory.max": "5000\n",
                f"{V2}/a/memory.current": "3000\n",
                f"{V2}/a/memory.stat": "anon 2000\ninactive_file 700\n",
            },
            2_700,
            id="v2, the limit is the parent's, cache counts as free",
        ),
        pytest.param(
            {
                **MEMINFO,
                "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/1234\n",
                f"{V1}/memory.limit_in_bytes": "9000\n",
                f"{V1}/memory.usage_in_bytes": "4000\n",
                f"{V1}/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
            },
            5_500,
            id="v1 in a container, the path is the host's",
        ),
        pytest.param(
            {
                **MEMINFO,
                "proc/self/cgroup": "4:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "4000\n",
            },
            8_000 * 1024,
            id="v1 without a limit",
        ),
        pytest.param(
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/\n",
                f"{V2}/memory.max": "1000\n",
                f"{V2}/memory.current": "4000\n",
            },
            0,
            id="over the limit",
        ),
    ],
)
def test_available_memory_is_the_least_that_anybody_grants(
    tmp_path: Path, files: Mapping[str, str], expected: int
) -> None:
    assert available_host_bytes(machine(tmp_path, files)) == expected


def test_a_machine_that_tells_nothing_gets_a_careful_guess(tmp_path: Path) -> None:
    guessed = available_host_bytes(tmp_path)
    assert guessed >= available_host_bytes() // 4 > 0
