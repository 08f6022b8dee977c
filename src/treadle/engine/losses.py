"""The mathematics of the losses: small pure functions of target log-probabilities.

Each takes float32 log-probabilities of some rows and the rows' inputs, and gives the loss per target with its
closed-form derivative, so that the head can go on to the hidden states at once. Two kinds: a token loss acts on each
row alone and runs inside the head's chunks; a sequence loss acts on whole datums and is told where they end. Nothing
here knows logits, tenants or tensors' places. domain/losses.py says which inputs and settings each takes.
Invariant: row i of every output depends on row i of the inputs alone (token losses) or on the rows of its own datum
alone (sequence losses). Losses are summed, never averaged.

Legend: C rows of a chunk, T rows of a quantum, N datums and S sequences of a quantum, K target columns per row;
p = exp(logp) is the trained policy, q = exp(logprobs input) the one that sampled, A the advantages, sg[.] what is not
differentiated.
Sources: Tinker documentation, "Losses"; papers where named. docs/losses.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.domain.losses import (
    CLIP_HIGH,
    CLIP_LOW,
    KL_COEFF,
    LOSSES,
    SAMPLED_RUNS,
    SAMPLING_LOGPROBS,
    SEQUENCE_RATIO_MASK,
    Loss,
)

# No weight of stable_reinforce is larger: E_q[min(p / q, C)^2] <= C, whatever the two policies are.
RATIO_CAP = 2.0
_LOG_RATIO_CAP = math.log(RATIO_CAP)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """loss and grad = d loss / d logprobs, float32, shaped like the log-probabilities.

    metrics: 0-d tensors by name; only ":sum" metrics, so that chunks and quanta add up.
    """

    loss: Tensor
    grad: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]
TokenLoss = Callable[[Tensor, Inputs, Config], LossTerms]
# The last argument: how many rows each sequence has, in order (`sequence_lengths`); they cover all rows.
SequenceLoss = Callable[[Tensor, Inputs, Config, Sequence[int]], LossTerms]


def cross_entropy(logprobs_CK: Tensor, inputs: Inputs, config: Config) -> LossTerms:
    """loss = -sum_t w_t * logp_t ; the weights are any real numbers, and 1 where a datum sent none.

    The caller fills in absent weights, because one quantum may hold datums with and without them.
    """
    weights_CK = inputs["weights"]
    return LossTerms(loss=-weights_CK * logprobs_CK, grad=-weights_CK)


def importance_sampling(logprobs_C: Tensor, inputs: Inputs, config: Config) -> LossTerms:
    """loss = -sum_t r_t * A_t * w_t ; r = p / q is differentiated, so d loss / d logp = loss.

    The weights (1 where a datum sent none) scale the advantages: a token of weight 0 is one without advantage.
    """
    weighted_C = inputs["advantages"] * inputs["weights"]
    loss_C = -_ratio(logprobs_C, {**inputs, "advantages": weighted_C}) * weighted_C
    return LossTerms(loss=loss_C, grad=loss_C)


def ppo(logprobs_C: Tensor, inputs: Inputs, config: Config) -> LossTerms:
    """loss = -sum_t min(r_t * A_t, clip(r_t, low, high) * A_t) ; r = p / q. See _clipped_objective."""
    return _clipped_objective(_ratio(logprobs_C, inputs), inputs)


def cispo(logprobs_C: Tensor, inputs: Inputs, config: Config) -> LossTerms:
    """loss = -sum_t sg[clip(r_t, low, high)] * logp_t * A_t ; so d loss / d logp = -clip(r_t) * A_t.

    A token beyond the bounds keeps its gradient, with a bounded weight; it is counted as clipped.
    Source: Tinker documentation, "Losses"; MiniMax-M1 (arXiv 2506.13585), with the ratio's bounds themselves instead
    of 1 -+ epsilon.
    """
    ratio_C = _ratio(logprobs_C, inputs)
    bounded_C = _bounded(ratio_C, inputs)
    weight_C = bounded_C * inputs["advantages"]
    is_clipped_C = (bounded_C != ratio_C) & (inputs["advantages"] != 0)
    return LossTerms(
        loss=-weight_C * logprobs_C,
        grad=-weight_C,
        metrics={"clipped_tokens:sum": is_clipped_C.sum()},
    )


def dro(logprobs_C: Tensor, inputs: Inputs, config: Config) -> LossTerms:
    """loss = -sum_t (logp_t * A_t - beta / 2 * (logp_t - log q_t)^2) ; d/dlogp = -A_t + beta * (logp_t - log q_t).

    The penalty acts on every token, also on those whose advantage is 0: the documented formula knows no mask.
    Source: Tinker documentation, "DRO"; Richemond et al., 2024 (arXiv 2405.19107).
    """
    beta = config["beta"]
    advantages_C = inputs["advantages"]
    difference_C = logprobs_C - inputs["logprobs"]
    return LossTerms(
        loss=(0.5 * beta) * difference_C.square() - logprobs_C * advantages_C,
        grad=beta * difference_C - advantages_C,
    )


def gspo(logprobs_T1: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> LossTerms:
    """loss = -sum_t min(r_t * A_t, clip(r_t, low, high) * A_t) ; r_t = sg[s] * p_t / sg[p_t], one s per datum.

    s = exp(mean over the datum's tokens with sequence_ratio_mask != 0 of (logp - log q)), and 1 where there is none.
    So r_t = s in value and d r_t / d logp_t = s. The caller fills in an absent mask. The mean is taken in float64:
    the bounds leave room for parts in ten thousand, which a float32 sum over a long datum would eat into.
    Source: Tinker documentation, "Losses"; GSPO-token of Zheng et al., 2025 (arXiv 2507.18071).
    """
    assert logprobs_T1.shape == (sum(lengths), 1), "one target per token"
    is_counted_T = (inputs[SEQUENCE_RATIO_MASK] != 0).squeeze(1)
    difference_T = (logprobs_T1 - inputs["logprobs"]).squeeze(1).double()
    difference_T = torch.where(is_counted_T, difference_T, torch.zeros_like(difference_T))
    lengths_N = torch.tensor(lengths, dtype=torch.int64, device=logprobs_T1.device)
    # One reduction per datum: its sum cannot depend on the other datums.
    total_N = torch.segment_reduce(difference_T, "sum", lengths=lengths_N)
    count_N = torch.segment_reduce(is_counted_T.double(), "sum", lengths=lengths_N)
    ratio_N = torch.exp(total_N / count_N.clamp_(min=1)).float()
    ratio_T1 = ratio_N.repeat_interleave(lengths_N, output_size=len(logprobs_T1)).unsqueeze(1)
    return _clipped_objective(_one_without_advantage(ratio_T1, inputs), inputs)


def stable_reinforce(logprobs_T1: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> LossTerms:
    """loss = sum over sampled t of -sg[min(1, s) * min(r_t, C)] * A_t * logp_t + kl_coeff * k_t.

    r_t = p_t / q_t with the log q that the server recorded; s = exp(mean of log r) over the run of consecutive tokens
    of one sampled sequence that t belongs to; C = RATIO_CAP. k_t = r - 1 - log r up to C, and its tangent beyond:
    d k_t / d logp_t = min(r_t, C) - 1. So d loss / d logp_t is -A_t where the policies agree and within 2 * |A_t| +
    kl_coeff of 0 everywhere. In float64, as in gspo: near agreement r - 1 - log r is the square of a small number.
    Source: treadle's own; docs/losses.md derives it. Rows that were not sampled add nothing.
    """
    assert logprobs_T1.shape == (sum(lengths), 1), "one target per token"
    is_sampled_T1 = inputs[SAMPLED_RUNS] != 0
    difference_T1 = logprobs_T1.double() - inputs[SAMPLING_LOGPROBS].double()
    difference_T1 = torch.where(is_sampled_T1, difference_T1, torch.zeros_like(difference_T1))
    lengths_S = torch.tensor(lengths, dtype=torch.int64, device=logprobs_T1.device)
    # One reduction per run: its mean cannot depend on the other ones.
    mean_S = torch.segment_reduce(difference_T1.squeeze(1), "sum", lengths=lengths_S) / lengths_S
    run_weight_S = torch.exp(mean_S.clamp(max=0.0))
    run_weight_T1 = run_weight_S.repeat_interleave(lengths_S, output_size=len(logprobs_T1)).unsqueeze(1)
    bounded_T1 = difference_T1.clamp(max=_LOG_RATIO_CAP)
    ratio_T1 = torch.exp(bounded_T1)
    weight_T1 = torch.where(is_sampled_T1, run_weight_T1 * ratio_T1, torch.zeros_like(ratio_T1))
    kl_T1 = torch.expm1(bounded_T1) - bounded_T1 + (RATIO_CAP - 1.0) * (difference_T1 - bounded_T1)
    signal_T1 = weight_T1 * inputs["advantages"]
    kl_coeff = config[KL_COEFF]
    is_capped_T1 = (difference_T1 > _LOG_RATIO_CAP) & (inputs["advantages"] != 0)
    return LossTerms(
        loss=(kl_coeff * kl_T1 - signal_T1 * logprobs_T1).float(),
        grad=(kl_coeff * (ratio_T1 - 1.0) - signal_T1).float(),
        metrics={
            "treadle_objective_tokens:sum": is_sampled_T1.sum(),
            "clipped_tokens:sum": is_capped_T1.sum(),
            "importance_weight:sum": weight_T1.sum(),
            "kl_to_sampler:sum": kl_T1.sum(),
        },
    )


def _clipped_objective(ratio: Tensor, inputs: Inputs) -> LossTerms:
    """-min(r * A, clip(r, low, high) * A) of a ratio with d r / d logp = r.

    low and high are the ratio's bounds themselves (0.8 and 1.2, not 0.2). The gradient is that of the unclipped
    term where it is the smaller or equal one, else 0. Tokens whose clip is active are counted as clipped.
    """
    advantages = inputs["advantages"]
    free = ratio * advantages
    clipped = _bounded(ratio, inputs) * advantages
    is_clipped = clipped < free
    return LossTerms(
        loss=-torch.minimum(free, clipped),
        grad=torch.where(is_clipped, torch.zeros_like(free), -free),
        metrics={"clipped_tokens:sum": is_clipped.sum()},
    )


def _bounded(ratio: Tensor, inputs: Inputs) -> Tensor:
    """clip(r, low, high), per token. Admission refuses low > high."""
    return torch.minimum(torch.maximum(ratio, inputs[CLIP_LOW]), inputs[CLIP_HIGH])


def _ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """r_t = exp(logp_t - log q_t), and 1 where A_t is 0: such a token adds nothing, whatever placeholder its q_t is."""
    difference = logprobs - inputs["logprobs"]
    return torch.exp(torch.where(inputs["advantages"] == 0, torch.zeros_like(difference), difference))


def _one_without_advantage(ratio: Tensor, inputs: Inputs) -> Tensor:
    """The ratio, and 1 where A_t is 0: infinity times 0 would be NaN."""
    return torch.where(inputs["advantages"] == 0, torch.ones_like(ratio), ratio)


TOKEN_LOSSES: Mapping[str, TokenLoss] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
}
SEQUENCE_LOSSES: Mapping[str, SequenceLoss] = {"gspo": gspo, "stable_reinforce": stable_reinforce}
assert not TOKEN_LOSSES.keys() & SEQUENCE_LOSSES.keys()
assert TOKEN_LOSSES.keys() | SEQUENCE_LOSSES.keys() == LOSSES.keys(), "admission and engine know different losses"


def sequence_lengths(
    loss: Loss, inputs: Mapping[str, NDArray[np.float32]], datum_lengths: Sequence[int]
) -> Sequence[int]:
    """Rows of each sequence that a sequence loss takes whole, in order, from inputs [T, 1].

    Datums for gspo; runs of sampled tokens, and what lies between them, for stable_reinforce.
    """
    if loss.name != "stable_reinforce":
        return datum_lengths
    runs = inputs[SAMPLED_RUNS].reshape(-1)
    is_start = np.ones(len(runs) + 1, dtype=np.bool_)
    is_start[1:-1] = runs[1:] != runs[:-1]
    is_start[np.cumsum(datum_lengths)] = True
    lengths: list[int] = np.diff(np.flatnonzero(is_start)).tolist()
    return lengths


def rows_with_gradient(loss: Loss, inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.bool_]:
    """Rows [T] whose gradient can be other than 0, from inputs [T] or [T, K].

    Known before anything is computed, so that nothing waits for the device.
    """
    signal = inputs["weights" if loss.name == "cross_entropy" else "advantages"]
    if loss.name == "dro" and loss.config["beta"] != 0:
        return np.ones(len(signal), dtype=np.bool_)
    if loss.name == "stable_reinforce":
        is_sampled = inputs[SAMPLED_RUNS] != 0
        signal = is_sampled if loss.config[KL_COEFF] != 0 else (signal != 0) & is_sampled
    is_nonzero: NDArray[np.bool_] = (signal != 0).reshape(len(signal), -1).any(axis=1)
    return is_nonzero
