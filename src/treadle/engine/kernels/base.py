"""The kernel seam: what a pass asks for, whoever computes it.

Every kernel must agree with segment_loop.py, the truth of the tests. Arithmetic is float32 whatever the base model's
dtype: in bfloat16 the term is added before the cast, else gradients are percents off.
Invariant: a segment's numbers depend on its own rows, weights and gradient arena alone, and its arena is added to
in segment order.

Legend: T rows of the packed batch, I inputs and O outputs of a group of projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from treadle.engine.adapter import AdapterArena, AdapterWeights


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


class PassSegments(tuple[LoraSegment, ...]):
    """The segments of one pass, with room for what a kernel derives from them once instead of once per projection.

    Any sequence of segments can be given to a kernel; given this one, it builds its tables (addresses, tiles) at
    the first projection of the pass and finds them again at the others. Dropped with the pass, so nothing outlives
    the arenas it points into. Rows of the segments must not change once a kernel has seen them.
    """

    prepared: dict[str, object]

    def __new__(cls, segments: Iterable[LoraSegment] = ()) -> PassSegments:
        self = super().__new__(cls, segments)
        self.prepared = {}
        return self


class LoraKernel(Protocol):
    """One way to compute the rank-r part of dense projections; `name` goes into the numerics profile."""

    @property
    def name(self) -> str: ...

    def add(self, x_TI: Tensor, y_TO: Tensor, segments: Sequence[LoraSegment], group: str) -> object:
        """Add each segment's term to its rows of y in place; what the backward needs (x A^T, in whatever form).

        x and y have the base model's dtype, unit column stride and any row stride; y may be float32 whatever x is.
        """
        ...

    def add_grads(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        kept: object,
        dx_TI: Tensor | None,
        segments: Sequence[LoraSegment],
        group: str,
    ) -> None:
        """Add each segment's dA, dB to its gradient arena and its part of dx to dx in place (None: not wanted).

        `segments` are those of `add`; grads of some may have become None since.
        """
        ...
