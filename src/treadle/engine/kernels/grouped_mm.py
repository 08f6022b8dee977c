"""LoRA terms by torch.nn.functional.grouped_mm: one call per step of the arithmetic and rank class.

For many small segments, where a loop's calls cost more than its arithmetic. The price is a copy of each adapter's
A and B of the group per pass (they lie in arenas of their own, and grouped_mm wants them stacked) and temporaries
as large as the outputs, because grouped_mm cannot add in place.
It is a kernel for CPUs. CUDA's fast path takes bfloat16 alone; in float32, which our arithmetic is, torch (2.11 to
2.13) copies the offsets to the host and loops, one wait for the device per call.
Invariant: see base.py. Each group of a call is a product of its own, so its bits do not depend on the others.

Legend: T rows of the packed batch, N rows of one rank class, I inputs, O outputs of the group, C columns of one
member, R rank padded to a multiple of 4, Q segments of the class, M members of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from treadle.engine.adapter import GroupTensors
from treadle.engine.kernels.base import LoraSegment, PassSegments

# Until 2.12 torch refuses operands whose rows do not start at multiples of 16 bytes, on every device.
_ALIGNED_NUMBERS = 4


def is_available() -> bool:
    """Whether the installed torch has grouped_mm (2.10 and later do)."""
    return hasattr(functional, "grouped_mm")


class GroupedMm:
    """LoraKernel as grouped matrix products. Inputs and outputs of projections must be multiples of 4 before 2.13."""

    name = "grouped-mm"

    def add(self, x_TI: Tensor, y_TO: Tensor, segments: Sequence[LoraSegment], group: str) -> list[_KeptClass]:
        """See LoraKernel.add; what is kept is one entry per rank class."""
        return [_add_class(x_TI, y_TO, of, tensors) for of, tensors in _rank_classes(segments, group, x_TI.device)]

    def add_grads(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        kept: object,
        dx_TI: Tensor | None,
        segments: Sequence[LoraSegment],
        group: str,
    ) -> None:
        """See LoraKernel.add_grads."""
        assert isinstance(kept, list)
        dy_TO = dy_TO.contiguous()
        for one in kept:
            assert isinstance(one, _KeptClass)
            wants_grads = any(segment.grads is not None for segment in one.of.segments)
            if wants_grads or dx_TI is not None:
                _add_grads_of_class(dy_TO, x_TI, one, dx_TI, group, wants_grads=wants_grads)


@dataclass(frozen=True, slots=True)
class _RankClass:
    """Segments of equal rank that have an adapter in the same groups, in row order; the same for a whole pass.

    offsets: int32 [Q], where each one's rows end among the class's. index: its rows, or None when they are one span
    of the pack without holes, [first, last). scale: alpha / rank per row, [N, 1].
    """

    segments: tuple[LoraSegment, ...]
    rank: int
    offsets: Tensor
    index: Tensor | None
    first: int
    last: int
    scale: Tensor

    def rows(self, full: Tensor) -> Tensor:
        """The class's rows in float32; a view where no copy is needed."""
        rows = full[self.first : self.last] if self.index is None else full.index_select(0, self.index)
        return rows.float()

    def add_to(self, full: Tensor, columns: slice, term: Tensor) -> None:
        """full[rows, columns] += term, the sum in float32 whatever the dtype of `full`."""
        if self.index is None:
            # In-place addition promotes to float32 before it rounds to the dtype of the left side.
            full[self.first : self.last, columns].add_(term)
        else:
            view = full[:, columns]
            view[self.index] = (view.index_select(0, self.index).float() + term).to(full.dtype)


@dataclass(frozen=True, slots=True)
class _KeptClass:
    """What the backward of one rank class needs. tensors: per segment, of this group. s: x A^T, [N, M * R]."""

    of: _RankClass
    tensors: tuple[GroupTensors, ...]
    s: Tensor

    @property
    def columns(self) -> tuple[slice, ...]:
        return self.tensors[0].columns

    def stacked_a(self) -> Tensor:
        """[Q, M * R, I]."""
        return _stacked([tensors.a for tensors in self.tensors], self.of.rank)

    def stacked_b(self, member: int) -> Tensor:
        """[Q, R, C]."""
        return _stacked([tensors.b[member] for tensors in self.tensors], self.of.rank)


def _rank_classes(
    segments: Sequence[LoraSegment], group: str, device: torch.device
) -> list[tuple[_RankClass, tuple[GroupTensors, ...]]]:
    by_rank: dict[int, list[tuple[int, GroupTensors]]] = {}
    for index, segment in enumerate(segments):
        tensors = segment.adapter.group(group)
        if tensors is not None:
            by_rank.setdefault(segment.adapter.layout.rank, []).append((index, tensors))
    classes = []
    for rank, found in by_rank.items():
        chosen = tuple(index for index, _ in found)
        classes.append((_rank_class(segments, chosen, rank, device), tuple(tensors for _, tensors in found)))
    return classes


def _rank_class(
    segments: Sequence[LoraSegment], chosen: tuple[int, ...], rank: int, device: torch.device
) -> _RankClass:
    key = f"grouped-mm {chosen}"
    known = segments.prepared.get(key) if isinstance(segments, PassSegments) else None
    if known is None:
        known = _new_rank_class([segments[index] for index in chosen], rank, device)
        if isinstance(segments, PassSegments):
            segments.prepared[key] = known
    assert isinstance(known, _RankClass)
    return known


def _new_rank_class(segments: Sequence[LoraSegment], rank: int, device: torch.device) -> _RankClass:
    counts = torch.tensor([segment.stop - segment.start for segment in segments])
    assert int(counts.min()) > 0, "a segment has rows"
    index = None
    if any(left.stop != right.start for left, right in pairwise(segments)):
        index = torch.cat([torch.arange(segment.start, segment.stop) for segment in segments]).to(device)
    scales = torch.tensor([segment.adapter.scale for segment in segments])
    return _RankClass(
        segments=tuple(segments),
        rank=rank,
        offsets=counts.cumsum(0, dtype=torch.int32).to(device),
        index=index,
        first=segments[0].start,
        last=segments[-1].stop,
        scale=scales.repeat_interleave(counts).to(device)[:, None],
    )


def _add_class(x_TI: Tensor, y_TO: Tensor, of: _RankClass, tensors: tuple[GroupTensors, ...]) -> _KeptClass:
    a_QNI = _stacked([each.a for each in tensors], of.rank)
    s_NR = functional.grouped_mm(of.rows(x_TI), a_QNI.transpose(1, 2), offs=of.offsets)
    kept = _KeptClass(of, tensors, s_NR)
    scaled_NR = s_NR * of.scale
    for member, (part_NR, columns) in enumerate(zip(_parts(scaled_NR, kept), kept.columns, strict=True)):
        of.add_to(y_TO, columns, functional.grouped_mm(part_NR, kept.stacked_b(member), offs=of.offsets))
    return kept


def _add_grads_of_class(
    dy_TO: Tensor, x_TI: Tensor, kept: _KeptClass, dx_TI: Tensor | None, group: str, *, wants_grads: bool
) -> None:
    of = kept.of
    dy_NO = of.rows(dy_TO)
    ds_NR = torch.empty_like(kept.s)
    for member, (part_NR, columns) in enumerate(zip(_parts(ds_NR, kept), kept.columns, strict=True)):
        b_QCR = kept.stacked_b(member).transpose(1, 2)
        part_NR.copy_(functional.grouped_mm(dy_NO[:, columns], b_QCR, offs=of.offsets))
    ds_NR.mul_(of.scale)
    if dx_TI is not None:
        of.add_to(dx_TI, slice(None), functional.grouped_mm(ds_NR, kept.stacked_a(), offs=of.offsets))
    if wants_grads:
        _add_weight_grads(dy_NO, of.rows(x_TI), ds_NR, kept, group)


def _add_weight_grads(dy_NO: Tensor, x_NI: Tensor, ds_NR: Tensor, kept: _KeptClass, group: str) -> None:
    """One product per quantum, then one addition per quantum in segment order: quanta of a run are never merged."""
    of = kept.of
    da_QNI = functional.grouped_mm(ds_NR.t(), x_NI, offs=of.offsets)
    db = [
        functional.grouped_mm(part_NR.t(), dy_NO[:, columns], offs=of.offsets)
        for part_NR, columns in zip(_parts(kept.s * of.scale, kept), kept.columns, strict=True)
    ]
    for place, segment in enumerate(of.segments):
        if segment.grads is None:
            continue
        grads = segment.grads.group(group)
        assert grads is not None, "gradients are laid out like the weights"
        a_MRI = grads.a.view(len(grads.b), of.rank, -1)
        a_MRI.add_(da_QNI[place].view(len(grads.b), -1, a_MRI.shape[2])[:, : of.rank])
        for db_RC, db_QRC in zip(grads.b, db, strict=True):
            db_RC.add_(db_QRC[place, : of.rank])


def _parts(s_NR: Tensor, kept: _KeptClass) -> tuple[Tensor, ...]:
    """Each member's columns of s."""
    return s_NR.chunk(len(kept.columns), dim=1)


def _stacked(matrices: Sequence[Tensor], rank: int) -> Tensor:
    """Matrices of K * rank rows as [Q, K * R, columns], zero rows added behind every `rank` of them."""
    stacked = torch.stack(list(matrices))
    padding = -rank % _ALIGNED_NUMBERS
    if padding == 0:
        return stacked
    num_stacked, num_rows, num_columns = stacked.shape
    padded = functional.pad(stacked.view(num_stacked, num_rows // rank, rank, num_columns), (0, 0, 0, padding))
    return padded.view(num_stacked, -1, num_columns)
