"""The decoder layers of the Qwen3 and Llama family over a packed batch, with adapters on every projection.

The weights are those that transformers loaded; the layers are our own, because that is what lets q, k and v (and gate
and up) be one product, a residual be part of the product before it, and the backward keep what it needs and no more.
They know neither tenants nor losses. tests/numerics compares them with transformers and peft.
Invariant: a row meets other rows in attention only; recomputation changes memory and time, never a bit.

Legend: T rows of the packed batch, D hidden size, I a projection's inputs, M inner size of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from treadle.engine.context import PassContext, Recompute
from treadle.engine.lora import Projection
from treadle.engine.norm import RMSNorm
from treadle.engine.rotary import HeadSplit, rotated_heads


class Mlp(Protocol):
    """The second half of a layer."""

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups of projections that adapters can change here."""
        ...

    def forward(self, x_TD: Tensor, ctx: PassContext) -> Tensor:
        """x + mlp(norm(x)), [T, D]."""
        ...


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """The first half of a layer: x + o(attention(norm(x)))."""

    layer_index: int
    norm: RMSNorm
    qkv: Projection
    heads: HeadSplit
    scaling: float
    o: Projection

    def forward(self, x_TD: Tensor, ctx: PassContext) -> Tensor:
        """[T, D] to [T, D]."""
        q_THd, k_TKd, v_TKd = rotated_heads(normed_projection(x_TD, self.norm, self.qkv, ctx), self.heads, ctx)
        mixed_1THd = ctx.attention.attend(
            self.layer_index, _heads_first(q_THd), _heads_first(k_TKd), _heads_first(v_TKd), self.scaling
        )
        return residual_projection(mixed_1THd.reshape(x_TD.shape[0], -1), x_TD, self.o, ctx)


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """The second half of a dense layer: x + down(silu(gate) * up) of norm(x)."""

    norm: RMSNorm
    gate_up: Projection
    down: Projection

    @property
    def group_names(self) -> tuple[str, ...]:
        return (self.gate_up.group, self.down.group)

    def forward(self, x_TD: Tensor, ctx: PassContext) -> Tensor:
        """See Mlp.forward."""
        return _gated_down(normed_projection(x_TD, self.norm, self.gate_up, ctx), x_TD, self.down, ctx)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    attention: SelfAttention
    mlp: Mlp

    def forward(self, x_TD: Tensor, ctx: PassContext) -> Tensor:
        """[T, D] to [T, D], keeping what ctx.recompute allows."""
        groups = (self.attention.qkv.group, self.attention.o.group, *self.mlp.group_names)
        if ctx.recompute is Recompute.FULL and ctx.records(x_TD, *groups):
            y_TD: Tensor = _RecomputedLayer.apply(x_TD, ctx.anchor, self, ctx)  # type: ignore[no-untyped-call]  # torch, untyped
            return y_TD
        return self.run(x_TD, ctx)

    def run(self, x_TD: Tensor, ctx: PassContext) -> Tensor:
        """Both halves."""
        return self.mlp.forward(self.attention.forward(x_TD, ctx), ctx)


def normed_projection(x_TD: Tensor, norm: RMSNorm, projection: Projection, ctx: PassContext) -> Tensor:
    """projection(norm(x)), [T, O]."""
    if ctx.records(x_TD, projection.group):
        y_TO: Tensor = _NormedProjection.apply(x_TD, ctx.anchor, norm, projection, ctx)  # type: ignore[no-untyped-call]  # torch, untyped
        return y_TO
    return projection.forward(norm.forward(x_TD)[0], ctx)[0]


def residual_projection(x_TI: Tensor, residual_TD: Tensor, projection: Projection, ctx: PassContext) -> Tensor:
    """residual + projection(x), [T, D]."""
    if ctx.records(x_TI, projection.group) or (torch.is_grad_enabled() and residual_TD.requires_grad):
        y_TD: Tensor = _ResidualProjection.apply(x_TI, residual_TD, ctx.anchor, projection, ctx)  # type: ignore[no-untyped-call]  # torch, untyped
        return y_TD
    return projection.forward_onto(residual_TD, x_TI, ctx)[0]


def _gated_down(gate_up_T2M: Tensor, residual_TD: Tensor, down: Projection, ctx: PassContext) -> Tensor:
    if ctx.records(gate_up_T2M, down.group) or (torch.is_grad_enabled() and residual_TD.requires_grad):
        y_TD: Tensor = _GatedDown.apply(gate_up_T2M, residual_TD, ctx.anchor, down, ctx)  # type: ignore[no-untyped-call]  # torch, untyped
        return y_TD
    return down.forward_onto(residual_TD, gated(gate_up_T2M), ctx)[0]


def gated(gate_up_T2M: Tensor) -> Tensor:
    """silu(gate) * up, [T, M], of the fused [T, 2M]."""
    gate_TM, up_TM = gate_up_T2M.chunk(2, dim=-1)
    return functional.silu(gate_TM).mul_(up_TM)


def gated_backward(d_out_TM: Tensor, gate_up_T2M: Tensor) -> Tensor:
    """d loss / d gate_up, [T, 2M]. d_out is overwritten.

    With s = sigmoid(gate): d up = d_out * gate * s; d gate = d_out * up * s * (1 + gate * (1 - s)).
    """
    gate_TM, up_TM = gate_up_T2M.chunk(2, dim=-1)
    d_gate_up_T2M = torch.empty_like(gate_up_T2M)
    d_gate_TM, d_up_TM = d_gate_up_T2M.chunk(2, dim=-1)
    torch.mul(functional.silu(gate_TM), d_out_TM, out=d_up_TM)
    d_gate_TM.copy_(torch.ops.aten.silu_backward(d_out_TM.mul_(up_TM), gate_TM))
    return d_gate_up_T2M


class _NormedProjection(torch.autograd.Function):
    """projection(norm(x)). Keeps x; the normalised rows too, unless they are to be computed again."""

    @staticmethod
    def forward(
        node: Any, x_TD: Tensor, anchor: Tensor, norm: RMSNorm, projection: Projection, ctx: PassContext
    ) -> Tensor:
        n_TD, r_T1 = norm.forward(x_TD)
        y_TO, node.kept = projection.forward(n_TD, ctx)
        node.save_for_backward(x_TD, r_T1, n_TD if ctx.recompute is Recompute.NONE else None)
        node.norm, node.projection, node.ctx = norm, projection, ctx
        return y_TO

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, r_T1, n_TD = node.saved_tensors
        if n_TD is None:
            n_TD, _ = node.norm.forward(x_TD)
        # The first layer reads the frozen embedding, whose gradient nobody wants.
        wants_dx = node.needs_input_grad[0]
        d_n_TD = node.projection.backward(grads[0], n_TD, node.kept, node.ctx, wants_dx=wants_dx)
        d_x_TD = node.norm.backward(d_n_TD, x_TD, r_T1).to(x_TD.dtype) if wants_dx else None
        return d_x_TD, None, None, None, None


class _ResidualProjection(torch.autograd.Function):
    """residual + projection(x). Keeps x."""

    @staticmethod
    def forward(
        node: Any, x_TI: Tensor, residual_TD: Tensor, anchor: Tensor, projection: Projection, ctx: PassContext
    ) -> Tensor:
        y_TD, node.kept = projection.forward_onto(residual_TD, x_TI, ctx)
        node.save_for_backward(x_TI)
        node.projection, node.ctx = projection, ctx
        return y_TD

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TI,) = node.saved_tensors
        d_x_TI = node.projection.backward(grads[0], x_TI, node.kept, node.ctx, wants_dx=node.needs_input_grad[0])
        return d_x_TI, grads[0], None, None, None


class _GatedDown(torch.autograd.Function):
    """residual + down(silu(gate) * up). Keeps gate and up; their product too, unless it is to be computed again."""

    @staticmethod
    def forward(
        node: Any, gate_up_T2M: Tensor, residual_TD: Tensor, anchor: Tensor, down: Projection, ctx: PassContext
    ) -> Tensor:
        inner_TM = gated(gate_up_T2M)
        y_TD, node.kept = down.forward_onto(residual_TD, inner_TM, ctx)
        node.save_for_backward(gate_up_T2M, inner_TM if ctx.recompute is Recompute.NONE else None)
        node.down, node.ctx = down, ctx
        return y_TD

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up_T2M, inner_TM = node.saved_tensors
        if inner_TM is None:
            inner_TM = gated(gate_up_T2M)
        wants_dx = node.needs_input_grad[0]
        d_inner_TM = node.down.backward(grads[0], inner_TM, node.kept, node.ctx, wants_dx=wants_dx)
        d_gate_up_T2M = gated_backward(d_inner_TM, gate_up_T2M) if wants_dx else None
        return d_gate_up_T2M, grads[0], None, None, None


class _RecomputedLayer(torch.autograd.Function):
    """A whole layer that keeps its input alone and runs again when its gradient is due."""

    @staticmethod
    def forward(node: Any, x_TD: Tensor, anchor: Tensor, layer: Layer, ctx: PassContext) -> Tensor:
        node.save_for_backward(x_TD)
        node.layer, node.ctx = layer, ctx
        return layer.run(x_TD, ctx)

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD,) = node.saved_tensors
        x_TD = x_TD.detach().requires_grad_(node.needs_input_grad[0])
        with torch.enable_grad():
            y_TD = node.layer.run(x_TD, node.ctx)
        y_TD.backward(grads[0])
        return x_TD.grad, None, None, None


def _heads_first(x_THd: Tensor) -> Tensor:
    """[T, H, d] as [1, H, T, d], without a copy."""
    return x_THd.transpose(0, 1).unsqueeze(0)
