"""The base model's RMS norms with a closed-form backward that keeps its input and one number per row.

The modelling code's own backward goes through six elementwise operations, one of them a power; on small models that
was a twentieth of a training step on a CPU. Nothing here is trainable.
Invariant: a row of the output depends on that row of the input alone.

y = x * r * w with r = (mean(x^2) + eps)^(-1/2); with g = dy * w: dx = r * g - x * r^3 * mean(g * x).
Source: Zhang and Sennrich 2019, equation 4. float32 inside; the result is cast to the input's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenRMSNorm(nn.Module):
    """A drop-in for the RMS norms of the supported architectures, over the last dimension."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]  # torch, untyped
            return y
        return _normalise(x, self.weight, self.eps)[0]


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows, and r."""
    x32 = x.float()
    mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    r = mean_square.add_(eps).rsqrt_()
    return (x32 * r).mul_(weight).to(x.dtype), r


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _normalise(x, weight, eps)
        ctx.save_for_backward(x, r)
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, r = ctx.saved_tensors
        x32 = x.float()
        g = grads[0].float() * ctx.weight
        mean_gx = (g * x32).sum(dim=-1, keepdim=True).div_(x.shape[-1])
        dx = g.mul_(r).addcmul_(x32, mean_gx.mul_(r * r * r), value=-1.0)
        return dx.to(x.dtype), None, None
