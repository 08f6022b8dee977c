"""AdamW on a run's flat arenas.

One fused call over weights, gradient and moments; equals torch.optim.AdamW step for step. It knows no
projections: an adapter is a vector here.
Invariant: a step that would make anything not finite changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from treadle.domain.ops import AdamParams
from treadle.engine.adapter import TrainingState
from treadle.errors import NoGradient, NonFiniteResult

# As torch.nn.utils.clip_grad_norm_ has it, so that clipped steps agree with the usual loops.
_CLIP_EPS = 1e-6
# Squares of gradients up to this norm are finite in float32, so the second moments are.
_MAX_GRAD_NORM = 1e18


def adamw_step(state: TrainingState, adam: AdamParams) -> dict[str, float]:
    """Take one step with the open gradient and clear it; the metrics, all finite.

    m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2; with bias correction
    p <- p (1 - lr wd) - lr m^ / (sqrt(v^) + eps). Source: Loshchilov and Hutter, 2019, algorithm 2, as torch has it.
    grad_clip_norm > 0 first scales g so that its global norm is at most that. float32 throughout.
    Metrics: grad_norm (before clipping), update_norm (L2 of the change of the weights), step (from 1), learning_rate.
    Raises NoGradient without an open gradient, NonFiniteResult when gradient or update are not finite; both leave
    the state as it was.
    """
    if state.grads is None:
        raise NoGradient("optim_step without a successful forward_backward since the last step")
    grads = state.grads.flat
    grad_norm = torch.linalg.vector_norm(grads).item()
    if not grad_norm <= _MAX_GRAD_NORM:
        raise NonFiniteResult(
            f"gradient norm {grad_norm} is not finite or over {_MAX_GRAD_NORM:g}; the step was not taken"
        )
    if 0 < adam.grad_clip_norm < grad_norm + _CLIP_EPS:
        grads = grads * (adam.grad_clip_norm / (grad_norm + _CLIP_EPS))
    weights = state.weights.flat
    before = weights.clone()
    exp_avg, exp_avg_sq = state.exp_avg.clone(), state.exp_avg_sq.clone()
    _fused_adamw(weights, grads, exp_avg, exp_avg_sq, state.step, adam)
    update_norm = torch.linalg.vector_norm(weights - before).item()
    if not math.isfinite(update_norm):
        weights.copy_(before)
        raise NonFiniteResult(
            f"the update is not finite (learning_rate {adam.learning_rate}, eps {adam.eps}); the step was not taken"
        )
    state.exp_avg, state.exp_avg_sq = exp_avg, exp_avg_sq
    state.grads = None
    state.num_open_passes = 0
    state.step += 1
    return {
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "step": float(state.step),
        "learning_rate": adam.learning_rate,
    }


def _fused_adamw(
    weights: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, adam: AdamParams
) -> None:
    # A fused step wants its step count as a float32 tensor on the device; it adds 1 to it first.
    state_step = torch.tensor(float(step), dtype=torch.float32, device=weights.device)
    with torch.no_grad():
        adamw(
            [weights],
            [grads],
            [exp_avg],
            [exp_avg_sq],
            [],
            [state_step],
            fused=True,
            amsgrad=False,
            beta1=adam.beta1,
            beta2=adam.beta2,
            lr=adam.learning_rate,
            weight_decay=adam.weight_decay,
            eps=adam.eps,
            maximize=False,
        )
