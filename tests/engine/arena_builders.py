"""Runs without a base model: what arenas and optimiser need to know of one is its projections' shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import ProjectionGroup, ProjectionShape
from treadle.engine.arenas import ArenaPool
from treadle.engine.state import TrainingState, commit_scratch, new_training_state

CPU = torch.device("cpu")
# Odd sizes, so that arenas have alignment gaps.
GROUPS = (
    ProjectionGroup(
        "model.layers.0.self_attn.qkv",
        tuple(
            ProjectionShape(f"model.layers.0.self_attn.{leaf}", 13, size)
            for leaf, size in (("q_proj", 11), ("k_proj", 5), ("v_proj", 5))
        ),
    ),
    ProjectionGroup("lm_head", (ProjectionShape("lm_head", 13, 29),)),
)


@dataclass(frozen=True)
class ShapesOnly:
    """A base model's shapes with a pool of its own."""

    groups: Sequence[ProjectionGroup] = GROUPS
    device: torch.device = CPU
    arenas: ArenaPool = field(default_factory=lambda: ArenaPool(CPU))


def make_run(base: ShapesOnly, rank: int, seed: int) -> TrainingState:
    """A fresh run whose B is not zero."""
    state = new_training_state(base, LoraSpec(rank=rank, seed=seed))
    for module in state.weights.modules:
        b = state.weights.b(module)
        b.copy_(torch.empty(b.shape).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed)))
    return state


def random_gradient(state: TrainingState, seed: int, *, size: float = 1.0) -> torch.Tensor:
    """A gradient that depends on seed and layout alone."""
    return torch.randn(state.layout.num_elements, generator=torch.Generator().manual_seed(seed)) * size


def add_gradient(state: TrainingState, gradient: torch.Tensor) -> None:
    """Commit a copy of `gradient`, as an op does it."""
    scratch = state.new_scratch()
    scratch.flat.add_(gradient)
    commit_scratch(state, scratch)


def numbers(state: TrainingState) -> tuple[torch.Tensor, ...]:
    """Copies of all that a step may change."""
    grads = () if state.grads is None else (state.grads.flat.clone(),)
    return (state.weights.flat.clone(), state.exp_avg.clone(), state.exp_avg_sq.clone(), *grads)


def assert_same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
    """Bit for bit, NaN included."""
    for ours, theirs in zip(left, right, strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
