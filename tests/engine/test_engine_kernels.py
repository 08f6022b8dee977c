"""The reference kernel against autograd on plain formulas, and the choice among kernels."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import AdapterArena, AdapterWeights, ProjectionGroup, ProjectionShape, adapter_layout
from treadle.engine.kernels import choose
from treadle.engine.kernels.base import LoraSegment, PassSegments
from treadle.engine.kernels.segment_loop import SegmentLoop
from treadle.errors import ConfigError

CPU = torch.device("cpu")
GATE_UP = "model.layers.0.mlp.gate_up_proj"
QUERY = "model.layers.0.self_attn.q_proj"
MEMBERS = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
GROUPS = (
    ProjectionGroup(QUERY, (ProjectionShape(QUERY, 32, 48),)),
    ProjectionGroup(GATE_UP, (ProjectionShape(MEMBERS[0], 32, 48), ProjectionShape(MEMBERS[1], 32, 40))),
)


def make_adapter(rank: int, *, train_mlp: bool = True) -> tuple[AdapterWeights, AdapterArena]:
    """Weights without zeros, and an empty gradient."""
    layout = adapter_layout(GROUPS, LoraSpec(rank=rank, seed=rank, train_mlp=train_mlp))
    flat = torch.randn(layout.num_elements, generator=torch.Generator().manual_seed(rank)) * 0.1
    return AdapterWeights(layout, flat, 32 / rank), AdapterArena(layout, torch.zeros_like(flat))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_equal_autograd_and_leave_other_rows_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    (small, small_grads), (large, large_grads) = make_adapter(3), make_adapter(8)
    segments = [
        LoraSegment(small, 2, 9, small_grads),
        LoraSegment(large, 9, 20, large_grads),
        LoraSegment(small, 20, 22, None),
    ]
    x = torch.randn(24, 32, generator=generator).to(dtype)
    y = torch.randn(24, 88, generator=generator).to(dtype)
    dy = torch.randn(24, 88, generator=generator).to(dtype)
    dx = torch.randn(24, 32, generator=generator).to(dtype)
    y_before, dx_before = y.clone(), dx.clone()
    kernel = SegmentLoop()
    kept = kernel.add(x, y, segments, GATE_UP)
    kernel.add_grads(dy, x, kept, dx, segments, GATE_UP)
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        pairs = [
            (segment.adapter.a(m).clone().requires_grad_(), segment.adapter.b(m).clone().requires_grad_())
            for m in MEMBERS
        ]
        x32 = x[rows].float().requires_grad_()
        term = segment.adapter.scale * torch.cat([(x32 @ a.T) @ b.T for a, b in pairs], dim=1)
        # The term joins in float32; one rounding to the base model's dtype follows.
        torch.testing.assert_close(y[rows], (y_before[rows].float() + term.detach()).to(dtype))
        term.backward(dy[rows].float())
        assert x32.grad is not None
        torch.testing.assert_close(dx[rows], (dx_before[rows].float() + x32.grad).to(dtype))
        if segment.grads is not None:
            for module, (a, b) in zip(MEMBERS, pairs, strict=True):
                torch.testing.assert_close(segment.grads.a(module), a.grad, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(segment.grads.b(module), b.grad, rtol=1e-4, atol=1e-5)
    for rows in (slice(0, 2), slice(22, 24)):
        assert torch.equal(y[rows], y_before[rows])
        assert torch.equal(dx[rows], dx_before[rows])
    for grads in (small_grads, large_grads):
        assert not grads.a(QUERY).any()
        assert not grads.b(QUERY).any()


def test_group_that_an_adapter_does_not_change_costs_nothing() -> None:
    weights, grads = make_adapter(2, train_mlp=False)
    y = torch.ones(4, 88)
    segments = [LoraSegment(weights, 0, 4, grads)]
    kept = SegmentLoop().add(torch.ones(4, 32), y, segments, GATE_UP)
    assert kept == [None]
    SegmentLoop().add_grads(y, torch.ones(4, 32), kept, None, segments, GATE_UP)
    assert bool((y == 1).all())
    assert not grads.flat.any()


def test_what_a_pass_prepared_goes_with_it() -> None:
    weights, _ = make_adapter(2)
    first, second = (PassSegments([LoraSegment(weights, 0, 4)]) for _ in range(2))
    first.prepared["a kernel"] = "its table"
    assert second.prepared == {}
    assert list(first) == [first[0]]


def test_every_rank_has_a_line_and_each_device_kind_one_kernel() -> None:
    for device_kind in ("cpu", "cuda"):
        chosen = {choose.chosen_for(device_kind, rank).kernel for rank in (1, 3, 4, 8, 16, 32, 33, 64, 128)}
        assert len(chosen) == 1
        lines = [choice.max_rank for choice in choose.CHOICES if choice.device_kind == device_kind]
        assert lines == sorted(set(lines))
    assert choose.chosen_for("cpu", 5).max_rank == 8
    with pytest.raises(KeyError):
        choose.chosen_for("abacus", 8)


def test_the_choice_is_the_same_every_time_and_can_be_overridden() -> None:
    assert choose.choose_kernel(CPU).name == choose.choose_kernel(CPU, "auto").name == "segment-loop"
    assert choose.choose_kernel(CPU, "grouped-mm").name == "grouped-mm"
    assert choose.available_kernels(CPU)[0] == "segment-loop"


def test_a_kernel_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'loop' is not known; known: auto, segment-loop, grouped-mm, triton"):
        choose.choose_kernel(CPU, "loop")
    with pytest.raises(ConfigError, match="no kernel was chosen for device meta"):
        choose.choose_kernel(torch.device("meta"))


def test_triton_is_refused_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="'triton' cannot run on cpu; usable there: auto, segment-loop, grouped-mm"):
        choose.choose_kernel(CPU, "triton")
    if importlib.util.find_spec("triton") is None:
        assert "triton" not in choose.available_kernels(torch.device("cuda"))
