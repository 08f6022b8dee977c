"""Recomputing instead of keeping changes memory and time, never a bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_builders import load_tiny, make_datums, make_state, quantum_of

from treadle.domain.ops import LoraSpec
from treadle.engine.attention import PackedCausalAttention
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.passes import QuantumResult, run_micro_batch

# What each of two runs trains; the second leaves whole layers' halves without gradients of their own.
SPECS = (
    LoraSpec(rank=8, seed=1),
    LoraSpec(rank=3, seed=2, train_attn=False, train_unembed=False),
    LoraSpec(rank=5, seed=3, train_mlp=False),
    LoraSpec(rank=2, seed=4, train_attn=False, train_mlp=False),
)


def gradients(base: BaseModel, recompute: Recompute) -> tuple[list[QuantumResult], list[torch.Tensor]]:
    rng = np.random.default_rng(6)
    quanta = [quantum_of(make_state(base, spec), make_datums(rng, [40, 1, 17]), "cross_entropy") for spec in SPECS]
    results = run_micro_batch(base, quanta, recompute=recompute)
    return results, [quantum.scratch.flat for quantum in quanta if quantum.scratch is not None]


@pytest.mark.parametrize(("architecture", "dtype"), [("qwen3", "float32"), ("llama", "float32"), ("qwen3", "bfloat16")])
@pytest.mark.parametrize("recompute", [Recompute.SELECTIVE, Recompute.FULL])
def test_recomputing_gives_the_same_bits(
    model_dir_of: Callable[[str, bool], Path], architecture: str, dtype: str, recompute: Recompute
) -> None:
    base = load_tiny(model_dir_of(architecture, True), dtype=dtype)
    kept_results, kept = gradients(base, Recompute.NONE)
    results, computed_again = gradients(base, recompute)
    for ours, theirs in zip(computed_again, kept, strict=True):
        assert ours.abs().max() > 0
        assert torch.equal(ours, theirs)
    for result, reference in zip(results, kept_results, strict=True):
        assert result.metrics == reference.metrics


def test_recomputing_keeps_less(base: BaseModel) -> None:
    kept = [saved_bytes(base, recompute) for recompute in (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)]
    assert kept[0] > kept[1] > kept[2] > 0


def saved_bytes(base: BaseModel, recompute: Recompute) -> int:
    """Bytes of the distinct tensors that one forward hands to autograd for its backward."""
    num_rows = 64
    state = make_state(base, LoraSpec(rank=4, seed=0))
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base.forward_hidden(
            torch.zeros(num_rows, dtype=torch.int64),
            torch.arange(num_rows),
            attention=PackedCausalAttention([num_rows], num_rows),
            segments=[LoraSegment(state.weights, 0, num_rows, state.new_scratch())],
            recompute=recompute,
        )
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}.values())
