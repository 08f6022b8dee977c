"""LoRA terms on stacked experts: the seam, and the loop that is its truth.

The rows of a pass are copied once per chosen expert and sorted, so that an expert's rows lie together and, within
it, each segment's rows too: a run. Each run has its own A and B. The loop costs a handful of small products per run,
so per layer as many as (segments x experts with rows): fine on a CPU and for few experts, launch-bound on a GPU.
Invariant: a run's numbers depend on its own rows, weights and gradient arena alone; its arena is added to in the
order of experts.

Legend: P sorted rows with padding, N rows of one run, I inputs, O outputs, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from treadle.engine.adapter import GroupTensors
from treadle.engine.kernels.base import LoraSegment

# A row of a matrix product has the same bits in any multiple of this many rows, and other bits in fewer. Other numbers
# of rows will not do: the last odd rows differ at rank 1, where the product is with a vector, and with two threads.
ROW_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class ExpertRun:
    """Sorted rows [start, stop): those of one segment that go to one expert."""

    segment: LoraSegment
    expert: int
    start: int
    stop: int


class ExpertKernel(Protocol):
    """One way to compute the rank-r part of experts; `name` goes into the numerics profile."""

    @property
    def name(self) -> str: ...

    def add(self, x_PI: Tensor, y_PO: Tensor, runs: Sequence[ExpertRun], group: str) -> object:
        """Add each run's term to its rows of y in place; what the backward needs.

        P is a multiple of ROW_MULTIPLE.
        """
        ...

    def add_grads(
        self,
        dy_PO: Tensor,
        x_PI: Tensor,
        kept: object,
        dx_PI: Tensor | None,
        runs: Sequence[ExpertRun],
        group: str,
    ) -> None:
        """Add each run's dA, dB to its segment's arena and its part of dx to dx in place (None: not wanted)."""
        ...


class ExpertLoop:
    """ExpertKernel as a loop over runs."""

    name = "expert-loop"

    def add(self, x_PI: Tensor, y_PO: Tensor, runs: Sequence[ExpertRun], group: str) -> list[Tensor | None]:
        """See ExpertKernel.add; what is kept is s = x A^T per run, [N, R], or None without an adapter here."""
        return [_add_one(x_PI, y_PO, run, group) for run in runs]

    def add_grads(
        self,
        dy_PO: Tensor,
        x_PI: Tensor,
        kept: object,
        dx_PI: Tensor | None,
        runs: Sequence[ExpertRun],
        group: str,
    ) -> None:
        """See ExpertKernel.add_grads."""
        assert isinstance(kept, list)
        for run, s_NR in zip(runs, kept, strict=True):
            if s_NR is not None and not (run.segment.grads is None and dx_PI is None):
                _add_grads_of_one(dy_PO, x_PI, s_NR, dx_PI, run, group)


def _add_one(x_PI: Tensor, y_PO: Tensor, run: ExpertRun, group: str) -> Tensor | None:
    weights = run.segment.adapter.group(group)
    if weights is None:
        return None
    a_RI, b_RO = _of_expert(weights, run)
    # How many rows a run has depends, in sampling, on the company: so the product takes some of its neighbours too.
    num_rows = -(-(run.stop - run.start) // ROW_MULTIPLE) * ROW_MULTIPLE
    first = min(run.start, x_PI.shape[0] - num_rows)
    last = first + num_rows
    assert first >= 0, "sorted rows are padded"
    own = slice(run.start - first, run.stop - first)
    s_MR = torch.mm(x_PI[first:last].float(), a_RI.t())
    y_MO = torch.addmm(y_PO[first:last].float(), s_MR, b_RO, alpha=run.segment.adapter.scale)
    y_PO[run.start : run.stop] = y_MO[own]
    return s_MR[own]


def _add_grads_of_one(
    dy_PO: Tensor, x_PI: Tensor, s_NR: Tensor, dx_PI: Tensor | None, run: ExpertRun, group: str
) -> None:
    weights = run.segment.adapter.group(group)
    assert weights is not None
    a_RI, b_RO = _of_expert(weights, run)
    scale = run.segment.adapter.scale
    dy_NO = dy_PO[run.start : run.stop].float()
    ds_NR = torch.mm(dy_NO, b_RO.t()).mul_(scale)
    if run.segment.grads is not None:
        grads = run.segment.grads.group(group)
        assert grads is not None, "gradients are laid out like the weights"
        da_RI, db_RO = _of_expert(grads, run)
        da_RI.addmm_(ds_NR.t(), x_PI[run.start : run.stop].float())
        db_RO.addmm_(s_NR.t(), dy_NO, alpha=scale)
    if dx_PI is not None:
        dx_NI = dx_PI[run.start : run.stop]
        dx_NI.copy_(torch.addmm(dx_NI.float(), ds_NR, a_RI))


def _of_expert(tensors: GroupTensors, run: ExpertRun) -> tuple[Tensor, Tensor]:
    """A [R, I] and B transposed [R, O] of the run's expert."""
    rank = run.segment.adapter.layout.rank
    rows = slice(run.expert * rank, (run.expert + 1) * rank)
    return tensors.a[rows], tensors.b[0][rows]
