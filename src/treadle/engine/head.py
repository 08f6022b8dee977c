"""The language-model head: target log-probabilities, the loss on them, and its gradient, chunk by chunk.

One visit of the vocabulary per chunk of rows: logits, logsumexp, target log-probabilities, loss, and the gradient
of hidden states and of the head's own adapter, two GEMMs with the head's weight in all. Rows that cannot have a
gradient skip the second. Logits of a whole quantum never exist. Arithmetic on logits is float32.
This module knows one quantum at a time; what the rows mean is the business of losses.py and passes.py.
Invariant: chunks are counted from the quantum's first row, so numbers do not depend on packing.

Legend: T rows of the quantum, C rows of a chunk, G of those with a gradient, D hidden, V vocabulary, K target
columns per row, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.domain.losses import Loss
from treadle.engine.adapter import HEAD_MODULE, AdapterArena, AdapterWeights
from treadle.engine.base_model import BaseModel
from treadle.engine.kernels import LoraSegment, add_lora
from treadle.engine.losses import LOSS_FUNCTIONS

# A chunk's logits aim at this many numbers (1 MiB in float32): they stay in a core's cache between the few
# elementwise visits. The bounds keep its GEMMs efficient and its memory below 256 rows of logits.
_CHUNK_NUMBERS = 2**18
_MIN_CHUNK_ROWS = 64
_MAX_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class HeadTask:
    """What one quantum asks of the head.

    targets: int64 [T, K]. inputs: float32 [T, K] by name. has_gradient: bool [T] on the host, see
    losses.rows_with_gradient. adapter: the quantum's weights. grads: where the head's own dA and dB are added;
    None computes the loss alone.
    """

    targets: Tensor
    inputs: Mapping[str, Tensor]
    has_gradient: NDArray[np.bool_]
    loss: Loss
    adapter: AdapterWeights
    grads: AdapterArena | None


@dataclass(frozen=True, slots=True)
class HeadResult:
    """logprobs and losses float32 [T, K]; metrics: 0-d tensors, sums over the quantum."""

    logprobs: Tensor
    losses: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def chunk_rows(vocab_size: int) -> int:
    """Rows per chunk; depends on the model alone."""
    return min(_MAX_CHUNK_ROWS, max(_MIN_CHUNK_ROWS, _CHUNK_NUMBERS // vocab_size))


def new_workspace(base: BaseModel) -> Tensor:
    """Memory for the logits of one chunk [C, V], shared by all quanta of a micro-batch.

    One block that stays warm: fresh megabytes per chunk cost as many page faults as the GEMM costs arithmetic.
    """
    return torch.empty(chunk_rows(base.vocab_size), base.vocab_size, dtype=torch.float32, device=base.device)


@torch.no_grad()
def run_head(
    base: BaseModel, hidden_TD: Tensor, task: HeadTask, d_hidden_TD: Tensor | None, *, workspace_CV: Tensor
) -> HeadResult:
    """Log-probabilities and losses of one quantum; with gradients when `task.grads` is set.

    workspace_CV: from new_workspace; overwritten. d_hidden_TD: zeros, in the dtype of hidden_TD; d loss / d hidden is written to the rows that have one. A result
    that is not finite is not noticed here; then `task.grads` must be dropped.
    """
    num_rows = hidden_TD.shape[0]
    assert task.targets.shape[0] == num_rows
    assert (task.grads is None) == (d_hidden_TD is None)
    logprobs_TK = torch.empty(task.targets.shape, dtype=torch.float32, device=hidden_TD.device)
    losses_TK = torch.empty_like(logprobs_TK)
    metrics: dict[str, Tensor] = {}
    loss_fn = LOSS_FUNCTIONS[task.loss.name]
    step = workspace_CV.shape[0]
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        chunk = _Chunk(base, task, hidden_TD[rows], task.targets[rows], workspace_CV)
        inputs = {name: tensor[rows] for name, tensor in task.inputs.items()}
        terms = loss_fn(chunk.logprobs_CK, inputs, task.loss.config)
        logprobs_TK[rows] = chunk.logprobs_CK
        losses_TK[rows] = terms.loss
        for name, value in terms.metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
        if d_hidden_TD is not None and task.has_gradient[rows].any():
            chunk.backward(terms.grad, task.has_gradient[rows], d_hidden_TD[rows])
    return HeadResult(logprobs_TK, losses_TK, metrics)


def logits(base: BaseModel, hidden_TD: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
    """float32 logits [T, V] of a few rows; segments count rows of `hidden_TD` and add the head's adapter.

    For the sampler's handful of rows: the caller bounds T. No gradients.
    """
    with torch.no_grad():
        logits_TV = torch.mm(hidden_TD, base.head_weight_VD.t()).float()
        add_lora(hidden_TD, logits_TV, segments, HEAD_MODULE)
    return logits_TV


class _Chunk:
    """The logits of C rows on their way to a gradient; they are overwritten as it goes."""

    def __init__(
        self, base: BaseModel, task: HeadTask, hidden_CD: Tensor, targets_CK: Tensor, workspace_CV: Tensor
    ) -> None:
        self._base = base
        self._task = task
        self._hidden_CD = hidden_CD
        self._targets_CK = targets_CK
        logits_CV = workspace_CV[: hidden_CD.shape[0]]
        if hidden_CD.dtype == torch.float32:
            torch.mm(hidden_CD, base.head_weight_VD.t(), out=logits_CV)
        else:
            logits_CV.copy_(torch.mm(hidden_CD, base.head_weight_VD.t()))
        segment = LoraSegment(task.adapter, 0, hidden_CD.shape[0])
        (self._s_CR,) = add_lora(hidden_CD, logits_CV, (segment,), HEAD_MODULE)
        max_C1 = logits_CV.amax(dim=1, keepdim=True)
        target_logits_CK = logits_CV.gather(1, targets_CK).sub_(max_C1)
        self._exp_CV = logits_CV.sub_(max_C1).exp_()
        self._sum_C1 = self._exp_CV.sum(dim=1, keepdim=True)
        self.logprobs_CK = target_logits_CK.sub_(self._sum_C1.log())

    def backward(self, grad_CK: Tensor, has_gradient_C: NDArray[np.bool_], d_hidden_CD: Tensor) -> None:
        """Write d loss / d hidden and add the head adapter's gradient; grad_CK is d loss / d logprobs.

        d logprob_k / d logits = onehot_k - p, so d loss / d logits = sum_k g_k onehot_k - (sum_k g_k) p.
        """
        hidden, s, targets, grad = self._hidden_CD, self._s_CR, self._targets_CK, grad_CK
        d_logits, total = self._exp_CV, self._sum_C1
        rows: Tensor | None = None
        if not has_gradient_C.all():
            rows = torch.from_numpy(np.flatnonzero(has_gradient_C)).to(hidden.device)
            hidden, targets, grad, d_logits, total = (x[rows] for x in (hidden, targets, grad, d_logits, total))
            s = None if s is None else s[rows]
        d_logits.mul_(grad.sum(dim=1, keepdim=True).neg_().div_(total))
        d_logits.scatter_add_(1, targets, grad)
        d_hidden_GD = torch.mm(d_logits.to(hidden.dtype), self._base.head_weight_VD)
        pair = self._task.adapter.pair(HEAD_MODULE)
        if s is not None and pair is not None:
            a_RD, bt_RV = pair
            scale = self._task.adapter.scale
            grads = None if self._task.grads is None else self._task.grads.pair(HEAD_MODULE)
            assert grads is not None, "gradients are laid out like the weights"
            ds_GR = torch.mm(d_logits, bt_RV.t()).mul_(scale)
            grads[0].addmm_(ds_GR.t(), hidden.float())
            grads[1].addmm_(s.t(), d_logits, alpha=scale)
            d_hidden_GD = torch.addmm(d_hidden_GD.float(), ds_GR, a_RD).to(hidden.dtype)
        if rows is None:
            d_hidden_CD.copy_(d_hidden_GD)
        else:
            d_hidden_CD[rows] = d_hidden_GD
