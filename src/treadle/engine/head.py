"""The language-model head: target log-probabilities, the losses on them, and their gradients, group by group.

One visit of the vocabulary per group of rows: logits, logsumexp, target log-probabilities, losses, and the gradients
of hidden states and of the heads' own adapters; two GEMMs with the head's weight in all. Rows that cannot have a
gradient skip the second. A loss over whole datums is known only after the first visit; a second one then takes the
rows that have a gradient through the same code. The logits of a whole batch never exist. Arithmetic on logits is
float32. What the losses mean is the business of losses.py, what the rows belong to that of passes.py.
Invariant: a quantum is cut into pieces counted from its own first row, sums over rows are taken per piece, and a
group only lets pieces share GEMMs whose rows are independent; so numbers do not depend on the company.

Legend: T rows of the pack, S rows of a visit, M of a group, P of a piece, G of those that have a gradient, D hidden,
V vocabulary, K target columns per row, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.domain.limits import PACK_MULTIPLE
from treadle.domain.losses import Loss, resolve_loss
from treadle.engine.adapter import HEAD_MODULE, AdapterArena, AdapterWeights
from treadle.engine.buckets import round_up
from treadle.engine.custom_loss import QuantumLoss
from treadle.engine.kernels.base import LoraKernel, LoraSegment
from treadle.engine.kernels.segment_loop import SegmentLoop
from treadle.engine.losses import SEQUENCE_LOSSES, TOKEN_LOSSES
from treadle.errors import UserError

# Most rows of a quantum's piece, the unit of reduction. Fewer would read the head's weight more often than its
# arithmetic takes; more would only hold more logits.
_PIECE_ROWS = 256
# From this vocabulary size on half as many: 128 rows of 151,936 are 74 MiB of float32, 3.1 % of 4,096 tokens' logits.
_LARGE_VOCABULARY = 65_536
# Logits are moved up inside a group in blocks of this many columns, so that no second group of logits exists.
_COLUMN_BLOCK = 8_192
# Rows of logits start at multiples of this many numbers (64 bytes), whatever the vocabulary: products over a segment's
# rows sum in another order when its first row does not lie on 16 bytes, and where it lies depends on the neighbours.
_ROW_ALIGNMENT = 16
# Indexes go to the device with non_blocking: torch otherwise waits for all work in flight, once per group. The arrays
# are not pinned, so CUDA has copied them before the call returns (CUDA runtime API, "API synchronization behavior").
# A group's handful of pieces is what the loop is good at, on every device.
_ADAPTERS = SegmentLoop()
_CROSS_ENTROPY = resolve_loss("cross_entropy", {})


class Unembedding(Protocol):
    """What the head must know of a base model: its frozen output matrix [V, D]."""

    head_weight_VD: Tensor


def piece_rows(vocab_size: int) -> int:
    """Most rows of a piece. It decides how sums over rows are grouped, so it is part of the numerics profile."""
    return _PIECE_ROWS if vocab_size < _LARGE_VOCABULARY else _PIECE_ROWS // 2


def head_profile(vocab_size: int) -> str:
    """The head's part of the numerics profile."""
    return f"head-{piece_rows(vocab_size)}"


@dataclass(frozen=True, slots=True)
class HeadTask:
    """What one quantum, rows [start, stop) of the pack, asks of the head.

    targets: int64 [rows, K]. inputs: float32 [rows, K] by name. has_gradient: bool [rows] on the host, see
    losses.rows_with_gradient. sequence_lengths: see losses.sequence_lengths. grads: where the head's own dA and dB are
    added; None computes the loss alone. custom: what a custom loss computes, None for any other.
    """

    start: int
    stop: int
    targets: Tensor
    inputs: Mapping[str, Tensor]
    has_gradient: NDArray[np.bool_]
    sequence_lengths: Sequence[int]
    loss: Loss
    adapter: AdapterWeights
    grads: AdapterArena | None
    custom: QuantumLoss | None = None

    @property
    def is_late(self) -> bool:
        """The loss needs all log-probabilities of a datum."""
        return self.custom is not None or self.loss.name in SEQUENCE_LOSSES


@dataclass(frozen=True, slots=True)
class HeadResult:
    """logprobs and losses: float32 [rows, K]; metrics: 0-d tensors, sums over the quantum; filled in place.

    failures: why a custom loss has no terms; then nothing of the task but its logprobs counts.
    """

    logprobs: Tensor
    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    failures: list[UserError] = field(default_factory=list)


@torch.no_grad()
def run_head(
    base: Unembedding,
    hidden_TD: Tensor,
    tasks: Sequence[HeadTask],
    d_hidden_TD: Tensor | None,
    *,
    group_rows: int | None = None,
    has_equal_groups: bool = False,
) -> list[HeadResult]:
    """Log-probabilities and losses of each task; with gradients where `grads` is set and d_hidden_TD is given.

    Tasks follow one another in the pack without holes, from row 0. d_hidden_TD: zeros, in the dtype of hidden_TD;
    d loss / d hidden is written to the rows that have one. A result that is not finite is not noticed here; then
    the rows of its task and its `grads` are worthless, and only they.
    group_rows: most rows whose logits exist at one time, one piece unless given; a multiple of PACK_MULTIPLE, and
    no part of the numbers. has_equal_groups: every product takes exactly that many rows, for devices on which a row's
    bits depend on their number; hidden_TD has at least as many.
    """
    assert hidden_TD.shape[0] % PACK_MULTIPLE == 0
    results = [_empty_result(task) for task in tasks]
    # The gradient of a loss over whole datums is not known in the first visit.
    first = [replace(task, grads=None) if task.is_late else task for task in tasks]
    visit = _Visit(base, hidden_TD, d_hidden_TD, group_rows, has_equal_groups=has_equal_groups)
    visit.run(first, results)
    late: list[tuple[HeadTask, Tensor]] = []
    for task, result in zip(tasks, results, strict=True):
        if task.custom is not None:
            late.append(_apply_custom_loss(task, task.custom, result))
        elif task.is_late:
            late.append((task, _apply_sequence_loss(task, result)))
    if d_hidden_TD is not None:
        second, rows = _second_visit_tasks(late)
        if second:
            visit.run(second, [_empty_result(task) for task in second], rows)
    return results


def logits(
    base: Unembedding, hidden_TD: Tensor, segments: Sequence[LoraSegment], *, kernel: LoraKernel = _ADAPTERS
) -> Tensor:
    """float32 logits [T, V] of a few rows; segments count rows of `hidden_TD` and add the head's adapter.

    kernel: what computes its terms. For the sampler's handful of rows: the caller bounds T. No gradients.
    """
    with torch.no_grad():
        logits_TV = _empty_logits(hidden_TD.shape[0], base)
        _times_head(base, hidden_TD, logits_TV)
        kernel.add(hidden_TD, logits_TV, segments, HEAD_MODULE)
    return logits_TV


def _empty_logits(num_rows: int, base: Unembedding) -> Tensor:
    """float32 [num_rows, V] whose rows start at aligned addresses; not contiguous when V is not a multiple."""
    vocab_size = base.head_weight_VD.shape[0]
    row_size = round_up(vocab_size, _ROW_ALIGNMENT)
    return torch.empty(num_rows, row_size, dtype=torch.float32, device=base.head_weight_VD.device)[:, :vocab_size]


def _times_head(base: Unembedding, hidden_MD: Tensor, logits_MV: Tensor) -> None:
    """Write the base model's logits."""
    if hidden_MD.dtype == torch.float32:
        torch.mm(hidden_MD, base.head_weight_VD.t(), out=logits_MV)
    else:
        logits_MV.copy_(torch.mm(hidden_MD, base.head_weight_VD.t()))


def _empty_result(task: HeadTask) -> HeadResult:
    assert sum(task.sequence_lengths) == task.stop - task.start == len(task.has_gradient)
    logprobs = torch.empty(task.targets.shape, dtype=torch.float32, device=task.targets.device)
    return HeadResult(logprobs, torch.empty_like(logprobs))


def _apply_sequence_loss(task: HeadTask, result: HeadResult) -> Tensor:
    """Book the losses and metrics of a task whose log-probabilities are complete; d loss / d logprobs."""
    loss = SEQUENCE_LOSSES[task.loss.name]
    terms = loss(result.logprobs, task.inputs, task.loss.config, task.sequence_lengths)
    result.losses.copy_(terms.loss)
    result.metrics.update(terms.metrics)
    return terms.grad


def _apply_custom_loss(task: HeadTask, custom: QuantumLoss, result: HeadResult) -> tuple[HeadTask, Tensor]:
    """Book a custom loss; d loss / d logprobs, and the task with the rows in which that is not 0."""
    result.losses.zero_()
    grad = torch.zeros_like(result.logprobs)
    # Log-probabilities that are not finite are reported as such, and not by what a graph makes of them.
    if bool(torch.isfinite(result.logprobs).all()):
        try:
            terms = custom.terms(result.logprobs, wants_grad=task.grads is not None)
        except UserError as failure:
            result.failures.append(failure)
        else:
            result.losses.copy_(terms.loss)
            result.metrics.update(terms.metrics)
            grad = terms.grad
    return replace(task, has_gradient=(grad != 0).any(dim=1).cpu().numpy()), grad


def _second_visit_tasks(late: Sequence[tuple[HeadTask, Tensor]]) -> tuple[list[HeadTask], NDArray[np.int64]]:
    """What the second visit computes, and the row of the pack behind each of its rows.

    A known d loss / d logp is the gradient of a cross entropy with weights -d loss / d logp.
    """
    tasks: list[HeadTask] = []
    rows: list[NDArray[np.int64]] = []
    start = 0
    for task, grad in late:
        kept = np.flatnonzero(task.has_gradient)
        if task.grads is None or len(kept) == 0:
            continue
        index = torch.from_numpy(kept).to(grad.device, non_blocking=True)
        tasks.append(
            replace(
                task,
                start=start,
                stop=start + len(kept),
                targets=task.targets[index],
                inputs={"weights": -grad[index]},
                has_gradient=np.ones(len(kept), dtype=np.bool_),
                sequence_lengths=(len(kept),),
                loss=_CROSS_ENTROPY,
                custom=None,
            )
        )
        rows.append(task.start + kept)
        start += len(kept)
    return tasks, np.concatenate(rows) if rows else _NO_ROWS


_NO_ROWS: NDArray[np.int64] = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A few rows of one task: [start, stop) of the visit, `rows` of the task."""

    task: HeadTask
    result: HeadResult
    start: int
    stop: int
    rows: slice

    @property
    def gradient_rows(self) -> NDArray[np.int64]:
        """The rows of the piece for which a gradient is wanted and can be other than 0, counted from its start."""
        return _NO_ROWS if self.task.grads is None else np.flatnonzero(self.task.has_gradient[self.rows])


@dataclass(frozen=True, slots=True)
class _Workspace:
    """logits: float32 [M, V] of a group; block: a few columns of them, on the way from row to row."""

    logits: Tensor
    block: Tensor

    def moved_up(self, index_G: Tensor) -> Tensor:
        """The chosen rows of the logits, in the same memory from its first row on."""
        num_rows = index_G.shape[0]
        for start in range(0, self.logits.shape[1], _COLUMN_BLOCK):
            columns = self.logits[:, start : start + _COLUMN_BLOCK]
            chosen = self.block[:num_rows, : columns.shape[1]]
            # By way of a copy, because rows that are read and written may be the same.
            torch.index_select(columns, 0, index_G, out=chosen)
            columns[:num_rows] = chosen
        return self.logits[:num_rows]


class _Visit:
    """Takes rows of the pack through the vocabulary, group by group, in one workspace.

    One for all groups and visits: it stays warm, where fresh megabytes per group would be page faults.
    """

    def __init__(
        self,
        base: Unembedding,
        hidden_TD: Tensor,
        d_hidden_TD: Tensor | None,
        group_rows: int | None,
        *,
        has_equal_groups: bool,
    ) -> None:
        vocab_size = base.head_weight_VD.shape[0]
        self._base = base
        self._hidden_TD = hidden_TD
        self._d_hidden_TD = d_hidden_TD
        self._piece_rows = piece_rows(vocab_size)
        self._group_rows = self._piece_rows if group_rows is None else group_rows
        assert self._group_rows >= self._piece_rows
        assert self._group_rows % PACK_MULTIPLE == 0
        assert not has_equal_groups or hidden_TD.shape[0] >= self._group_rows, "a pack holds a whole group"
        self._row_unit = self._group_rows if has_equal_groups else PACK_MULTIPLE
        num_rows = min(self._group_rows, hidden_TD.shape[0])
        self._workspace = _Workspace(
            _empty_logits(num_rows, base),
            torch.empty(num_rows, min(_COLUMN_BLOCK, vocab_size), dtype=torch.float32, device=hidden_TD.device),
        )

    def run(
        self, tasks: Sequence[HeadTask], results: Sequence[HeadResult], rows: NDArray[np.int64] | None = None
    ) -> None:
        """Fill the results; write gradients if there is a place for them. rows: those of the pack, None for all."""
        index_S = None
        if rows is not None:
            padded = np.pad(rows, (0, round_up(len(rows), self._row_unit) - len(rows)), mode="edge")
            index_S = torch.from_numpy(padded).to(self._hidden_TD.device, non_blocking=True)
        num_rows = self._hidden_TD.shape[0] if index_S is None else index_S.shape[0]
        for pieces in self._groups(tasks, results):
            num_group_rows = round_up(pieces[-1].stop - pieces[0].start, self._row_unit)
            first = min(pieces[0].start, num_rows - num_group_rows)
            assert first >= 0
            span = slice(first, first + num_group_rows)
            hidden_MD = self._hidden_TD[span] if index_S is None else self._hidden_TD.index_select(0, index_S[span])
            group = _Group(self._base, hidden_MD, pieces, self._workspace, first, self._row_unit)
            written = None if self._d_hidden_TD is None else group.backward()
            if written is not None:
                assert self._d_hidden_TD is not None
                at, d_hidden_GD = written
                if index_S is None:
                    self._d_hidden_TD[span][at] = d_hidden_GD
                else:
                    self._d_hidden_TD[index_S[span][at]] = d_hidden_GD

    def _groups(self, tasks: Sequence[HeadTask], results: Sequence[HeadResult]) -> Iterator[list[_Piece]]:
        """Neighbouring pieces, up to `group_rows` rows together."""
        group: list[_Piece] = []
        next_row = 0
        for task, result in zip(tasks, results, strict=True):
            assert task.start == next_row < task.stop, "tasks follow one another"
            next_row = task.stop
            for start in range(task.start, task.stop, self._piece_rows):
                stop = min(start + self._piece_rows, task.stop)
                if group and stop - group[0].start > self._group_rows:
                    yield group
                    group = []
                group.append(_Piece(task, result, start, stop, slice(start - task.start, stop - task.start)))
        if group:
            yield group


class _Group:
    """The logits of a few pieces on their way to a gradient; they are overwritten as it goes.

    Its GEMMs take a multiple of row_unit rows (PACK_MULTIPLE, or the group's full size), so that a row's bits do not
    depend on their number. The rows beyond the pieces are their neighbours or padding; what comes of them is not used.
    hidden_MD: the group's rows, from row `first` of the visit on.
    """

    def __init__(
        self,
        base: Unembedding,
        hidden_MD: Tensor,
        pieces: Sequence[_Piece],
        workspace: _Workspace,
        first: int,
        row_unit: int,
    ) -> None:
        self._base = base
        self._row_unit = row_unit
        self._pieces = pieces
        self._first = first
        self._hidden_MD = hidden_MD
        self._workspace = workspace
        logits_MV = workspace.logits[: hidden_MD.shape[0]]
        _times_head(base, hidden_MD, logits_MV)
        spans = [self._span(piece) for piece in pieces]
        segments = [LoraSegment(p.task.adapter, span.start, span.stop) for p, span in zip(pieces, spans, strict=True)]
        self._s_PR = _ADAPTERS.add(hidden_MD, logits_MV, segments, HEAD_MODULE)
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
            _apply_token_loss(piece, logprobs_PK.sub_(log_sum_M1[span]))
            for piece, span, logprobs_PK in zip(pieces, spans, logprobs, strict=True)
        ]

    def backward(self) -> tuple[slice | Tensor, Tensor] | None:
        """Rows of the group that have a gradient, and d loss / d hidden for them; None when there are none.

        Adds the head adapters' gradients. d logprob_k / d logits = onehot_k - p, so
        d loss / d logits = sum_k g_k onehot_k - (sum_k g_k) p.
        """
        kept = [piece.gradient_rows for piece in self._pieces]
        num_kept = sum(len(rows) for rows in kept)
        if num_kept == 0:
            return None
        weight_M1 = torch.zeros_like(self._sum_M1)
        for piece, grad_PK in zip(self._pieces, self._grads_PK, strict=True):
            weight_M1[self._span(piece)] = grad_PK.sum(dim=1, keepdim=True)
        weight_M1.neg_().div_(self._sum_M1)
        d_logits, hidden, index = self._exp_MV, self._hidden_MD, None
        starts = [self._span(piece).start for piece in self._pieces]
        if num_kept < self._pieces[-1].stop - self._pieces[0].start:
            chosen = np.concatenate([start + rows for start, rows in zip(starts, kept, strict=True)])
            padded = np.pad(chosen, (0, round_up(num_kept, self._row_unit) - num_kept), mode="edge")
            index = torch.from_numpy(padded).to(hidden.device, non_blocking=True)
            d_logits = self._workspace.moved_up(index)
            hidden, weight_M1 = hidden.index_select(0, index), weight_M1.index_select(0, index)
            starts = [0, *np.cumsum([len(rows) for rows in kept])[:-1].tolist()]
        d_logits.mul_(weight_M1)
        segments, s_GR = self._finish_d_logits(d_logits, starts, kept)
        d_hidden = torch.mm(d_logits.to(hidden.dtype), self._base.head_weight_VD).float()
        _ADAPTERS.add_grads(d_logits, hidden, s_GR, d_hidden, segments, HEAD_MODULE)
        if index is None:
            at = slice(self._pieces[0].start - self._first, self._pieces[-1].stop - self._first)
            return at, d_hidden[at].to(hidden.dtype)
        return index[:num_kept], d_hidden[:num_kept].to(hidden.dtype)

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
                index = torch.from_numpy(rows).to(targets.device, non_blocking=True)
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


def _apply_token_loss(piece: _Piece, logprobs_PK: Tensor) -> Tensor:
    """Book a piece's log-probabilities, losses and metrics; d loss / d logprobs (0 while the loss is not known)."""
    task, result, rows = piece.task, piece.result, piece.rows
    result.logprobs[rows] = logprobs_PK
    if task.is_late:
        return torch.zeros_like(logprobs_PK)
    inputs = {name: tensor[rows] for name, tensor in task.inputs.items()}
    terms = TOKEN_LOSSES[task.loss.name](logprobs_PK, inputs, task.loss.config)
    result.losses[rows] = terms.loss
    for name, value in terms.metrics.items():
        result.metrics[name] = result.metrics[name] + value if name in result.metrics else value
    return terms.grad
