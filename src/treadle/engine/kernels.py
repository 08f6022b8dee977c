"""How a LoRA term is added to a packed projection, and how its gradients are formed: the kernel seam.

The reference kernel is a loop over segments; a faster one must agree with it. Arithmetic is float32 whatever the
base model's dtype: in bfloat16 the term is added before the cast, else gradients are percents off.
Invariant: a segment's numbers depend on its own rows, weights and gradient arena alone, and its arena is added to
in segment order.

Legend: T rows of the packed batch, S rows of one segment, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.engine.adapter import AdapterArena, AdapterWeights

KERNEL_NAME = "segment-loop"


@dataclass(slots=True)
class LoraSegment:
    """Rows [start, stop) of a pass that run under one adapter: one quantum in training, one group in sampling.

    grads: the arena that the backward adds dA and dB to, or None to form none. It may be set to None between
    forward and backward (a quantum that turned out not to be finite); that is why this class is not frozen.
    """

    adapter: AdapterWeights
    start: int
    stop: int
    grads: AdapterArena | None = None


def add_lora(x_TI: Tensor, y_TO: Tensor, segments: Sequence[LoraSegment], module: str) -> list[Tensor | None]:
    """Add each segment's term to its rows of y in place; the s_SR = x A^T per segment, for the backward."""
    kept: list[Tensor | None] = []
    for segment in segments:
        pair = segment.adapter.pair(module)
        if pair is None:
            kept.append(None)
            continue
        a_RI, bt_RO = pair
        s_SR = torch.mm(x_TI[segment.start : segment.stop].float(), a_RI.t())
        y_SO = y_TO[segment.start : segment.stop]
        if y_SO.dtype == torch.float32:
            y_SO.addmm_(s_SR, bt_RO, alpha=segment.adapter.scale)
        else:
            y_SO.copy_(y_SO.float().addmm_(s_SR, bt_RO, alpha=segment.adapter.scale))
        kept.append(s_SR)
    return kept


def add_lora_grads(
    dy_TO: Tensor,
    x_TI: Tensor,
    kept: Sequence[Tensor | None],
    dx_TI: Tensor | None,
    segments: Sequence[LoraSegment],
    module: str,
) -> None:
    """Add each segment's dA, dB to its gradient arena and its part of dx to dx in place (None: not wanted)."""
    for segment, s_SR in zip(segments, kept, strict=True):
        pair = segment.adapter.pair(module)
        if s_SR is None or pair is None or (segment.grads is None and dx_TI is None):
            continue
        a_RI, bt_RO = pair
        dy_SO = dy_TO[segment.start : segment.stop].float()
        ds_SR = torch.mm(dy_SO, bt_RO.t()).mul_(segment.adapter.scale)
        if segment.grads is not None:
            x_SI = x_TI[segment.start : segment.stop].float()
            grads = segment.grads.pair(module)
            assert grads is not None, "gradients are laid out like the weights"
            grads[0].addmm_(ds_SR.t(), x_SI)
            grads[1].addmm_(s_SR.t(), dy_SO, alpha=segment.adapter.scale)
        if dx_TI is not None:
            dx_SI = dx_TI[segment.start : segment.stop]
            if dx_SI.dtype == torch.float32:
                dx_SI.addmm_(ds_SR, a_RI)
            else:
                dx_SI.copy_(dx_SI.float().addmm_(ds_SR, a_RI))
