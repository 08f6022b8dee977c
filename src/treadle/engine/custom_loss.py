"""Custom losses, run: a checked graph on one datum after another, and d loss / d logprobs by autograd.

It runs on the CPU whatever the device is: an index out of range ends a CUDA context and with it the worker, while here
it is an error of one request. It knows no tenants and no logits; the head asks it for the terms of a whole quantum when
all its log-probabilities are there, as for gspo. What one datum may cost is bounded before each operation.
Invariants: a datum's numbers depend on its own log-probabilities and inputs alone; nothing a graph does outlives it.

Legend: T rows of a quantum, K target columns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.domain.custom_loss import Argument, CustomLoss, DType, Node, NodeOp, Ref
from treadle.domain.custom_loss_names import DTYPES, canonical_function
from treadle.domain.limits import (
    CUSTOM_LOSS_WORK_PER_DATUM,
    CUSTOM_LOSS_WORK_PER_NODE,
    CUSTOM_LOSS_WORK_PER_TOKEN,
    MAX_CUSTOM_LOSS_NUMBERS,
    MAX_CUSTOM_LOSS_NUMBERS_PER_DATUM,
    MAX_CUSTOM_LOSS_S,
)
from treadle.domain.ops import Datum
from treadle.engine.custom_loss_ops import FUNCTION_TABLE, MAX_INT_BITS, METHOD_TABLE, Cost, Operation
from treadle.engine.losses import LossTerms
from treadle.errors import InvalidRequest, NonFiniteResult, UserError

_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
_CPU = torch.device("cpu")
MAX_DIMS = 8
MAX_SEQUENCE = 4_096
# What torch and Python raise for arguments that do not fit. Bugs of ours raise AssertionError and pass.
_CALL_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class _DatumTerms:
    """grad: float32 shaped like the log-probabilities, None where none was asked for."""

    loss: float
    grad: Tensor | None
    metrics: Mapping[str, float]


class QuantumLoss:
    """A custom loss bound to the datums of one quantum.

    first_datum_index: where they start in the request, for messages.
    """

    def __init__(self, loss: CustomLoss, datums: Sequence[Datum], *, first_datum_index: int) -> None:
        self._loss = loss
        self._steps = [_step(node) for node in loss.nodes if node.op is not NodeOp.OUTPUT]
        self._datums = datums
        self._first_datum_index = first_datum_index

    def terms(self, logprobs_TK: Tensor, *, wants_grad: bool) -> LossTerms:
        """The loss, its derivative and the metrics, on the device of the log-probabilities [T, K], which may be padded.

        A datum's loss stands in its first row and column. A ":mean" metric is the sum over datums here, which whoever
        knows how many there are divides. Raises InvalidRequest for a graph that does not fit a datum or costs too much,
        NonFiniteResult for a loss, a derivative or a metric that is not finite.
        """
        host_TK = logprobs_TK.detach().cpu()
        losses_TK, grads_TK = torch.zeros_like(host_TK), torch.zeros_like(host_TK)
        metrics: dict[str, float] = {}
        clock = _Clock()
        row = 0
        for index, datum in enumerate(self._datums):
            rows = slice(row, row + datum.num_tokens)
            row = rows.stop
            target = datum.inputs["target_tokens"]
            columns = target.shape[1] if target.ndim == 2 else 1
            try:
                terms = self._of_datum(
                    host_TK[rows, :columns].reshape(target.shape), datum, clock, wants_grad=wants_grad
                )
            except UserError as error:
                place = self._first_datum_index + index
                raise type(error)(f"datum {place}: custom loss {self._loss.name[:80]!r}: {error.message}") from None
            losses_TK[rows.start, 0] = terms.loss
            if terms.grad is not None:
                grads_TK[rows, :columns] = terms.grad.reshape(-1, columns)
            for name, value in terms.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
        assert row == len(logprobs_TK), "the datums cover the quantum"
        device = logprobs_TK.device
        return LossTerms(
            loss=losses_TK.to(device),
            grad=grads_TK.to(device),
            metrics={name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in metrics.items()},
        )

    def _of_datum(self, logprobs: Tensor, datum: Datum, clock: _Clock, *, wants_grad: bool) -> _DatumTerms:
        # Copies, because a datum that must run again starts from what was sent, and alignment is the same for each.
        logprobs = logprobs.clone()
        values: list[Tensor] = [logprobs]
        values += [torch.from_numpy(np.array(datum.inputs[given.name])) for given in self._loss.datum_inputs]
        meter = _Meter(clock, num_tokens=datum.num_tokens)
        with torch.set_grad_enabled(wants_grad):
            logprobs.requires_grad_(wants_grad)
            known = _evaluate(self._steps, values, meter)
            loss_ref, metric_refs = self._loss.output
            loss = known[loss_ref.name]
            if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
                raise InvalidRequest(f"must return a scalar loss of floats, got {_shown(loss)}")
            grad = _gradient(loss, logprobs) if wants_grad else None
        metrics = {name: _metric(name, known[ref.name]) for name, ref in metric_refs.items()}
        return _DatumTerms(_finite(loss.item(), "the loss"), grad, metrics)


class _Clock:
    """Processor seconds of this thread, so that a busy or sleeping machine fails nobody. One for a quantum."""

    def __init__(self) -> None:
        self._start = time.thread_time()

    def check(self, target: str) -> None:
        if time.thread_time() - self._start > MAX_CUSTOM_LOSS_S:
            raise InvalidRequest(
                f"{target} was reached after {MAX_CUSTOM_LOSS_S:g} s, the most for a part of a request"
            )


class _Meter:
    """What one datum has cost. The bounds are counted, not timed, so that a replay ends as the first run did."""

    def __init__(self, clock: _Clock, *, num_tokens: int) -> None:
        self._clock = clock
        self._max_work = CUSTOM_LOSS_WORK_PER_DATUM + CUSTOM_LOSS_WORK_PER_TOKEN * num_tokens
        self._work = 0
        self._numbers = 0

    def spend(self, target: str, cost: Cost) -> None:
        """Count an operation before it runs. Raises InvalidRequest when it would be over a bound."""
        self._clock.check(target)
        if cost.numbers > MAX_CUSTOM_LOSS_NUMBERS:
            raise InvalidRequest(
                f"{target} could give a tensor of {_count(cost.numbers)} numbers; allowed are {MAX_CUSTOM_LOSS_NUMBERS}"
            )
        self._numbers += cost.numbers
        self._work += cost.work + CUSTOM_LOSS_WORK_PER_NODE
        if self._numbers > MAX_CUSTOM_LOSS_NUMBERS_PER_DATUM:
            raise InvalidRequest(f"{target} takes the datum over {MAX_CUSTOM_LOSS_NUMBERS_PER_DATUM} numbers in all")
        if self._work > self._max_work:
            raise InvalidRequest(
                f"{target} takes the datum over the work that its length allows, {self._max_work} units"
            )


@dataclass(frozen=True, slots=True)
class _Step:
    """A node with the code behind its name; operation None takes the next input."""

    node: Node
    operation: Operation | None


def _step(node: Node) -> _Step:
    if node.op is NodeOp.PLACEHOLDER:
        return _Step(node, None)
    if node.op is NodeOp.CALL_METHOD:
        return _Step(node, METHOD_TABLE[node.target])
    return _Step(node, FUNCTION_TABLE[canonical_function(node.target)])


def _evaluate(steps: Sequence[_Step], inputs: Sequence[Tensor], meter: _Meter) -> Mapping[str, Any]:
    """The value of every node. Raises InvalidRequest, naming the operation."""
    known: dict[str, Any] = {}
    waiting = iter(inputs)
    for step in steps:
        name = step.node.name
        known[name] = next(waiting) if step.operation is None else _called(step.node, step.operation, known, meter)
    return known


def _called(node: Node, operation: Operation, known: Mapping[str, Any], meter: _Meter) -> Any:
    target = f"{node.target[:80]} (node {node.name!r})"
    args = [_value(argument, known) for argument in node.args]
    kwargs = {key: _value(argument, known) for key, argument in node.kwargs.items()}
    if node.op is NodeOp.CALL_METHOD and not isinstance(args[0], Tensor):
        raise InvalidRequest(f"{target} is a method of tensors, called on {_shown(args[0])}")
    if "device" in kwargs and kwargs["device"] not in (None, _CPU):
        raise InvalidRequest(f"{target} takes a device that is not a tensor's own")
    try:
        meter.spend(target, operation.cost(args, kwargs))
        result = operation.run(*args, **kwargs)
    except _CALL_ERRORS as error:
        # The first line: torch appends traces of its own.
        raise InvalidRequest(f"{target}: {str(error).partition(chr(10))[0][:300]}") from None
    _check_value(target, result)
    return result


def _value(argument: Argument, known: Mapping[str, Any]) -> Any:
    match argument:
        case Ref(name):
            return known[name]
        case DType(name):
            return _DTYPES[name]
        case list():
            return [_value(part, known) for part in argument]
        case tuple():
            return tuple(_value(part, known) for part in argument)
        case slice():
            return slice(*(_value(part, known) for part in (argument.start, argument.stop, argument.step)))
    return argument


def _check_value(target: str, value: object) -> None:
    """Raise InvalidRequest for anything but dense tensors, numbers of a machine, and short sequences of them."""
    if isinstance(value, Tensor):
        if value.ndim > MAX_DIMS or value.dtype not in _DTYPES.values() or value.device != _CPU:
            raise InvalidRequest(
                f"{target} gives {_shown(value)}; tensors have up to {MAX_DIMS} dimensions and real numbers"
            )
    elif isinstance(value, tuple | list):
        if len(value) > MAX_SEQUENCE:
            raise InvalidRequest(f"{target} gives {len(value)} parts; allowed are {MAX_SEQUENCE}")
        for part in value:
            _check_value(target, part)
    elif isinstance(value, int):
        if int(value).bit_length() > MAX_INT_BITS:
            raise InvalidRequest(f"{target} gives an integer of over {MAX_INT_BITS} bits")
    elif not isinstance(value, float | torch.dtype | torch.device):
        raise InvalidRequest(f"{target} gives a {type(value).__name__}, which a custom loss cannot use")


def _gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise InvalidRequest("the loss does not depend on logprobs, so there is nothing to train")
    try:
        (grad,) = torch.autograd.grad(loss, logprobs, allow_unused=True)
    except RuntimeError as error:
        raise InvalidRequest(f"the backward pass fails: {str(error).partition(chr(10))[0][:300]}") from None
    if grad is None:
        raise InvalidRequest("the loss does not depend on logprobs, so there is nothing to train")
    assert grad.shape == logprobs.shape
    if not bool(torch.isfinite(grad).all()):
        raise NonFiniteResult("the gradient is not finite; nothing of this request was applied")
    return grad


def _metric(name: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise InvalidRequest(f"metric {name} must be a scalar, got {_shown(value)}")
    return _finite(float(value), f"metric {name}")


_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def _finite(value: float, what: str) -> float:
    """`value`, which float32 can hold."""
    if not (math.isfinite(value) and abs(value) <= _MAX_FLOAT32):
        raise NonFiniteResult(f"{what} is {value}, not a finite float32; nothing of this request was applied")
    return value


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def _count(number: int) -> str:
    return str(number) if number.bit_length() <= MAX_INT_BITS else f"over 2**{MAX_INT_BITS}"
