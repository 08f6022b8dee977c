"""What every layer needs to know of the pass that is running, in one object instead of module state.

It decides nothing. Invariant: one PassContext belongs to one forward (and its backward) of one base model.

Legend: T rows of the packed batch, d size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from treadle.engine.attention import Attention
from treadle.engine.kernels.base import LoraKernel, LoraSegment


class Recompute(StrEnum):
    """What a recorded forward throws away and the backward computes again, to the same bits.

    none: nothing. selective: the outputs of norms and activations. full: everything but each layer's input.
    """

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class PassContext:
    """One pass: its segments (in row order), who computes their LoRA terms, who attends to what.

    cos_Td, sin_Td: the rotary embedding of each row, in the model's dtype; both halves of a row are equal.
    anchor: an empty tensor that requires a gradient, so that the graph starts at the first trained group and nobody
    asks for the embeddings' gradient. trained_groups: groups that some segment wants gradients for.
    """

    segments: Sequence[LoraSegment]
    kernel: LoraKernel
    attention: Attention
    cos_Td: Tensor
    sin_Td: Tensor
    anchor: Tensor
    recompute: Recompute = Recompute.NONE
    trained_groups: frozenset[str] = frozenset()

    def records(self, x: Tensor, *groups: str) -> bool:
        """Whether something that reads x and adapts these groups must be part of the graph."""
        return torch.is_grad_enabled() and (x.requires_grad or not self.trained_groups.isdisjoint(groups))


def trained_groups(segments: Sequence[LoraSegment]) -> frozenset[str]:
    """Names of the groups for which some segment wants gradients."""
    layouts = {id(s.adapter.layout): s.adapter.layout for s in segments if s.grads is not None}
    return frozenset(places.group.name for layout in layouts.values() for places in layout.groups)
