"""The mathematics of the losses: small pure functions of target log-probabilities.

Each takes float32 log-probabilities of some rows and the rows' inputs, and gives the loss per target with its
closed-form derivative, so that the head can go on to the hidden states at once. They act per token; nothing here
knows logits, tenants or tensors' places. domain/losses.py says which inputs and settings each takes.
Invariant: row i of every output depends on row i of the inputs alone. Losses are summed, never averaged.

Legend: C rows of a chunk (or T of a quantum), K target columns per row. Sources: Tinker documentation, "Losses";
importance ratio r = exp(logprob - logprob of the sampler).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.domain.losses import LOSSES


@dataclass(frozen=True, slots=True)
class LossTerms:
    """loss and grad = d loss / d logprobs, float32, shaped like the log-probabilities.

    metrics: 0-d tensors by name; only ":sum" metrics, so that chunks and quanta add up.
    """

    loss: Tensor
    grad: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


Inputs = Mapping[str, Tensor]
LossFn = Callable[[Tensor, Inputs, Mapping[str, float]], LossTerms]


def cross_entropy(logprobs_CK: Tensor, inputs: Inputs, config: Mapping[str, float]) -> LossTerms:
    """loss = -sum_t w_t * logp_t ; the weights are any real numbers, and 1 where a datum sent none.

    The caller fills in absent weights, because one quantum may hold datums with and without them.
    """
    weights_CK = inputs["weights"]
    return LossTerms(loss=-weights_CK * logprobs_CK, grad=-weights_CK)


def importance_sampling(logprobs_C: Tensor, inputs: Inputs, config: Mapping[str, float]) -> LossTerms:
    """loss = -sum_t r_t * A_t ; r is differentiated, so d loss / d logp = loss."""
    loss_C = -_ratio(logprobs_C, inputs) * inputs["advantages"]
    return LossTerms(loss=loss_C, grad=loss_C)


def ppo(logprobs_C: Tensor, inputs: Inputs, config: Mapping[str, float]) -> LossTerms:
    """loss = -sum_t min(r_t * A_t, clip(r_t, low, high) * A_t).

    low and high are the ratio's bounds themselves (0.8 and 1.2, not 0.2). The gradient is that of the unclipped
    term where it is the smaller or equal one, else 0. Tokens whose clip is active are counted as clipped.
    """
    advantages_C = inputs["advantages"]
    ratio_C = _ratio(logprobs_C, inputs)
    bounded_C = torch.minimum(
        torch.maximum(ratio_C, inputs["clip_low_threshold"]),
        inputs["clip_high_threshold"],
    )
    free_C = ratio_C * advantages_C
    clipped_C = bounded_C * advantages_C
    is_clipped_C = clipped_C < free_C
    return LossTerms(
        loss=-torch.minimum(free_C, clipped_C),
        grad=torch.where(is_clipped_C, torch.zeros_like(free_C), -free_C),
        metrics={"clipped_tokens:sum": is_clipped_C.sum()},
    )


def _ratio(logprobs_C: Tensor, inputs: Inputs) -> Tensor:
    """r_t = exp(logp_t - q_t), and 1 where A_t is 0: such a token adds nothing, whatever placeholder its q_t is."""
    difference_C = logprobs_C - inputs["logprobs"]
    return torch.exp(torch.where(inputs["advantages"] == 0, torch.zeros_like(difference_C), difference_C))


LOSS_FUNCTIONS: Mapping[str, LossFn] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
}
assert LOSS_FUNCTIONS.keys() == LOSSES.keys(), "admission and engine know different losses"


def rows_with_gradient(name: str, inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.bool_]:
    """Rows [T] whose gradient can be other than 0, from inputs [T] or [T, K].

    Known before anything is computed, so that nothing waits for the device.
    """
    weights = inputs["weights" if name == "cross_entropy" else "advantages"]
    is_nonzero: NDArray[np.bool_] = (weights != 0).reshape(len(weights), -1).any(axis=1)
    return is_nonzero
