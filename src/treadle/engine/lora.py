"""The projections of the base model, wrapped so that each row of a pass runs under its own adapter.

A wrapped projection computes the frozen linear map once for the whole pack and lets kernels.py add the adapters'
terms. It knows no tenants, losses or optimisers; the segments of the current pass come through its PassRouter.
Invariant: base weights never get gradients; adapters' gradients go into the segments' arenas, not through autograd.

Legend: T rows of the packed batch, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.engine.kernels import LoraSegment, add_lora, add_lora_grads


class PassRouter:
    """The segments of the pass that runs now; one per loaded base model, shared by its projections."""

    def __init__(self, device: torch.device) -> None:
        self.segments: Sequence[LoraSegment] = ()
        # The frozen model has no parameter that requires a gradient. This empty one keeps the graph alive from the
        # first adapted projection on, without asking for the gradient of the embeddings.
        self.anchor = torch.empty(0, device=device, requires_grad=True)
        self._is_in_pass = False

    @contextmanager
    def running(self, segments: Sequence[LoraSegment]) -> Iterator[None]:
        """Make `segments` current. Passes of one model never nest and never run in two threads at once."""
        assert not self._is_in_pass, "a pass is already running on this base model"
        self._is_in_pass = True
        self.segments = segments
        try:
            yield
        finally:
            self._is_in_pass = False
            self.segments = ()


class LoraLinear(nn.Module):
    """A frozen linear layer plus the current segments' LoRA terms; a drop-in for the nn.Linear it wraps."""

    def __init__(self, linear: nn.Linear, *, name: str, router: PassRouter) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.name = name
        self._router = router

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]; the leading dimensions multiply to the rows that segments count in."""
        segments = self._router.segments
        x_TI = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and (x.requires_grad or self._is_trained(segments)):
            y_TO: Tensor = _LoraProjection.apply(  # type: ignore[no-untyped-call]  # torch types apply as untyped
                x_TI, self._router.anchor, self.weight, self.bias, segments, self.name
            )
        else:
            y_TO = functional.linear(x_TI, self.weight, self.bias)
            add_lora(x_TI, y_TO, segments, self.name)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def _is_trained(self, segments: Sequence[LoraSegment]) -> bool:
        """Whether some adapter wants gradients here; below the first such projection there is no backward at all."""
        return any(s.grads is not None and s.adapter.pair(self.name) is not None for s in segments)


class _LoraProjection(torch.autograd.Function):
    """y = x W^T + b, then scale * (x A^T) B^T on each segment's rows. Keeps x and the s = x A^T only."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        anchor: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        segments: Sequence[LoraSegment],
        name: str,
    ) -> Tensor:
        y_TO = functional.linear(x_TI, weight_OI, bias_O)
        ctx.kept = add_lora(x_TI, y_TO, segments, name)
        ctx.save_for_backward(x_TI)
        ctx.weight = weight_OI
        ctx.segments = segments
        ctx.name = name
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TI,) = ctx.saved_tensors
        dy_TO = grads[0]
        # The first layer's input is the frozen embedding: nobody wants its gradient.
        dx_TI = torch.mm(dy_TO, ctx.weight) if ctx.needs_input_grad[0] else None
        add_lora_grads(dy_TO, x_TI, ctx.kept, dx_TI, ctx.segments, ctx.name)
        return dx_TI, None, None, None, None, None
