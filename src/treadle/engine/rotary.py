"""Norms of queries and keys and their rotary embedding, from the fused output of q, k and v.

One autograd Function for all of it: its backward turns the gradients back by the opposite rotation and writes one
fused gradient, where eager code keeps half a dozen intermediates and adds three gradients up.
Invariant: a row of the output depends on that row of the input and on its own position alone.

rotated = (a cos - b sin, b cos + a sin) for the halves a, b of a head. Source: Su et al. 2021, section 3.4.2, in the
half-split form of transformers' Llama and Qwen3. Norms in float32, rotation in the model's dtype.

Legend: T rows, O fused outputs of q, k and v, H query heads, K key and value heads, d size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle.engine.context import PassContext
from treadle.engine.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """How a fused row is cut into heads. q_norm, k_norm: None where the architecture has none (Llama)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def parts(self, qkv_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [T, H, d], [T, K, d], [T, K, d] of a fused tensor."""
        sizes = [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim]
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in torch.split(qkv_TO, sizes, dim=-1))
        return q, k, v


def rotated_heads(qkv_TO: Tensor, split: HeadSplit, ctx: PassContext) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, d] and k [T, K, d], normalised and rotated, and v [T, K, d]."""
    if torch.is_grad_enabled() and qkv_TO.requires_grad:
        heads: tuple[Tensor, Tensor, Tensor] = _RotatedHeads.apply(qkv_TO, split, ctx)  # type: ignore[no-untyped-call]  # torch, untyped
        return heads
    q, k, v = split.parts(qkv_TO)
    return _forward(q, split.q_norm, ctx)[0], _forward(k, split.k_norm, ctx)[0], v


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(node: Any, qkv_TO: Tensor, split: HeadSplit, ctx: PassContext) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split.parts(qkv_TO)
        rotated_q, q_r = _forward(q, split.q_norm, ctx)
        rotated_k, k_r = _forward(k, split.k_norm, ctx)
        # Without norms the rotation alone is undone, and the fused tensor need not live on.
        node.save_for_backward(qkv_TO if split.q_norm is not None else None, q_r, k_r)
        node.split, node.ctx, node.shape = split, ctx, qkv_TO.shape
        return rotated_q, rotated_k, v.clone()

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TO, q_r, k_r = node.saved_tensors
        split: HeadSplit = node.split
        q, k, _ = split.parts(qkv_TO) if qkv_TO is not None else (None, None, None)
        d_qkv_TO = grads[0].new_empty(node.shape)
        d_q, d_k, d_v = split.parts(d_qkv_TO)
        _backward(grads[0], d_q, split.q_norm, q, q_r, node.ctx)
        _backward(grads[1], d_k, split.k_norm, k, k_r, node.ctx)
        d_v.copy_(grads[2])
        return d_qkv_TO, None, None


def _forward(x_THd: Tensor, norm: RMSNorm | None, ctx: PassContext) -> tuple[Tensor, Tensor | None]:
    """The normalised and rotated heads, and the norm's r."""
    r = None
    if norm is not None:
        x_THd, r = norm.forward(x_THd)
    rotated = x_THd.new_empty(x_THd.shape)
    _rotate(x_THd, rotated, ctx, sign=1.0)
    return rotated, r


def _backward(
    d_rotated: Tensor, d_x: Tensor, norm: RMSNorm | None, x: Tensor | None, r: Tensor | None, ctx: PassContext
) -> None:
    """Write d loss / d x into d_x."""
    if norm is None:
        _rotate(d_rotated, d_x, ctx, sign=-1.0)
        return
    assert x is not None
    assert r is not None
    d_normalised = torch.empty_like(d_rotated)
    _rotate(d_rotated, d_normalised, ctx, sign=-1.0)
    d_x.copy_(norm.backward(d_normalised, x, r))


def _rotate(x_THd: Tensor, out_THd: Tensor, ctx: PassContext, *, sign: float) -> None:
    """Rotate each head by its row's angle, or back for sign -1; out must not overlap x."""
    half = x_THd.shape[-1] // 2
    cos = ctx.cos_Td[:, None, :half]
    sin = ctx.sin_Td[:, None, :half]
    a, b = x_THd[..., :half], x_THd[..., half:]
    torch.mul(a, cos, out=out_THd[..., :half]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_THd[..., half:]).addcmul_(a, sin, value=sign)
