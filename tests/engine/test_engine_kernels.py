"""The reference kernel against autograd on plain formulas, in float32 and bfloat16, and attention's padding."""

from __future__ import annotations

import pytest
import torch
from engine_builders import make_state

from treadle.domain.ops import LoraSpec
from treadle.engine.attention import PackedCausalAttention
from treadle.engine.base_model import BaseModel
from treadle.engine.kernels import LoraSegment, add_lora, add_lora_grads

MODULE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_equal_autograd_and_leave_other_rows_alone(base: BaseModel, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [make_state(base, LoraSpec(rank=rank, seed=rank)) for rank in (3, 8)]
    segments = [
        LoraSegment(states[0].weights, 2, 9, states[0].new_scratch()),
        LoraSegment(states[1].weights, 9, 20, states[1].new_scratch()),
        LoraSegment(states[0].weights, 20, 22, None),
    ]
    x = torch.randn(24, 32, generator=generator).to(dtype)
    y = torch.randn(24, 48, generator=generator).to(dtype)
    dy = torch.randn(24, 48, generator=generator).to(dtype)
    dx = torch.randn(24, 32, generator=generator).to(dtype)
    y_before, dx_before = y.clone(), dx.clone()
    kept = add_lora(x, y, segments, MODULE)
    add_lora_grads(dy, x, kept, dx, segments, MODULE)
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        a = segment.adapter.a(MODULE).clone().requires_grad_()
        b = segment.adapter.b(MODULE).clone().requires_grad_()
        x32 = x[rows].float().requires_grad_()
        term = segment.adapter.scale * (x32 @ a.T) @ b.T
        # The term joins in float32; one rounding to the base model's dtype follows.
        torch.testing.assert_close(y[rows], (y_before[rows].float() + term.detach()).to(dtype))
        term.backward(dy[rows].float())
        assert x32.grad is not None
        torch.testing.assert_close(dx[rows], (dx_before[rows].float() + x32.grad).to(dtype))
        if segment.grads is not None:
            torch.testing.assert_close(segment.grads.a(MODULE), a.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(segment.grads.b(MODULE), b.grad, rtol=1e-4, atol=1e-5)
    for rows in (slice(0, 2), slice(22, 24)):
        assert torch.equal(y[rows], y_before[rows])
        assert torch.equal(dx[rows], dx_before[rows])


def test_projection_that_an_adapter_does_not_change_costs_nothing(base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=2, seed=0, train_mlp=False))
    y = torch.ones(4, 48)
    assert add_lora(torch.ones(4, 32), y, [LoraSegment(state.weights, 0, 4)], MODULE) == [None]
    assert bool((y == 1).all())


def test_padding_rows_get_zeros_and_sequences_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 16, 8, generator=generator) for _ in range(3))
    attention = PackedCausalAttention([3, 3, 6], 16)
    mixed = attention.attend(0, query, key, value, 0.3)
    assert mixed.shape == (1, 16, 4, 8)
    assert not mixed[:, 12:].any()
    torch.testing.assert_close(mixed[0, 3], value[0, :, 3])
    changed = value.clone()
    changed[:, :, 3:6] += 1
    again = attention.attend(0, query, key, changed, 0.3)
    assert torch.equal(again[:, :3], mixed[:, :3])
    assert torch.equal(again[:, 6:], mixed[:, 6:])
    assert not torch.equal(again[:, 3:6], mixed[:, 3:6])
