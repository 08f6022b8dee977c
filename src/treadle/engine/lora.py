"""Frozen projections with the tenants' LoRA terms on them, forward and backward, as plain functions of tensors.

The frozen part is one matrix product for the whole pack, whoever its rows belong to; the rank-r part is the pass's
kernel. blocks.py composes these into autograd Functions. It knows no norms, attention, losses or optimisers.
Invariant: base weights never get gradients; adapters' gradients go into the segments' arenas, not through autograd.

Legend: T rows of the packed batch, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from treadle.engine.context import PassContext


@dataclass(frozen=True, slots=True)
class Projection:
    """The frozen weight [O, I] and bias [O] of one group of projections, side by side along O."""

    group: str
    weight: Tensor
    bias: Tensor | None = None

    def forward(self, x_TI: Tensor, ctx: PassContext) -> tuple[Tensor, object]:
        """x W^T + b plus each segment's term, [T, O]; and what `backward` needs of the adapters."""
        y_TO = functional.linear(x_TI, self.weight, self.bias)
        return y_TO, ctx.kernel.add(x_TI, y_TO, ctx.segments, self.group)

    def forward_onto(self, residual_TO: Tensor, x_TI: Tensor, ctx: PassContext) -> tuple[Tensor, object]:
        """residual + forward(x), in memory of its own."""
        y_TO = torch.addmm(residual_TO, x_TI, self.weight.t())
        if self.bias is not None:
            y_TO.add_(self.bias)
        return y_TO, ctx.kernel.add(x_TI, y_TO, ctx.segments, self.group)

    def backward(self, dy_TO: Tensor, x_TI: Tensor, kept: object, ctx: PassContext, *, wants_dx: bool) -> Tensor | None:
        """d loss / d x, or None when nobody wants it; dA and dB go into the segments' arenas."""
        dx_TI = torch.mm(dy_TO, self.weight) if wants_dx else None
        ctx.kernel.add_grads(dy_TO, x_TI, kept, dx_TI, ctx.segments, self.group)
        return dx_TI
