"""The base model's RMS norms, forward and backward in closed form. Nothing here is trainable or recorded.

Invariant: a row of the output depends on that row of the input alone.

y = x * r * w with r = (mean(x^2) + eps)^(-1/2); with g = dy * w: dx = r * g - x * r^3 * mean(g * x).
Source: Zhang and Sennrich 2019, equation 4. float32 inside; the result is cast to the input's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """A frozen RMS norm over the last dimension; weight [D] in the model's dtype."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] to the normalised [..., D] and r [..., 1] in float32, which `backward` wants back."""
        x32 = x.float()
        mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        r = mean_square.add_(self.eps).rsqrt_()
        return (x32 * r).mul_(self.weight).to(x.dtype), r

    def backward(self, dy: Tensor, x: Tensor, r: Tensor) -> Tensor:
        """d loss / d x in float32, from d loss / d y and what forward took and gave."""
        x32 = x.float()
        g = dy.float() * self.weight
        mean_gx = (g * x32).sum(dim=-1, keepdim=True).div_(x.shape[-1])
        return g.mul_(r).addcmul_(x32, mean_gx.mul_(r * r * r), value=-1.0)
