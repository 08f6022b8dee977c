"""A checked graph on made-up tensors, through the code that runs it in workers: what an operator wants to know of it.

It knows no tenants and no decisions; what it finds is JSON for people, with one claim in it, "is_ok". Made-up inputs
are of several kinds, because nobody knows what a loss divides by: it is fine when one kind is fine, and all are shown.
Derivatives are compared with central differences in float64 along random directions; a graph that detaches something
has a gradient that is not its derivative on purpose, and one with 16-bit numbers is too coarse: they are not compared.
Invariant: the same graph gives the same report, but for times and memory.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.domain.custom_loss import CustomLoss, DType, Node
from treadle.domain.custom_loss_names import canonical_function
from treadle.domain.limits import QUANTUM_TOKENS
from treadle.domain.ops import Datum
from treadle.engine.custom_loss import QuantumLoss
from treadle.engine.losses import LossTerms
from treadle.errors import UserError

_COLUMNS = 4
_LENGTHS = (33, 7, 64)
_NUM_DIRECTIONS = 8
# So many of them must agree: a random point may lie beside a kink.
_MIN_AGREEING = 6
_STEPS = (1e-3, 1e-5)
_TOLERANCE = 1e-3
_REPETITIONS = 3
# Kinds of inputs, in the order in which they are tried. Floats are float32, as the SDK sends them.
_KINDS = ("normal", "between 0 and 1", "ones", "integers")


def report_on(loss: CustomLoss) -> dict[str, Any]:
    """What was found; JSON. It raises nothing that depends on the graph."""
    cases = [_case(loss, kind) for kind in _KINDS]
    fine = next((kind for kind, case in zip(_KINDS, cases, strict=True) if case["is_ok"]), None)
    report: dict[str, Any] = {"is_ok": fine is not None, "inputs": cases}
    if fine is None:
        report["reason"] = f"it works with no kind of made-up inputs; with {_KINDS[0]} ones: {cases[0]['reason']}"
        return report
    return report | {"one_token": _one_token(loss, fine), **_cost(loss, fine)}


def _case(loss: CustomLoss, kind: str) -> dict[str, Any]:
    datums = [_datum(loss, length, kind, seed) for seed, length in enumerate(_LENGTHS)]
    try:
        alone = [_terms(loss, [datum]) for datum in datums]
        neighbours = _neighbours(loss, datums, alone)
        gradient = _gradient(loss, datums[0])
    except UserError as error:
        return {"kind": kind, "is_ok": False, "reason": error.message}
    case = {"kind": kind, "is_ok": neighbours is None and gradient != "differs", "gradient": gradient}
    case["loss"] = float(alone[0].loss.sum())
    if neighbours is not None:
        case["reason"] = neighbours
    elif gradient == "differs":
        case["reason"] = "the gradient is not the derivative of the loss, and nothing is detached"
    return case


@dataclass(frozen=True, slots=True)
class _Sample:
    """A datum with its log-probabilities, [T] or [T, K]."""

    datum: Datum
    logprobs: Tensor


def _datum(loss: CustomLoss, length: int, kind: str, seed: int) -> _Sample:
    rng = np.random.default_rng((length, seed))
    shape = (length,) if loss.logprobs_rank == 1 else (length, _COLUMNS)
    logprobs = -rng.exponential(1.0, shape).astype(np.float32)
    inputs: dict[str, np.ndarray] = {"target_tokens": np.zeros(shape, dtype=np.int64)}
    for given in loss.datum_inputs:
        inputs[given.name] = _input(given.name, (length, _COLUMNS)[: given.rank], kind, rng, like=logprobs)
    return _Sample(Datum(tokens=np.zeros(length, dtype=np.int32), inputs=inputs), torch.from_numpy(logprobs))


def _input(name: str, shape: tuple[int, ...], kind: str, rng: np.random.Generator, *, like: np.ndarray) -> np.ndarray:
    """An input of this kind. Log-probabilities are close to the trainer's own, as they are in training."""
    if name.endswith("logprobs") and kind != "integers":
        near = like if shape == like.shape else np.full(shape, -1.0)
        return np.asarray(np.minimum(near + rng.normal(0, 0.1, shape), 0.0), dtype=np.float32)
    match kind:
        case "normal":
            return np.asarray(rng.normal(size=shape), dtype=np.float32)
        case "between 0 and 1":
            return np.asarray(rng.uniform(0.05, 0.95, shape), dtype=np.float32)
        case "ones":
            return np.ones(shape, dtype=np.float32)
    return np.asarray(rng.integers(0, 2, shape), dtype=np.int64)


def _terms(loss: CustomLoss, samples: Sequence[_Sample], *, wants_grad: bool = True) -> LossTerms:
    """As a worker computes a quantum. Raises UserError."""
    columns = [sample.logprobs if sample.logprobs.ndim == 2 else sample.logprobs[:, None] for sample in samples]
    quantum = QuantumLoss(loss, [sample.datum for sample in samples], first_datum_index=0)
    return quantum.terms(torch.cat(columns), wants_grad=wants_grad)


def _neighbours(loss: CustomLoss, samples: Sequence[_Sample], alone: Sequence[LossTerms]) -> str | None:
    """Why a datum's numbers depend on its company; None when they do not, to the bit, in two orders."""
    for order in (range(len(samples)), reversed(range(len(samples)))):
        indices = list(order)
        together = _terms(loss, [samples[index] for index in indices])
        row = 0
        for index in indices:
            rows = slice(row, row + samples[index].datum.num_tokens)
            row = rows.stop
            same_loss = torch.equal(together.loss[rows], alone[index].loss)
            if not (same_loss and torch.equal(together.grad[rows], alone[index].grad)):
                return "the numbers of a datum depend on what else is in the request"
    return None


def _gradient(loss: CustomLoss, sample: _Sample) -> str:
    """ "agrees" with central differences in float64, "differs", or "not compared" where it need not agree."""
    if any(_is_off_the_derivative(node) for node in loss.nodes):
        return "not compared"
    exact = _doubled(sample)
    grad = _terms(loss, [exact]).grad.flatten()
    agreeing = 0
    rng = np.random.default_rng(_NUM_DIRECTIONS)
    for _ in range(_NUM_DIRECTIONS):
        direction = torch.from_numpy(rng.normal(size=tuple(exact.logprobs.shape)))
        direction /= direction.norm()
        slope = float(grad @ direction.flatten())
        scale = max(abs(slope), float(grad.norm()) * 1e-2, 1e-9)
        agreeing += any(
            abs(_slope(loss, exact, direction * step) / step - slope) <= _TOLERANCE * scale for step in _STEPS
        )
    return "agrees" if agreeing >= _MIN_AGREEING else "differs"


def _is_off_the_derivative(node: Node) -> bool:
    """Whether a graph has a gradient of its own from here on, or no more digits than differences need."""
    name = canonical_function(node.target).removeprefix("torch.")
    return name in ("detach", "half", "bfloat16") or any(
        isinstance(value, DType) and value.name in ("float16", "bfloat16")
        for value in (*node.args, *node.kwargs.values())
    )


def _slope(loss: CustomLoss, sample: _Sample, step: Tensor) -> float:
    """Half the loss's difference between a step forwards and one backwards."""
    ends = [_Sample(sample.datum, sample.logprobs + sign * step) for sign in (1, -1)]
    high, low = (float(_terms(loss, [end], wants_grad=False).loss.sum()) for end in ends)
    return (high - low) / 2


def _doubled(sample: _Sample) -> _Sample:
    inputs: Mapping[str, np.ndarray] = {
        name: value.astype(np.float64) if value.dtype == np.float32 else value
        for name, value in sample.datum.inputs.items()
    }
    return _Sample(Datum(tokens=sample.datum.tokens, inputs=inputs), sample.logprobs.double())


def _one_token(loss: CustomLoss, kind: str) -> str:
    """What becomes of a datum of one token, which a standard deviation, say, has none for."""
    try:
        _terms(loss, [_datum(loss, 1, kind, 0)])
    except UserError as error:
        return error.message
    return "ok"


def _cost(loss: CustomLoss, kind: str) -> dict[str, Any]:
    """Processor time of QUANTUM_TOKENS tokens as one datum and as many, and the memory that came on top."""
    before = _peak_bytes()
    try:
        one = _milliseconds(loss, [_datum(loss, QUANTUM_TOKENS, kind, 0)])
    except UserError as error:
        return {"ms_per_2048_tokens": None, "long_datum": error.message}
    length = QUANTUM_TOKENS // 16
    many, outcome = None, "ok"
    try:
        many = _milliseconds(loss, [_datum(loss, length, kind, seed) for seed in range(16)])
    except UserError as error:
        outcome = error.message
    return {
        "ms_per_2048_tokens": {"one datum": one, "16 datums": many},
        "peak_bytes": max(_peak_bytes() - before, 0),
        "long_datum": "ok",
        "many_datums": outcome,
    }


def _milliseconds(loss: CustomLoss, samples: Sequence[_Sample]) -> float:
    times = []
    for _ in range(_REPETITIONS):
        start = time.thread_time()
        _terms(loss, samples)
        times.append(time.thread_time() - start)
    return round(1_000 * statistics.median(times), 3)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
