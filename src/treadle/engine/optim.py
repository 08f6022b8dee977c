"""AdamW on runs' flat arenas, all due runs in one call, each with its own settings.

It knows no projections: an adapter is a vector here. It equals torch.optim.AdamW step for step; elementwise
arithmetic is torch's own fused AdamW, so that a step's bits depend on nothing but its run and its settings.
Invariant: a step that would make anything not finite changes nothing, and no step looks at another's run.

How a step that cannot be undone is safe: weights and moments are overwritten in place, so whether the result is
finite must be known before. Bounds on their magnitudes (state.Magnitudes) and the gradient's norm prove it for every
usual step at no cost; a step for which they do not (eps = 0, or a learning rate beyond reason) works on top of copies
that are put back.

On a CPU an arena is worked through in pieces that stay in the cache, and each piece's update is formed apart from
the weights, whose norm is then free of memory traffic. On other devices all runs go together, a few launches for each
distinct set of settings. The latter was tested on a CPU only; that torch's CUDA kernels give a row the same bits in
any company (they are elementwise, and norms are reduced per tensor in fixed chunks) has not been verified on a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from treadle.domain.ops import AdamParams
from treadle.engine.adapter import AdapterArena
from treadle.engine.arenas import GradientArena
from treadle.engine.state import MAX_GRAD_NORM, Magnitudes, TrainingState
from treadle.errors import NoGradient, NonFiniteResult, TreadleError

# As torch.nn.utils.clip_grad_norm_ has it, so that clipped steps agree with the usual loops.
_CLIP_EPS = 1e-6
# Squares of numbers below this may vanish in float32, so a norm of 0 says only that no number is larger.
_NORM_FLOOR = 2e-19
# Weights and updates proven to stay below this need no copies: squares of a piece's updates sum up in float32.
_MAX_PROVEN = 1e16
# A second moment above this was not made by gradients that we accept.
_MAX_EXP_AVG_SQ = 1e37
# Numbers per piece and thread on a CPU (1 MiB of each arena). Measured over 2^15 to 2^19: below 2^17 the calls cost
# more than the cache saves; above 2^18 there is little left to gain where caches are shared.
_PIECE = 2**18
# Device memory for updates that are held apart to take their norms; larger batches are cut.
_MAX_WORKSPACE_BYTES = 2**30


def adamw_step(state: TrainingState, adam: AdamParams) -> dict[str, float]:
    """Take one step with the open gradient and clear it; the metrics. See adamw_steps, whose failures are raised."""
    (result,) = adamw_steps([(state, adam)])
    if isinstance(result, TreadleError):
        raise result
    return result


def adamw_steps(due: Sequence[tuple[TrainingState, AdamParams]]) -> list[dict[str, float] | TreadleError]:
    """Take one step of each run with its open gradient, and clear it; per run its metrics, or why it was not taken.

    m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2; with bias correction
    p <- p (1 - lr wd) - lr m^ / (sqrt(v^) + eps). Source: Loshchilov and Hutter, 2019, algorithm 2, as torch has it.
    grad_clip_norm > 0 first scales g so that its global norm is at most that. float32 throughout.
    Metrics: grad_norm (before clipping), update_norm (L2 of what is added to the weights), step (from 1),
    learning_rate; all finite.
    NoGradient: there is no open gradient. NonFiniteResult: gradient or update are not finite, or too large for
    squares in float32. Both leave that run as it was and the others to themselves.
    """
    assert len({id(state) for state, _ in due}) == len(due), "a run takes one step per call"
    with torch.no_grad():
        grad_norms = _measure([state for state, _ in due])
        plans = [_plan(state, adam, norm) for (state, adam), norm in zip(due, grad_norms, strict=True)]
        steps = [plan for plan in plans if isinstance(plan, _Step)]
        copies = [None if step.is_proven else step.copies() for step in steps]
        update_norms = _update(steps)
        finished = map(_finish, steps, update_norms, copies)
        return [plan if isinstance(plan, TreadleError) else next(finished) for plan in plans]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is to be taken.

    grad_scale: what clipping multiplies the gradient by, 1 for nothing. grad_max: no number of the scaled gradient is
    larger. is_proven: weights and moments end finite.
    """

    state: TrainingState
    adam: AdamParams
    grads: Tensor
    grad_norm: float
    grad_scale: float
    grad_max: float
    is_proven: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.state.weights.flat, self.state.exp_avg, self.state.exp_avg_sq

    @property
    def workspace_size(self) -> int:
        """Numbers beside the run's own that a step on it needs: the weights as they were, the clipped gradient."""
        return self.grads.numel() * (1 if self.grad_scale == 1.0 else 2)

    def copies(self) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in self.tensors)


def _measure(states: Sequence[TrainingState]) -> list[float | None]:
    """Each run's gradient norm (None: no gradient); also fills in magnitudes. One copy to the host for all."""
    asked: list[Tensor] = []
    for state in states:
        assert not state.is_released
        if state.grads is None:
            continue
        if _known_norm(state.grads) is None:
            asked.append(torch.linalg.vector_norm(state.grads.flat))
        if state.magnitudes is None:
            for tensor in (state.weights.flat, state.exp_avg, state.exp_avg_sq):
                asked += torch.aminmax(tensor)
    answers = iter(torch.stack(asked).tolist() if asked else ())
    norms: list[float | None] = []
    for state in states:
        if state.grads is None:
            norms.append(None)
            continue
        known = _known_norm(state.grads)
        norms.append(next(answers) if known is None else known)
        if state.magnitudes is None:
            state.magnitudes = _magnitudes(*itertools.islice(answers, 6))
    assert next(answers, None) is None
    return norms


def _known_norm(grads: AdapterArena) -> float | None:
    return grads.norm if isinstance(grads, GradientArena) else None


def _magnitudes(*bounds: float) -> Magnitudes:
    """From least and greatest of weights, exp_avg and exp_avg_sq. A negative exp_avg_sq has no square root: inf."""
    weights_low, weights_high, exp_avg_low, exp_avg_high, exp_avg_sq_low, exp_avg_sq_high = bounds
    return Magnitudes(
        weights=max(-weights_low, weights_high),
        exp_avg=max(-exp_avg_low, exp_avg_high),
        exp_avg_sq=exp_avg_sq_high if exp_avg_sq_low >= 0 else math.inf,
    )


def _plan(state: TrainingState, adam: AdamParams, grad_norm: float | None) -> _Step | TreadleError:
    if grad_norm is None:
        return NoGradient("optim_step without a successful forward_backward since the last step")
    if not grad_norm <= MAX_GRAD_NORM:
        return NonFiniteResult(
            f"gradient norm {grad_norm} is not finite or over {MAX_GRAD_NORM:g}; the step was not taken"
        )
    assert state.grads is not None
    grad_scale = 1.0
    if 0 < adam.grad_clip_norm < grad_norm + _CLIP_EPS:
        grad_scale = adam.grad_clip_norm / (grad_norm + _CLIP_EPS)
    grad_max = max(grad_norm, _NORM_FLOOR) * grad_scale
    is_proven = _is_proven(state, adam, grad_max)
    return _Step(state, adam, state.grads.flat, grad_norm, grad_scale, grad_max, is_proven)


def _is_proven(state: TrainingState, adam: AdamParams, grad_max: float) -> bool:
    """Whether bounds alone show that weights, moments and the squares of the update end finite.

    |m| is at most the greater of the old |m| and |g|, as the betas are in [0, 1); |update| <= step_size |m| / eps.
    Not a number compares as False, so what is not a number is not proven.
    """
    assert 0 <= adam.beta1 < 1, "checked at admission"
    assert 0 <= adam.beta2 < 1, "checked at admission"
    assert state.magnitudes is not None
    # The fused step takes eps in float32, where a tiny one is 0; one that overflows may count as smaller here.
    eps = float(np.float32(min(adam.eps, 1e38)))
    step_size = adam.learning_rate / (1 - adam.beta1 ** (state.step + 1))
    exp_avg = max(state.magnitudes.exp_avg, grad_max)
    decay = adam.learning_rate * adam.weight_decay
    return (
        eps > 0
        and state.magnitudes.exp_avg_sq <= _MAX_EXP_AVG_SQ
        and state.magnitudes.weights <= _MAX_PROVEN
        and step_size <= _MAX_PROVEN
        and step_size * exp_avg <= _MAX_PROVEN
        and decay <= _MAX_PROVEN
        and step_size * exp_avg / eps + decay * state.magnitudes.weights <= _MAX_PROVEN
    )


def _update(steps: Sequence[_Step]) -> list[float]:
    """Change weights and moments of all; the norms of the updates, which are not finite where anything is not."""
    if not steps:
        return []
    if steps[0].grads.device.type == "cpu":
        return _update_in_pieces(steps, piece=_PIECE * torch.get_num_threads())
    return _update_together(steps, max_bytes=_MAX_WORKSPACE_BYTES)


def _update_in_pieces(steps: Sequence[_Step], *, piece: int) -> list[float]:
    """One run after another, in pieces of that many numbers."""
    size = min(piece, max(step.grads.numel() for step in steps))
    # The update, and the clipped gradient where there is one.
    num_rows = 1 if all(step.grad_scale == 1.0 for step in steps) else 2
    workspace = torch.empty((num_rows, size), dtype=torch.float32)
    squares = [_update_one_in_pieces(step, workspace) for step in steps]
    totals = iter(torch.stack([square for of_step in squares for square in of_step]).tolist())
    return [math.sqrt(math.fsum(itertools.islice(totals, len(of_step)))) for of_step in squares]


def _update_one_in_pieces(step: _Step, workspace: Tensor) -> list[Tensor]:
    """The sum of squares of each piece's update."""
    adam = step.adam
    # The count of this step, from 1, as the fused step wants it.
    num_steps = [torch.tensor(float(step.state.step + 1), dtype=torch.float32)]
    squares: list[Tensor] = []
    pieces = zip(*(torch.split(tensor, workspace.shape[1]) for tensor in (*step.tensors, step.grads)), strict=True)
    for weights, exp_avg, exp_avg_sq, grads in pieces:
        update = workspace[0, : weights.numel()]
        if step.grad_scale != 1.0:
            grads = torch.mul(grads, step.grad_scale, out=workspace[1, : weights.numel()])
        if adam.weight_decay == 0:
            # A step from zero is the update; adding it rounds exactly as a step from the weights does.
            update.zero_()
            _fused_adamw([update], [grads], [exp_avg], [exp_avg_sq], num_steps, adam)
            weights.add_(update)
        else:
            update.copy_(weights)
            _fused_adamw([weights], [grads], [exp_avg], [exp_avg_sq], num_steps, adam)
            update.sub_(weights)
        squares.append(torch.dot(update, update))
    return squares


def _update_together(steps: Sequence[_Step], *, max_bytes: int) -> list[float]:
    """Runs of equal settings in one fused call, as many as `max_bytes` of workspace allow."""
    batches = list(_batches(steps, max_bytes))
    # Before anything is written: an allocation that fails later would leave some runs half stepped.
    size = max(sum(step.workspace_size for step in batch) for batch in batches)
    workspace = steps[0].grads.new_empty(size)
    norms: dict[int, Tensor] = {}
    for batch in batches:
        norms.update(zip(map(id, batch), _update_batch(batch, workspace), strict=True))
    return [float(norm) for norm in torch.stack([norms[id(step)] for step in steps]).tolist()]


def _update_batch(batch: Sequence[_Step], workspace: Tensor) -> list[Tensor]:
    """One fused call; the norm of each run's update."""
    cursor = 0

    def take(size: int) -> Tensor:
        nonlocal cursor
        cursor += size
        return workspace[cursor - size : cursor]

    weights = [step.state.weights.flat for step in batch]
    before = [take(tensor.numel()) for tensor in weights]
    torch._foreach_copy_(before, weights)
    grads = [
        step.grads if step.grad_scale == 1.0 else torch.mul(step.grads, step.grad_scale, out=take(step.grads.numel()))
        for step in batch
    ]
    counts = torch.tensor([float(step.state.step + 1) for step in batch], dtype=torch.float32)
    _fused_adamw(
        weights,
        grads,
        [step.state.exp_avg for step in batch],
        [step.state.exp_avg_sq for step in batch],
        list(counts.to(workspace.device).unbind()),
        batch[0].adam,
    )
    torch._foreach_sub_(before, weights)
    return list(torch._foreach_norm(before))


def _batches(steps: Sequence[_Step], max_bytes: int) -> Iterator[list[_Step]]:
    """Steps that one fused call can take, in order; one that needs more than `max_bytes` of workspace alone."""
    by_settings: dict[AdamParams, list[_Step]] = {}
    for step in steps:
        # Clipping is done before, run by run.
        by_settings.setdefault(replace(step.adam, grad_clip_norm=0.0), []).append(step)
    for group in by_settings.values():
        batch: list[_Step] = []
        num_bytes = 0
        for step in group:
            size = step.workspace_size * step.grads.itemsize
            if batch and num_bytes + size > max_bytes:
                yield batch
                batch, num_bytes = [], 0
            batch.append(step)
            num_bytes += size
        yield batch


def _fused_adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    num_steps: list[Tensor],
    adam: AdamParams,
) -> None:
    # torch.optim.adamw.adamw ends here too; its own checks cost more than a small adapter's step.
    torch._fused_adamw_(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        num_steps,
        lr=adam.learning_rate,
        beta1=adam.beta1,
        beta2=adam.beta2,
        weight_decay=adam.weight_decay,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
    )


def _finish(step: _Step, update_norm: float, copies: tuple[Tensor, ...] | None) -> dict[str, float] | TreadleError:
    """Book the step, or put everything back when its update is not finite."""
    state, adam = step.state, step.adam
    if not math.isfinite(update_norm):
        assert copies is not None, "a step that was proven to end finite did not"
        for tensor, copy in zip(step.tensors, copies, strict=True):
            tensor.copy_(copy)
        return NonFiniteResult(
            f"the update is not finite (learning_rate {adam.learning_rate}, eps {adam.eps}); the step was not taken"
        )
    state.magnitudes = _magnitudes_after(step, update_norm)
    state.drop_gradient()
    state.step += 1
    return {
        "grad_norm": step.grad_norm,
        "update_norm": update_norm,
        # Not "step": tinker-cookbook 0.6.1 writes these beside its own `step`, the key it cuts its log at on resuming.
        "num_steps": float(state.step),
        "learning_rate": adam.learning_rate,
    }


def _magnitudes_after(step: _Step, update_norm: float) -> Magnitudes | None:
    """Bounds that hold after the step; None, to look again, when those before were of no use."""
    before = step.state.magnitudes
    if before is None or not step.is_proven:
        return None
    return Magnitudes(
        weights=before.weights + max(update_norm, _NORM_FLOOR),
        exp_avg=max(before.exp_avg, step.grad_max),
        exp_avg_sq=max(before.exp_avg_sq, step.grad_max**2),
    )
