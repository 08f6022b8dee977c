"""A LoRA adapter in memory: which projections it changes and where its numbers lie.

All A and B of an adapter lie in one contiguous float32 arena, so that optimiser, snapshot, publish and swap see
one block. This module knows no base model beyond the shapes of its projections, no training and no files.
Invariant: a layout depends on the base model's groups and on the adapter's rank and flags alone.

Legend: R rank, I inputs and O outputs of a projection, G members of a group, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class ProjectionGroup:
    """Projections that read the same input and write side by side: q, k and v; gate and up; or one alone.

    An adapter changes all members of a group or none. num_experts: 0 for linear maps; otherwise each member is a
    stack of that many, and so are its A and B.
    """

    name: str
    members: tuple[ProjectionShape, ...]
    num_experts: int = 0

    @property
    def in_features(self) -> int:
        return self.members[0].in_features

    @property
    def out_features(self) -> int:
        return sum(member.out_features for member in self.members)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of an arena: A [R, I] or B transposed [R, O], row-major from `offset` on.

    Experts' tensors lie one below the other: A [E * R, I], B transposed [E * R, O].
    B lies transposed because GEMMs with a long and a short side run several times faster along the long one.
    """

    module: str
    which: str
    shape: tuple[int, int]
    offset: int

    @property
    def num_elements(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class GroupPlaces:
    """Where a group's tensors lie: the members' A's follow one another without a gap, so that they are one matrix."""

    group: ProjectionGroup
    a: tuple[TensorPlace, ...]
    b: tuple[TensorPlace, ...]


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where each A and B of an adapter lies in its flat arena of `num_elements` (alignment gaps stay 0).

    Two adapters of one base model with equal rank and flags have equal layouts: a rank class.
    """

    rank: int
    groups: tuple[GroupPlaces, ...]
    num_elements: int

    @property
    def places(self) -> tuple[TensorPlace, ...]:
        """All tensors: per group, in model order, the A's and then the B's."""
        return tuple(place for places in self.groups for place in (*places.a, *places.b))

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, without the alignment gaps."""
        return sum(place.num_elements for place in self.places)


def adapter_layout(groups: Sequence[ProjectionGroup], spec: LoraSpec) -> AdapterLayout:
    """The layout of an adapter of this spec, over the groups that its flags choose, in model order."""
    chosen: list[GroupPlaces] = []
    offset = 0
    for group in groups:
        if not is_targeted(group, spec):
            continue
        rows = spec.rank * max(1, group.num_experts)
        a: list[TensorPlace] = []
        for member in group.members:
            a.append(TensorPlace(member.module, "A", (rows, member.in_features), offset))
            offset += a[-1].num_elements
        offset = _aligned(offset)
        b: list[TensorPlace] = []
        for member in group.members:
            b.append(TensorPlace(member.module, "B", (rows, member.out_features), offset))
            offset = _aligned(offset + b[-1].num_elements)
        chosen.append(GroupPlaces(group, tuple(a), tuple(b)))
    assert chosen, "an adapter without targets is refused at admission"
    return AdapterLayout(spec.rank, tuple(chosen), offset)


def is_targeted(group: ProjectionGroup, spec: LoraSpec) -> bool:
    """Whether the spec's flags choose this group."""
    path, _, leaf = group.members[0].module.rpartition(".")
    if leaf in ATTENTION_PROJECTIONS:
        return spec.train_attn
    if leaf in MLP_PROJECTIONS or path.endswith(".experts"):
        return spec.train_mlp
    assert leaf == HEAD_MODULE, f"no adapter is defined for {group.name}"
    return spec.train_unembed


@dataclass(frozen=True, slots=True)
class GroupTensors:
    """Views of a group's tensors in an arena.

    a: all members' A's as one matrix, [G * R, I] for G members ([E * R, I] for experts, which stand alone).
    b: each member's B transposed, [R, O] ([E * R, O]). columns: where each member writes in the group's output.
    """

    a: Tensor
    b: tuple[Tensor, ...]
    columns: tuple[slice, ...]


class AdapterArena:
    """A flat float32 arena seen as the A and B of each projection; the views share its memory."""

    __slots__ = ("_groups", "_pairs", "flat", "layout")

    def __init__(self, layout: AdapterLayout, flat: Tensor) -> None:
        assert flat.dtype == torch.float32
        assert flat.shape == (layout.num_elements,)
        self.layout = layout
        self.flat = flat
        self._groups = {places.group.name: _group_tensors(places, flat) for places in layout.groups}
        self._pairs = {
            a.module: (_view(flat, a), _view(flat, b))
            for places in layout.groups
            for a, b in zip(places.a, places.b, strict=True)
        }

    def group(self, name: str) -> GroupTensors | None:
        """A group's tensors, or None when the adapter does not change it."""
        return self._groups.get(name)

    def a(self, module: str) -> Tensor:
        """A [R, I] of a projection. KeyError for one that the adapter does not change."""
        return self._pairs[module][0]

    def b(self, module: str) -> Tensor:
        """B [O, R] of a projection. KeyError for one that the adapter does not change."""
        return self._pairs[module][1].t()

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapted projections, in model order."""
        return tuple(self._pairs)


class AdapterWeights(AdapterArena):
    """The weights of one adapter: y += scale * (x A^T) B^T on each of its projections."""

    __slots__ = ("scale",)

    def __init__(self, layout: AdapterLayout, flat: Tensor, scale: float) -> None:
        super().__init__(layout, flat)
        self.scale = scale

    def copy(self) -> AdapterWeights:
        """The same weights in memory of their own: an immutable version for sampling."""
        return AdapterWeights(self.layout, self.flat.clone(), self.scale)

    def without_modules(self) -> AdapterWeights:
        """An adapter that changes nothing."""
        return AdapterWeights(AdapterLayout(self.layout.rank, (), 0), self.flat[:0], self.scale)


def _group_tensors(places: GroupPlaces, flat: Tensor) -> GroupTensors:
    first = places.a[0]
    rows = sum(place.shape[0] for place in places.a)
    a = flat[first.offset : first.offset + rows * first.shape[1]].view(rows, first.shape[1])
    columns: list[slice] = []
    start = 0
    for member in places.group.members:
        columns.append(slice(start, start + member.out_features))
        start += member.out_features
    return GroupTensors(a, tuple(_view(flat, place) for place in places.b), tuple(columns))


def _view(flat: Tensor, place: TensorPlace) -> Tensor:
    return flat[place.offset : place.offset + place.num_elements].view(place.shape)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
