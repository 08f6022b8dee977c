"""One micro-batch: quanta of any number of runs, packed into one forward and one backward of the base model.

Gradients go into each op's scratch arena, and from there into the run's open gradient when the whole op is done
(`state.commit_scratch`); an op that fails drops its scratch and has left no trace. This module knows no requests,
plans or tenants: a quantum is datums, a loss, a state and a scratch.
Invariant: a quantum's numbers depend on its content and its run's weights alone, not on what shares the pass.

Legend: T rows of the packed batch, D hidden, K target columns per row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.domain.losses import PER_TOKEN_CLIPS, SEQUENCE_RATIO_MASK, Loss, spec_of
from treadle.domain.ops import Datum
from treadle.engine.adapter import AdapterArena, AdapterWeights
from treadle.engine.attention import packed_attention
from treadle.engine.base_model import BaseModel
from treadle.engine.buckets import packed_length
from treadle.engine.context import Recompute
from treadle.engine.custom_loss import QuantumLoss
from treadle.engine.head import HeadResult, HeadTask, run_head
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.losses import rows_with_gradient, sequence_lengths
from treadle.engine.state import TrainingState
from treadle.errors import NonFiniteResult, UserError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class QuantumInput:
    """One quantum of a pass.

    scratch: the op's gradient arena (`state.new_scratch()`), the same for all quanta of the op and none other; None
    for a forward_only op. first_datum_index: where `datums` start in the request, for messages. uses_adapter: False
    for the bare base model, in a forward_only op.
    """

    state: TrainingState
    datums: Sequence[Datum]
    loss: Loss
    scratch: AdapterArena | None
    first_datum_index: int = 0
    uses_adapter: bool = True

    @property
    def weights(self) -> AdapterWeights:
        """What the pass adds to the base model."""
        return self.state.weights if self.uses_adapter else self.state.weights.without_modules()


@dataclass(frozen=True, slots=True)
class QuantumResult:
    """logprobs: float32 per datum, shaped like its target_tokens. failure set: nothing of the quantum counts.

    metrics: sums over the quantum, also those named ":mean", which `sum_metrics` divides by the op's datums.
    """

    logprobs: tuple[FloatArray, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: UserError | None = None


def run_micro_batch(
    base: BaseModel, quanta: Sequence[QuantumInput], *, recompute: Recompute = Recompute.NONE
) -> list[QuantumResult]:
    """One result per quantum, from ONE forward of the base model (and one backward if any quantum trains).

    Quanta of one op must come in order, here and over micro-batches. Shapes, tokens and inputs were checked at
    admission. A quantum whose result is not finite fails alone; its op must then drop the scratch. recompute changes
    memory and time, no number.
    """
    assert quanta, "a micro-batch has at least one quantum"
    wants_grad = any(quantum.scratch is not None for quantum in quanta)
    pack = _Pack(base, quanta)
    # Before the forward, so that an id that slipped through breaks the pass before the device has worked for it.
    tasks = [_head_task(base, quantum, segment) for quantum, segment in zip(quanta, pack.segments, strict=True)]
    with torch.set_grad_enabled(wants_grad):
        hidden_TD = base.forward_hidden(
            pack.tokens_T, pack.positions_T, attention=pack.attention, segments=pack.segments, recompute=recompute
        )
    d_hidden_TD = torch.zeros_like(hidden_TD, requires_grad=False) if wants_grad else None
    heads = run_head(base, hidden_TD.detach(), tasks, d_hidden_TD, has_equal_groups=bool(base.pack_buckets))
    outputs = _to_host(heads, pack.segments, d_hidden_TD)
    results = [_result_of(quantum, output) for quantum, output in zip(quanta, outputs, strict=True)]
    if d_hidden_TD is not None:
        _isolate_failures(pack.segments, results, d_hidden_TD)
        # With adapters on the head alone nothing below it was recorded.
        if hidden_TD.requires_grad and any(segment.grads is not None for segment in pack.segments):
            hidden_TD.backward(d_hidden_TD)  # type: ignore[no-untyped-call]  # torch types backward as untyped
    return results


def sum_metrics(results: Sequence[QuantumResult]) -> dict[str, float]:
    """An op's metrics from those of its quanta, in order: sums, and means over its datums."""
    totals: dict[str, float] = {}
    for result in results:
        for name, value in result.metrics.items():
            assert name.endswith((":sum", ":mean")), name
            totals[name] = totals.get(name, 0.0) + value
    num_datums = sum(len(result.logprobs) for result in results)
    return {name: total / num_datums if name.endswith(":mean") else total for name, total in totals.items()}


class _Pack:
    """The packed batch: quanta one after another, padded at the end with rows that belong to nobody."""

    def __init__(self, base: BaseModel, quanta: Sequence[QuantumInput]) -> None:
        datums = [datum for quantum in quanta for datum in quantum.datums]
        lengths = [datum.num_tokens for datum in datums]
        num_rows = packed_length(sum(lengths), base.pack_buckets)
        tokens = np.zeros(num_rows, dtype=np.int64)
        positions = np.zeros(num_rows, dtype=np.int64)
        row = 0
        for datum, length in zip(datums, lengths, strict=True):
            assert 0 < length <= base.max_context_length
            tokens[row : row + length] = datum.tokens
            positions[row : row + length] = np.arange(length)
            row += length
        assert 0 <= tokens.min() <= tokens.max() < base.vocab_size, "tokens are checked at admission"
        self.tokens_T = torch.from_numpy(tokens).to(base.device, non_blocking=True)
        self.positions_T = torch.from_numpy(positions).to(base.device, non_blocking=True)
        self.attention = packed_attention(
            lengths,
            num_rows,
            device=base.device,
            dtype=base.dtype,
            num_heads=base.num_heads,
            head_dim=base.head_dim,
        )
        self.segments: list[LoraSegment] = []
        start = 0
        for quantum in quanta:
            assert not quantum.state.is_released
            stop = start + sum(datum.num_tokens for datum in quantum.datums)
            self.segments.append(LoraSegment(quantum.weights, start, stop, quantum.scratch))
            start = stop
        assert start == row


def _head_task(base: BaseModel, quantum: QuantumInput, segment: LoraSegment) -> HeadTask:
    targets, inputs = _aligned_inputs(quantum, base.vocab_size)
    datum_lengths = [datum.num_tokens for datum in quantum.datums]
    custom = None
    if quantum.loss.custom is not None:
        custom = QuantumLoss(quantum.loss.custom, quantum.datums, first_datum_index=quantum.first_datum_index)
    return HeadTask(
        start=segment.start,
        stop=segment.stop,
        targets=torch.from_numpy(targets).to(base.device, non_blocking=True),
        inputs={name: torch.from_numpy(array).to(base.device, non_blocking=True) for name, array in inputs.items()},
        has_gradient=np.ones(len(targets), dtype=np.bool_) if custom else rows_with_gradient(quantum.loss, inputs),
        sequence_lengths=sequence_lengths(quantum.loss, inputs, datum_lengths),
        loss=quantum.loss,
        adapter=segment.adapter,
        grads=segment.grads,
        custom=custom,
    )


def _aligned_inputs(quantum: QuantumInput, vocab_size: int) -> tuple[NDArray[np.int64], dict[str, FloatArray]]:
    """The quantum's targets [T, K] and float inputs [T, K], with defaults for what datums did not send.

    Datums may differ in K: short rows are filled up with target 0 at weight 0, which adds exactly nothing.
    """
    targets = [_columns(datum.inputs["target_tokens"]) for datum in quantum.datums]
    num_columns = max(target.shape[1] for target in targets)
    num_rows = sum(target.shape[0] for target in targets)
    spec = spec_of(quantum.loss.name)
    names = [name for name in spec.engine_inputs if name != "target_tokens"]
    aligned_targets = np.zeros((num_rows, num_columns), dtype=np.int64)
    aligned = {name: np.zeros((num_rows, num_columns), dtype=np.float32) for name in names}
    row = 0
    for datum, target in zip(quantum.datums, targets, strict=True):
        length, width = target.shape
        assert length == datum.num_tokens, "targets are aligned with the tokens"
        block = (slice(row, row + length), slice(0, width))
        aligned_targets[block] = target
        for name in names:
            given = datum.inputs.get(name)
            aligned[name][block] = _columns(_default_input(quantum.loss, datum, name) if given is None else given)
        row += length
    assert 0 <= aligned_targets.min() <= aligned_targets.max() < vocab_size, "targets are checked at admission"
    return aligned_targets, aligned


def _default_input(loss: Loss, datum: Datum, name: str) -> NDArray[np.generic]:
    """What an optional input that the datum does not have stands for."""
    if name in PER_TOKEN_CLIPS:
        return np.full(datum.num_tokens, loss.config[name], dtype=np.float32)
    if name == SEQUENCE_RATIO_MASK:
        mask: FloatArray = (datum.inputs["advantages"] != 0).astype(np.float32)
        return mask
    assert name == "weights", f"{name} is required and was checked at admission"
    return np.ones(datum.inputs["target_tokens"].shape, dtype=np.float32)


def _columns(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """[T] as [T, 1]; [T, K] as it is."""
    return array[:, None] if array.ndim == 1 else array


@dataclass(frozen=True, slots=True)
class _HostOutput:
    """A quantum's numbers on the host: logprobs and losses [rows, K], and which rows have a finite gradient."""

    logprobs: FloatArray
    losses: FloatArray
    metrics: Mapping[str, float]
    has_finite_gradient: NDArray[np.bool_]
    failure: UserError | None = None


def _to_host(
    outputs: Sequence[HeadResult], segments: Sequence[LoraSegment], d_hidden_TD: Tensor | None
) -> list[_HostOutput]:
    """All quanta's numbers in one copy, the only wait for the device between forward and backward."""
    parts = [part for output in outputs for part in (output.logprobs, output.losses, *output.metrics.values())]
    if d_hidden_TD is not None:
        lowest_T, highest_T = torch.aminmax(d_hidden_TD, dim=1)
        parts.append(torch.isfinite(lowest_T) & torch.isfinite(highest_T))
    flat = torch.cat([part.reshape(-1).float() for part in parts]).cpu().numpy()
    cursor = 0

    def take(shape: Sequence[int]) -> FloatArray:
        nonlocal cursor
        size = math.prod(shape)
        cursor += size
        return flat[cursor - size : cursor].reshape(shape)

    taken = [
        (take(output.logprobs.shape), take(output.losses.shape), {name: take((1,)).item() for name in output.metrics})
        for output in outputs
    ]
    is_finite_T = np.ones(segments[-1].stop, dtype=np.bool_) if d_hidden_TD is None else take(lowest_T.shape) == 1
    return [
        _HostOutput(
            logprobs, losses, metrics, is_finite_T[segment.start : segment.stop], next(iter(output.failures), None)
        )
        for (logprobs, losses, metrics), segment, output in zip(taken, segments, outputs, strict=True)
    ]


def _result_of(quantum: QuantumInput, output: _HostOutput) -> QuantumResult:
    """The quantum's result, or the failure that names its first datum that is not finite."""
    bounds = np.cumsum([datum.num_tokens for datum in quantum.datums])
    failure = output.failure or _failure_of(quantum, output, bounds)
    if failure is not None:
        return QuantumResult(failure=failure)
    per_datum = []
    for datum, stop in zip(quantum.datums, bounds, strict=True):
        target = datum.inputs["target_tokens"]
        rows = output.logprobs[stop - datum.num_tokens : stop]
        # Copies: a view would keep the whole micro-batch alive for as long as one datum's result.
        per_datum.append(rows[:, 0].copy() if target.ndim == 1 else rows[:, : target.shape[1]].copy())
    metrics = {"loss:sum": float(output.losses.sum(dtype=np.float64)), **output.metrics}
    return QuantumResult(logprobs=tuple(per_datum), metrics=metrics)


def _failure_of(quantum: QuantumInput, output: _HostOutput, bounds: NDArray[np.int64]) -> NonFiniteResult | None:
    """What is not finite in the first row that is not, with the inputs that led to it; None when all is finite."""
    is_finite_logprob_T, is_finite_loss_T = _finite_rows(output.logprobs), _finite_rows(output.losses)
    is_finite_T = is_finite_logprob_T & is_finite_loss_T & output.has_finite_gradient
    if is_finite_T.all():
        return None
    row = int(np.argmin(is_finite_T))
    place = int(np.searchsorted(bounds, row, side="right"))
    datum = quantum.datums[place]
    position = row - (int(bounds[place]) - datum.num_tokens)
    if not is_finite_logprob_T[row]:
        what = "the log-probability of target_tokens"
    elif not is_finite_loss_T[row]:
        what = "the loss"
    else:
        what = "the gradient"
    spec = spec_of(quantum.loss.name)
    given = ", ".join(
        f"{name}[{position}] = {datum.inputs[name][position].tolist()!s:.80}"
        for name in spec.engine_inputs
        if name in datum.inputs
    )
    return NonFiniteResult(
        f"datum {quantum.first_datum_index + place}: {what} at position {position} is not finite "
        f"(loss_fn {spec.name}; {given}); nothing of this request was applied"
    )


def _finite_rows(values_TK: FloatArray) -> NDArray[np.bool_]:
    rows: NDArray[np.bool_] = np.isfinite(values_TK).min(axis=1)
    return rows


def _isolate_failures(segments: Sequence[LoraSegment], results: Sequence[QuantumResult], d_hidden_TD: Tensor) -> None:
    """Keep failed quanta out of the backward: zero gradient into their rows, none formed for their adapters.

    Rows meet only inside attention, within one sequence, so NaN left in a failed quantum's activations stays there.
    """
    for segment, result in zip(segments, results, strict=True):
        if result.failure is not None:
            d_hidden_TD[segment.start : segment.stop] = 0
            segment.grads = None
