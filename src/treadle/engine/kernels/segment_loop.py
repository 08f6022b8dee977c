"""The reference kernel: a loop over segments, a few small matrix products each.

It is the truth that other kernels are tested against, and the fastest one on a CPU for all but many tiny segments.
Invariant: see base.py.

Legend: T rows of the packed batch, S rows of one segment, I inputs, O outputs of the group, C columns of one member,
R rank, G members of the group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.engine.kernels.base import LoraSegment


class SegmentLoop:
    """LoraKernel as a loop over segments."""

    name = "segment-loop"

    def add(self, x_TI: Tensor, y_TO: Tensor, segments: Sequence[LoraSegment], group: str) -> list[Tensor | None]:
        """See LoraKernel.add; what is kept is s = x A^T per segment, [S, G * R], or None without an adapter here."""
        return [_add_one(x_TI, y_TO, segment, group) for segment in segments]

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
        for segment, s_SR in zip(segments, kept, strict=True):
            if s_SR is not None and not (segment.grads is None and dx_TI is None):
                _add_grads_of_one(dy_TO, x_TI, s_SR, dx_TI, segment, group)


def _add_one(x_TI: Tensor, y_TO: Tensor, segment: LoraSegment, group: str) -> Tensor | None:
    weights = segment.adapter.group(group)
    if weights is None:
        return None
    s_SR = torch.mm(x_TI[segment.start : segment.stop].float(), weights.a.t())
    rows_SO = y_TO[segment.start : segment.stop]
    y_SO = rows_SO if rows_SO.dtype == torch.float32 else rows_SO.float()
    for part_SR, b_RC, columns in zip(s_SR.chunk(len(weights.b), dim=1), weights.b, weights.columns, strict=True):
        y_SO[:, columns].addmm_(part_SR, b_RC, alpha=segment.adapter.scale)
    if y_SO is not rows_SO:
        rows_SO.copy_(y_SO)
    return s_SR


def _add_grads_of_one(
    dy_TO: Tensor, x_TI: Tensor, s_SR: Tensor, dx_TI: Tensor | None, segment: LoraSegment, group: str
) -> None:
    weights = segment.adapter.group(group)
    assert weights is not None
    dy_SO = dy_TO[segment.start : segment.stop].float()
    ds_SR = torch.empty_like(s_SR)
    for part_SR, b_RC, columns in zip(ds_SR.chunk(len(weights.b), dim=1), weights.b, weights.columns, strict=True):
        torch.mm(dy_SO[:, columns], b_RC.t(), out=part_SR)
    ds_SR.mul_(segment.adapter.scale)
    if segment.grads is not None:
        grads = segment.grads.group(group)
        assert grads is not None, "gradients are laid out like the weights"
        grads.a.addmm_(ds_SR.t(), x_TI[segment.start : segment.stop].float())
        for part_SR, db_RC, columns in zip(s_SR.chunk(len(grads.b), dim=1), grads.b, grads.columns, strict=True):
            db_RC.addmm_(part_SR.t(), dy_SO[:, columns], alpha=segment.adapter.scale)
    if dx_TI is not None:
        dx_SI = dx_TI[segment.start : segment.stop]
        if dx_SI.dtype == torch.float32:
            dx_SI.addmm_(ds_SR, weights.a)
        else:
            dx_SI.copy_(dx_SI.float().addmm_(ds_SR, weights.a))
