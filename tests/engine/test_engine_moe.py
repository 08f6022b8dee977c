"""Sorting rows by expert, and the experts' LoRA terms against autograd on plain formulas."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine_builders import load_tiny, make_model_dir, make_state
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.domain.limits import PACK_MULTIPLE
from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import AdapterWeights, ProjectionGroup, ProjectionShape, adapter_layout
from treadle.engine.base_model import BaseModel
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.kernels.experts import ExpertLoop, ExpertRun
from treadle.engine.moe import MoeMlp, Router, dispatch

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny(make_model_dir(tmp_path_factory.mktemp("moe"), "qwen3_moe", tied=True))


@pytest.fixture(scope="module")
def weights(moe: BaseModel) -> AdapterWeights:
    return make_state(moe, LoraSpec(rank=3, seed=0)).weights


def test_every_layer_has_a_group_for_each_fused_weight(moe: BaseModel) -> None:
    sparse = [group for group in moe.groups if group.num_experts]
    assert [group.name for group in sparse] == [
        f"model.layers.{layer}.mlp.experts.{leaf}" for layer in range(2) for leaf in ("gate_up_proj", "down_proj")
    ]
    assert [(group.in_features, group.out_features) for group in sparse[:2]] == [(32, 48), (24, 32)]
    assert not any("mlp.gate" in group.name for group in moe.groups), "the router has no adapter"
    spec = LoraSpec(rank=2, seed=0, train_mlp=False)
    assert not any(".mlp." in module for module in make_state(moe, spec).weights.modules)


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Experts of each row, and disjoint spans of rows in order, some of them next to one another."""
    num_rows = PACK_MULTIPLE * draw(st.integers(1, 3))
    num_choices = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**32))
    scores = torch.rand(num_rows, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    # All rows may like the same few experts, so that others have none.
    scores[:, : draw(st.integers(0, NUM_EXPERTS - num_choices))] = 0
    cuts = sorted(draw(st.lists(st.integers(0, num_rows), min_size=2, max_size=6, unique=True)))
    spans = [(start, stop) for start, stop in pairwise(cuts) if draw(st.booleans())]
    return scores.topk(num_choices, dim=1).indices, spans


@settings(max_examples=60, deadline=None)
@given(routing=routings())
def test_rows_are_sorted_by_expert_and_found_again(
    weights: AdapterWeights, routing: tuple[torch.Tensor, list[tuple[int, int]]]
) -> None:
    experts, spans = routing
    segments = [LoraSegment(weights, start, stop) for start, stop in spans]
    plan = dispatch(experts, segments, NUM_EXPERTS)
    num_rows, num_choices = experts.shape
    assert len(set(plan.places_TK.reshape(-1).tolist())) == num_rows * num_choices
    for row in range(num_rows):
        for choice in range(num_choices):
            place = int(plan.places_TK[row, choice])
            assert int(plan.rows_P[place]) == row
            expert = int(experts[row, choice])
            assert (0, *plan.stops)[expert] <= place < plan.stops[expert]
    assert plan.stops[-1] == plan.rows_P.shape[0]
    assert plan.stops_E.tolist() == list(plan.stops)
    assert all(stop % PACK_MULTIPLE == 0 for stop in plan.stops)
    of_runs = {(id(run.segment), run.expert): plan.rows_P[run.start : run.stop].tolist() for run in plan.runs}
    assert len(of_runs) == len(plan.runs)
    expected = {
        (id(segment), expert): [row for row in range(segment.start, segment.stop) if expert in experts[row].tolist()]
        for segment in segments
        for expert in range(NUM_EXPERTS)
    }
    assert of_runs == {key: rows for key, rows in expected.items() if rows}
    copies = plan.spread(torch.arange(num_rows, dtype=torch.float32)[:, None])
    summed = plan.gather(copies, torch.ones(num_rows, 1))
    torch.testing.assert_close(summed[:, 0], torch.arange(num_rows, dtype=torch.float32) * num_choices + 1)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_router_backward_equals_autograd(is_normalised: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(NUM_EXPERTS, 12, generator=generator, dtype=torch.float32)
    n = torch.randn(16, 12, generator=generator).requires_grad_()
    d_weights = torch.randn(16, 3, generator=generator)
    experts, chosen, probs = Router(weight, 3, is_normalised).forward(n.detach())
    best, indices = (n @ weight.T).softmax(-1).topk(3, dim=-1)
    if is_normalised:
        best = best / best.sum(-1, keepdim=True)
    assert torch.equal(experts, indices)
    torch.testing.assert_close(chosen, best.detach())
    best.backward(d_weights)
    ours = Router(weight, 3, is_normalised).backward(d_weights, experts, probs)
    torch.testing.assert_close(ours, n.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [GATE_UP, DOWN])
def test_runs_equal_autograd_and_leave_other_rows_alone(moe: BaseModel, dtype: torch.dtype, group: str) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [make_state(moe, LoraSpec(rank=rank, seed=rank)) for rank in (3, 8)]
    trained = LoraSegment(states[0].weights, 0, 9, states[0].new_scratch())
    served = LoraSegment(states[1].weights, 9, 12, None)
    runs = [ExpertRun(trained, 1, 0, 2), ExpertRun(served, 1, 2, 3), ExpertRun(trained, 6, 16, 27)]
    num_inputs, num_outputs = (32, 48) if group == GATE_UP else (24, 32)
    x, y = (torch.randn(32, size, generator=generator).to(dtype) for size in (num_inputs, num_outputs))
    dx, dy = (torch.randn(32, size, generator=generator).to(dtype) for size in (num_inputs, num_outputs))
    y_before, dx_before = y.clone(), dx.clone()
    kernel = ExpertLoop()
    kept = kernel.add(x, y, runs, group)
    kernel.add_grads(dy, x, kept, dx, runs, group)
    for run in runs:
        rows = slice(run.start, run.stop)
        rank = run.segment.adapter.layout.rank
        own = slice(run.expert * rank, (run.expert + 1) * rank)
        a = run.segment.adapter.a(group)[own].clone().requires_grad_()
        b = run.segment.adapter.b(group)[:, own].clone().requires_grad_()
        x32 = x[rows].float().requires_grad_()
        term = run.segment.adapter.scale * (x32 @ a.T) @ b.T
        # The term joins in float32; one rounding to the base model's dtype follows.
        torch.testing.assert_close(y[rows], (y_before[rows].float() + term.detach()).to(dtype))
        term.backward(dy[rows].float())
        assert x32.grad is not None
        torch.testing.assert_close(dx[rows], (dx_before[rows].float() + x32.grad).to(dtype))
        if run.segment.grads is not None:
            torch.testing.assert_close(run.segment.grads.a(group)[own], a.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(run.segment.grads.b(group)[:, own], b.grad, rtol=1e-4, atol=1e-5)
    others = torch.ones(32, dtype=torch.bool)
    others[[*range(3), *range(16, 27)]] = False
    assert torch.equal(y[others], y_before[others])
    assert torch.equal(dx[others], dx_before[others])
    assert trained.grads is not None
    untouched = torch.ones(NUM_EXPERTS * 3, dtype=torch.bool)
    untouched[[*range(3, 6), *range(18, 21)]] = False
    assert not trained.grads.a(group)[untouched].any(), "experts without rows have no gradient"


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_a_row_has_the_same_bits_in_a_run_of_any_length(
    request: pytest.FixtureRequest, rank: int, num_threads: int
) -> None:
    """In sampling a run may be one row, or many, depending on what else the tenant samples."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(2)
    # More inputs than a few vector registers hold: short sums have one order only.
    x, y = torch.randn(32, 200, generator=generator), torch.randn(32, 48, generator=generator)
    group = ProjectionGroup(GATE_UP, (ProjectionShape(GATE_UP, 200, 48),), NUM_EXPERTS)
    layout = adapter_layout([group], LoraSpec(rank=rank, seed=0))
    segment = LoraSegment(AdapterWeights(layout, torch.randn(layout.num_elements, generator=generator), 1.0), 0, 32)

    def rows_of_run(start: int, stop: int) -> torch.Tensor:
        out = y.clone()
        ExpertLoop().add(x, out, [ExpertRun(segment, 5, start, stop)], GATE_UP)
        return out[start:stop]

    whole = rows_of_run(0, 32)
    assert not torch.equal(whole, y)
    for start in range(32):
        for stop in range(start + 1, min(33, start + 13)):
            assert torch.equal(rows_of_run(start, stop), whole[start:stop]), (start, stop)


def test_an_adapter_without_experts_adds_nothing(moe: BaseModel) -> None:
    state = make_state(moe, LoraSpec(rank=2, seed=0, train_mlp=False))
    runs = [ExpertRun(LoraSegment(state.weights, 0, 16), 0, 0, 16)]
    y = torch.ones(16, 48)
    assert ExpertLoop().add(torch.ones(16, 32), y, runs, GATE_UP) == [None]
    assert bool((y == 1).all())


def test_dense_layers_stay_dense_where_the_configuration_says_so(tmp_path: Path) -> None:
    base = load_tiny(make_model_dir(tmp_path, "qwen3_moe_mixed", tied=True))
    assert [isinstance(block.mlp, MoeMlp) for block in base.transformer.blocks] == [True, False]
