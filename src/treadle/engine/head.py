"""The language-model head: target log-probabilities, the losses on them, and their gradients, group by group.

One visit of the vocabulary per group of rows: logits, logsumexp, target log-probabilities, losses, and the gradients
of hidden states and of the heads' own adapters; two GEMMs with the head's weight in all. Rows that cannot have a
gradient skip the second. The logits of a whole batch never exist. Arithmetic on logits is float32.
What the losses mean is the business of losses.py, what the rows belong to that of passes.py.
Invariant: a quantum is cut into pieces counted from its own first row, sums over rows are taken per piece, and a
group only lets pieces share GEMMs whose rows are independent; so numbers do not depend on the company.

Legend: T rows of the pack, M of a group, P of a piece, G of those that have a gradient, D hidden, V vocabulary,
K target columns per row, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.domain.limits import PACK_MULTIPLE
from treadle.domain.losses import Loss
from treadle.engine.adapter import HEAD_MODULE, AdapterArena, AdapterWeights
from treadle.engine.base_model import BaseModel
from treadle.engine.kernels import LoraSegment, add_lora, add_lora_grads
from treadle.engine.losses import LOSS_FUNCTIONS

# Most rows whose logits exist at one time, and the length of a quantum's pieces. Fewer would read the head's weight
# more often than its arithmetic takes; more would only hold more logits (256 rows of 151,936 are 148 MiB).
GROUP_ROWS = 256


@dataclass(frozen=True, slots=True)
class HeadTask:
    """What one quantum, rows [start, stop) of the pack, asks of the head.

    targets: int64 [rows, K]. inputs: float32 [rows, K] by name. has_gradient: bool [rows] on the host, see
    losses.rows_with_gradient. grads: where the head's own dA and dB are added; None computes the loss alone.
    """

    start: int
    stop: int
    targets: Tensor
    inputs: Mapping[str, Tensor]
    has_gradient: NDArray[np.bool_]
    loss: Loss
    adapter: AdapterWeights
    grads: AdapterArena | None


@dataclass(frozen=True, slots=True)
class HeadResult:
    """logprobs and losses: float32 [rows, K]; metrics: 0-d tensors, sums over the quantum; filled in place."""

    logprobs: Tensor
    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def run_head(
    base: BaseModel, hidden_TD: Tensor, tasks: Sequence[HeadTask], d_hidden_TD: Tensor | None
) -> list[HeadResult]:
    """Log-probabilities and losses of each task; with gradients where `grads` is set and d_hidden_TD is given.

    Tasks follow one another in the pack without holes, from row 0. d_hidden_TD: zeros, in the dtype of hidden_TD;
    d loss / d hidden is written to the rows that have one. A result that is not finite is not noticed here; then
    the rows of its task and its `grads` are worthless, and only they.
    """
    assert hidden_TD.shape[0] % PACK_MULTIPLE == 0
    results = [_empty_result(task) for task in tasks]
    # One block for all groups: it stays warm, where fresh megabytes per group would be page faults.
    workspace_MV = torch.empty(GROUP_ROWS, base.vocab_size, dtype=torch.float32, device=base.device)
    for pieces in _groups(tasks, results):
        group = _Group(base, hidden_TD, pieces, workspace_MV)
        if d_hidden_TD is not None:
            group.backward(d_hidden_TD)
    return results


def logits(base: BaseModel, hidden_TD: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
    """float32 logits [T, V] of a few rows; segments count rows of `hidden_TD` and add the head's adapter.

    For the sampler's handful of rows: the caller bounds T. No gradients.
    """
    with torch.no_grad():
        logits_TV = torch.mm(hidden_TD, base.head_weight_VD.t()).float()
        add_lora(hidden_TD, logits_TV, segments, HEAD_MODULE)
    return logits_TV


@dataclass(frozen=True, slots=True)
class _Piece:
    """Up to GROUP_ROWS rows of one task: [start, stop) of the pack, `rows` of the task."""

    task: HeadTask
    result: HeadResult
    start: int
    stop: int
    rows: slice

    @property
    def gradient_rows(self) -> NDArray[np.int64]:
        """The rows of the piece that can have a gradient, counted from its start."""
        return np.flatnonzero(self.task.has_gradient[self.rows])


def _empty_result(task: HeadTask) -> HeadResult:
    logprobs = torch.empty(task.targets.shape, dtype=torch.float32, device=task.targets.device)
    return HeadResult(logprobs, torch.empty_like(logprobs))


def _groups(tasks: Sequence[HeadTask], results: Sequence[HeadResult]) -> Iterator[list[_Piece]]:
    """Neighbouring pieces, up to GROUP_ROWS rows together."""
    group: list[_Piece] = []
    next_row = 0
    for task, result in zip(tasks, results, strict=True):
        assert task.start == next_row < task.stop, "tasks follow one another"
        next_row = task.stop
        for start in range(task.start, task.stop, GROUP_ROWS):
            stop = min(start + GROUP_ROWS, task.stop)
            if group and stop - group[0].start > GROUP_ROWS:
                yield group
                group = []
            group.append(_Piece(task, result, start, stop, slice(start - task.start, stop - task.start)))
    if group:
        yield group


class _Group:
    """The logits of a few pieces on their way to a gradient; they are overwritten as it goes.

    Its GEMMs take a multiple of PACK_MULTIPLE rows, like the pack itself, so that a row's bits do not depend on
    their number. The rows beyond the pieces are their neighbours or padding; what comes of them is not used.
    """

    def __init__(self, base: BaseModel, hidden_TD: Tensor, pieces: Sequence[_Piece], workspace_MV: Tensor) -> None:
        self._base = base
        self._pieces = pieces
        num_rows = _round_up(pieces[-1].stop - pieces[0].start)
        self._first = min(pieces[0].start, hidden_TD.shape[0] - num_rows)
        assert self._first >= 0
        self._hidden_MD = hidden_TD[self._first : self._first + num_rows]
        logits_MV = workspace_MV[:num_rows]
        if hidden_TD.dtype == torch.float32:
            torch.mm(self._hidden_MD, base.head_weight_VD.t(), out=logits_MV)
        else:
            logits_MV.copy_(torch.mm(self._hidden_MD, base.head_weight_VD.t()))
        spans = [self._span(piece) for piece in pieces]
        segments = [LoraSegment(p.task.adapter, span.start, span.stop) for p, span in zip(pieces, spans, strict=True)]
        self._s_PR = add_lora(self._hidden_MD, logits_MV, segments, HEAD_MODULE)
        max_M1 = logits_MV.amax(dim=1, keepdim=True)
        # Taken before the logits are overwritten.
        logprobs = [
            logits_MV[span].gather(1, piece.task.targets[piece.rows]).sub_(max_M1[span])
            for piece, span in zip(pieces, spans, strict=True)
        ]
        self._exp_MV = logits_MV.sub_(max_M1).exp_()
        self._sum_M1 = self._exp_MV.sum(dim=1, keepdim=True)
        log_sum_M1 = self._sum_M1.log()
        self._grads_PK = [
            _apply_loss(piece, logprobs_PK.sub_(log_sum_M1[span]))
            for piece, span, logprobs_PK in zip(pieces, spans, logprobs, strict=True)
        ]

    def backward(self, d_hidden_TD: Tensor) -> None:
        """Write d loss / d hidden of the pieces' rows and add the head adapters' gradients.

        d logprob_k / d logits = onehot_k - p, so d loss / d logits = sum_k g_k onehot_k - (sum_k g_k) p.
        """
        kept = [piece.gradient_rows if piece.task.grads is not None else _NO_ROWS for piece in self._pieces]
        num_kept = sum(len(rows) for rows in kept)
        if num_kept == 0:
            return
        weight_M1 = torch.zeros_like(self._sum_M1)
        for piece, grad_PK in zip(self._pieces, self._grads_PK, strict=True):
            weight_M1[self._span(piece)] = grad_PK.sum(dim=1, keepdim=True)
        weight_M1.neg_().div_(self._sum_M1)
        d_logits, hidden, index = self._exp_MV, self._hidden_MD, None
        starts = [self._span(piece).start for piece in self._pieces]
        if num_kept < self._pieces[-1].stop - self._pieces[0].start:
            chosen = np.concatenate([start + rows for start, rows in zip(starts, kept, strict=True)])
            padded = np.pad(chosen, (0, _round_up(num_kept) - num_kept), mode="edge")
            index = torch.from_numpy(padded).to(hidden.device)
            d_logits, hidden, weight_M1 = (x.index_select(0, index) for x in (d_logits, hidden, weight_M1))
            starts = [0, *np.cumsum([len(rows) for rows in kept])[:-1].tolist()]
        d_logits.mul_(weight_M1)
        segments, s_GR = self._finish_d_logits(d_logits, starts, kept)
        d_hidden = torch.mm(d_logits.to(hidden.dtype), self._base.head_weight_VD).float()
        add_lora_grads(d_logits, hidden, s_GR, d_hidden, segments, HEAD_MODULE)
        if index is None:
            first, last = self._pieces[0].start, self._pieces[-1].stop
            d_hidden_TD[first:last] = d_hidden[first - self._first : last - self._first]
        else:
            d_hidden_TD[self._first + index[:num_kept]] = d_hidden[:num_kept].to(d_hidden_TD.dtype)

    def _finish_d_logits(
        self, d_logits: Tensor, starts: Sequence[int], kept: Sequence[NDArray[np.int64]]
    ) -> tuple[list[LoraSegment], list[Tensor | None]]:
        """Add the one-hot terms; the segments of d_logits that have a gradient, and their rows of x A^T."""
        segments: list[LoraSegment] = []
        s_GR: list[Tensor | None] = []
        for piece, start, rows, grad, s_PR in zip(self._pieces, starts, kept, self._grads_PK, self._s_PR, strict=True):
            if len(rows) == 0:
                continue
            targets, s = piece.task.targets[piece.rows], s_PR
            if len(rows) < piece.stop - piece.start:
                index = torch.from_numpy(rows).to(targets.device)
                targets, grad = targets[index], grad[index]
                s = None if s is None else s[index]
            segment = LoraSegment(piece.task.adapter, start, start + len(rows), piece.task.grads)
            d_logits[segment.start : segment.stop].scatter_add_(1, targets, grad)
            segments.append(segment)
            s_GR.append(s)
        return segments, s_GR

    def _span(self, piece: _Piece) -> slice:
        """The piece's rows of the group."""
        return slice(piece.start - self._first, piece.stop - self._first)


_NO_ROWS: NDArray[np.int64] = np.zeros(0, dtype=np.int64)


def _apply_loss(piece: _Piece, logprobs_PK: Tensor) -> Tensor:
    """Book a piece's log-probabilities, losses and metrics; d loss / d logprobs."""
    task, result, rows = piece.task, piece.result, piece.rows
    inputs = {name: tensor[rows] for name, tensor in task.inputs.items()}
    terms = LOSS_FUNCTIONS[task.loss.name](logprobs_PK, inputs, task.loss.config)
    result.logprobs[rows] = logprobs_PK
    result.losses[rows] = terms.loss
    for name, value in terms.metrics.items():
        result.metrics[name] = result.metrics[name] + value if name in result.metrics else value
    return terms.grad


def _round_up(num_rows: int) -> int:
    return -(-num_rows // PACK_MULTIPLE) * PACK_MULTIPLE
