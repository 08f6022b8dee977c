"""A run's training state: adapter, moments, open gradient; how a fresh one is made, how gradients join it.

It knows no requests, files or neighbours.
Invariant: a fresh run depends on its seed and the projections' names alone, never on the global generator, on the
order of creation, on other runs or on who had its memory before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import AdapterArena, AdapterLayout, AdapterWeights, ProjectionGroup, adapter_layout
from treadle.engine.arenas import ArenaPool, Block, GradientArena, RankClass
from treadle.errors import NonFiniteResult

# Squares of gradients up to this norm are finite in float32, so the second moments are.
MAX_GRAD_NORM = 1e18


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """Bounds that no number of a run exceeds in absolute value: its weights, exp_avg, exp_avg_sq. inf: not bounded."""

    weights: float
    exp_avg: float
    exp_avg_sq: float


@dataclass(slots=True, eq=False)
class TrainingState:
    """Everything a run's future depends on; mutable, owned by one worker.

    grads: the open gradient, summed over the committed passes since the last step, or None when there is none.
    exp_avg, exp_avg_sq: AdamW's moments, flat like the weights. step: steps taken.
    num_open_passes: committed passes since the last step.
    magnitudes: what the optimiser knows of the tensors' sizes, None when it must look; whoever writes into the
    tensors otherwise sets it to None.
    rank_class, slot: where scratches come from and where the tensors lie; a state over tensors of somebody else's
    has no slot and, until it needs one, no class.
    """

    spec: LoraSpec
    weights: AdapterWeights
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grads: AdapterArena | None = None
    step: int = 0
    num_open_passes: int = 0
    magnitudes: Magnitudes | None = None
    rank_class: RankClass | None = field(default=None, repr=False)
    slot: Block | None = field(default=None, repr=False)
    is_released: bool = False

    @property
    def layout(self) -> AdapterLayout:
        return self.weights.layout

    def new_scratch(self) -> GradientArena:
        """A zero gradient arena for one op; it joins the open gradient by `commit_scratch`, or is released."""
        assert not self.is_released
        if self.rank_class is None:
            self.rank_class = ArenaPool(self.weights.flat.device).rank_class(self.layout)
        return self.rank_class.take_gradient()

    def drop_gradient(self) -> None:
        """Forget the open gradient and give its memory back."""
        if isinstance(self.grads, GradientArena):
            self.grads.release()
        self.grads = None
        self.num_open_passes = 0

    def release(self) -> None:
        """Give all device memory back. The state and views of it are dead from here on. Once only."""
        assert not self.is_released, "a state is released once"
        self.drop_gradient()
        if self.slot is not None:
            self.slot.release()
        self.is_released = True


class Adaptable(Protocol):
    """What this module must know of a base model."""

    @property
    def groups(self) -> Sequence[ProjectionGroup]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def arenas(self) -> ArenaPool: ...


def new_training_state(base: Adaptable, spec: LoraSpec) -> TrainingState:
    """A fresh run: A ~ kaiming-uniform(a = sqrt 5) from the seed, B = 0, no moments, no gradient."""
    layout = adapter_layout(base.groups, spec)
    state = placed_state(base, spec, initial_weights(layout, spec.seed))
    # A's bound is 1 / sqrt(I), B and the moments are zero.
    state.magnitudes = Magnitudes(weights=1.0, exp_avg=0.0, exp_avg_sq=0.0)
    return state


def placed_state(
    base: Adaptable,
    spec: LoraSpec,
    weights: Tensor,
    *,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    grads: Tensor | None = None,
    step: int = 0,
    num_open_passes: int = 0,
) -> TrainingState:
    """A run of these numbers in a slot of the base model's pool.

    Tensors are flat float32 [layout.num_elements] on any device and are copied; moments not given are zero.
    """
    rank_class = base.arenas.rank_class(adapter_layout(base.groups, spec))
    slot = rank_class.take_slot()
    for arena, given in zip(slot.arenas, (weights, exp_avg, exp_avg_sq), strict=True):
        if given is not None:
            assert given.shape == arena.shape
            arena.copy_(given)
    state = TrainingState(
        spec=spec,
        weights=AdapterWeights(rank_class.layout, slot.arenas[0], spec.alpha / spec.rank),
        exp_avg=slot.arenas[1],
        exp_avg_sq=slot.arenas[2],
        step=step,
        num_open_passes=num_open_passes,
        rank_class=rank_class,
        slot=slot,
    )
    if grads is not None:
        open_gradient = rank_class.take_gradient()
        open_gradient.flat.copy_(grads)
        state.grads = open_gradient
    return state


def commit_scratch(state: TrainingState, scratch: AdapterArena) -> None:
    """Add a whole op's gradient to the open gradient. Takes over the scratch, also when it raises: use it no more.

    Ops are committed in seq order. Raises NonFiniteResult, with the state unchanged, when the gradient or its sum
    with the open one is not finite, or too large for a step: a gradient that every step must refuse would be in the
    way of all that follow.
    """
    assert not state.is_released
    assert scratch.layout == state.layout
    assert scratch is not state.grads
    # Adding to an explicit zero would turn -0.0 into 0.0; the first op's scratch simply becomes the open gradient.
    if state.grads is not None:
        scratch.flat.add_(state.grads.flat)
    norm = torch.linalg.vector_norm(scratch.flat).item()
    if not norm <= MAX_GRAD_NORM:
        if isinstance(scratch, GradientArena):
            scratch.release()
        raise NonFiniteResult(
            f"the gradient of this request (with what was open before it) has norm {norm}, which is not finite or over "
            f"{MAX_GRAD_NORM:g}; nothing of it was applied"
        )
    if isinstance(scratch, GradientArena):
        scratch.norm = norm
    if isinstance(state.grads, GradientArena):
        state.grads.release()
    state.grads = scratch
    state.num_open_passes += 1


def initial_weights(layout: AdapterLayout, seed: int) -> Tensor:
    """The flat initial weights on the CPU, whatever device they go to: A uniform in +-1/sqrt(I), B zero.

    kaiming-uniform with a = sqrt 5 has the bound sqrt(6 / ((1 + a^2) * fan_in)) = 1 / sqrt(I); source: peft.
    """
    flat = torch.zeros(layout.num_elements, dtype=torch.float32)
    for place in layout.places:
        if place.which == "A":
            bound = 1.0 / math.sqrt(place.shape[1])
            view = flat[place.offset : place.offset + place.num_elements]
            view.uniform_(-bound, bound, generator=_keyed_generator(seed, place.module))
    return flat


def _keyed_generator(seed: int, module: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{module}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
