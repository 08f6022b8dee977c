"""A LoRA adapter in memory: which projections it changes, where its numbers lie, and a run's training state.

All A and B of an adapter lie in one contiguous float32 arena, so that optimiser, snapshot, publish and swap see
one block. This module knows no base model beyond the shapes of its projections, and no files.
Invariant: a fresh adapter depends on its seed and the projections' names alone, never on the global generator,
on the order of creation or on other adapters.

Legend: R rank, I inputs and O outputs of a projection.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from treadle.domain.ops import LoraSpec

HEAD_MODULE = "lm_head"
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Tensors of an arena start at multiples of this many numbers (64 bytes), so that GEMMs see aligned operands.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class ProjectionShape:
    """One adaptable projection of a base model; `module` is its dotted name in the causal language model."""

    module: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of an arena: A [R, I] or B transposed [R, O], row-major from `offset` on.

    B lies transposed because GEMMs with a long and a short side run several times faster along the long one.
    """

    module: str
    which: str
    shape: tuple[int, int]
    offset: int


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where each A and B of an adapter lies in its flat arena of `num_elements` (alignment gaps stay 0)."""

    rank: int
    places: tuple[TensorPlace, ...]
    num_elements: int

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, without the alignment gaps."""
        return sum(place.shape[0] * place.shape[1] for place in self.places)


def adapter_layout(projections: Sequence[ProjectionShape], spec: LoraSpec) -> AdapterLayout:
    """The layout of an adapter of this spec, over the projections that its flags choose, in model order."""
    places: list[TensorPlace] = []
    offset = 0
    for projection in projections:
        if not is_targeted(projection.module, spec):
            continue
        for which, shape in (("A", (spec.rank, projection.in_features)), ("B", (spec.rank, projection.out_features))):
            places.append(TensorPlace(projection.module, which, shape, offset))
            offset += -(-shape[0] * shape[1] // _ALIGNMENT) * _ALIGNMENT
    assert places, "an adapter without targets is refused at admission"
    return AdapterLayout(spec.rank, tuple(places), offset)


def is_targeted(module: str, spec: LoraSpec) -> bool:
    """Whether the spec's flags choose this projection."""
    leaf = module.rpartition(".")[2]
    if leaf in ATTENTION_PROJECTIONS:
        return spec.train_attn
    if leaf in MLP_PROJECTIONS:
        return spec.train_mlp
    assert leaf == HEAD_MODULE, f"no adapter is defined for {module}"
    return spec.train_unembed


class AdapterArena:
    """A flat float32 arena seen as the A and B of each projection; the views share its memory."""

    __slots__ = ("_pairs", "flat", "layout")

    def __init__(self, layout: AdapterLayout, flat: Tensor) -> None:
        assert flat.dtype == torch.float32
        assert flat.shape == (layout.num_elements,)
        self.layout = layout
        self.flat = flat
        self._pairs = _pairs_of(layout, flat)

    def pair(self, module: str) -> tuple[Tensor, Tensor] | None:
        """(A [R, I], B transposed [R, O]) of a projection, or None when the adapter does not change it."""
        return self._pairs.get(module)

    def a(self, module: str) -> Tensor:
        """A [R, I]. KeyError for a projection that the adapter does not change."""
        return self._pairs[module][0]

    def b(self, module: str) -> Tensor:
        """B [O, R]. KeyError for a projection that the adapter does not change."""
        return self._pairs[module][1].t()

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapted projections, in model order."""
        return tuple(self._pairs)


def _pairs_of(layout: AdapterLayout, flat: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
    views: dict[str, list[Tensor]] = {}
    for place in layout.places:
        rows, columns = place.shape
        view = flat[place.offset : place.offset + rows * columns].view(rows, columns)
        views.setdefault(place.module, []).append(view)
    return {module: (pair[0], pair[1]) for module, pair in views.items()}


class AdapterWeights(AdapterArena):
    """The weights of one adapter: y += scale * (x A^T) B^T on each of its projections."""

    __slots__ = ("scale",)

    def __init__(self, layout: AdapterLayout, flat: Tensor, scale: float) -> None:
        super().__init__(layout, flat)
        self.scale = scale

    def copy(self) -> AdapterWeights:
        """The same weights in memory of their own: an immutable version for sampling."""
        return AdapterWeights(self.layout, self.flat.clone(), self.scale)


@dataclass(slots=True)
class TrainingState:
    """Everything a run's future depends on; mutable, owned by one worker.

    grads: the open gradient, summed over the committed passes since the last step, or None when there is none.
    exp_avg, exp_avg_sq: AdamW's moments, flat like the weights. step: steps taken.
    num_open_passes: committed passes since the last step.
    """

    spec: LoraSpec
    weights: AdapterWeights
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grads: AdapterArena | None = None
    step: int = 0
    num_open_passes: int = 0

    @property
    def layout(self) -> AdapterLayout:
        return self.weights.layout

    def new_scratch(self) -> AdapterArena:
        """A zero gradient arena for one op; it joins the open gradient by `commit_scratch`, or is dropped."""
        return AdapterArena(self.layout, torch.zeros_like(self.weights.flat))


class Adaptable(Protocol):
    """What this module must know of a base model."""

    @property
    def projections(self) -> Sequence[ProjectionShape]: ...

    @property
    def device(self) -> torch.device: ...


def new_training_state(base: Adaptable, spec: LoraSpec) -> TrainingState:
    """A fresh run: A ~ kaiming-uniform(a = sqrt 5) from the seed, B = 0, no moments, no gradient."""
    layout = adapter_layout(base.projections, spec)
    flat = initial_weights(layout, spec.seed).to(base.device)
    return TrainingState(
        spec=spec,
        weights=AdapterWeights(layout, flat, spec.alpha / spec.rank),
        exp_avg=torch.zeros_like(flat),
        exp_avg_sq=torch.zeros_like(flat),
    )


def initial_weights(layout: AdapterLayout, seed: int) -> Tensor:
    """The flat initial weights on the CPU, whatever device they go to: A uniform in +-1/sqrt(I), B zero.

    kaiming-uniform with a = sqrt 5 has the bound sqrt(6 / ((1 + a^2) * fan_in)) = 1 / sqrt(I); source: peft.
    """
    flat = torch.zeros(layout.num_elements, dtype=torch.float32)
    for place in layout.places:
        if place.which == "A":
            rows, columns = place.shape
            bound = 1.0 / math.sqrt(columns)
            view = flat[place.offset : place.offset + rows * columns]
            view.uniform_(-bound, bound, generator=_keyed_generator(seed, place.module))
    return flat


def _keyed_generator(seed: int, module: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{module}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
