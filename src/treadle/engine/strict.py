"""Strict mode: the settings under which a tenant's bits do not depend on its company, and the probe that checks it.

On a CPU it always holds, and nothing must be set. On a GPU the library chooses a matrix product's kernel by its
number of rows, so the packed length is padded to one of a few buckets, and `probe` finds out for which of them a
quantum's log-probabilities and gradients are the same bits wherever and beside whomever it lies, and what that costs.
State: the CUDA side has not been run on a GPU yet.
Invariant: the probe leaves no trace in the base model, in torch's settings or in any generator.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.domain.limits import QUANTUM_TOKENS
from treadle.domain.losses import resolve_loss
from treadle.domain.ops import Datum, LoraSpec
from treadle.engine.base_model import BaseModel
from treadle.engine.passes import QuantumInput, run_micro_batch
from treadle.engine.state import TrainingState, new_training_state
from treadle.errors import ConfigError

# Packed lengths that a GPU pass is padded to; powers of two, so that padding is at most half of a pass.
TOKEN_BUCKETS = (1_024, 2_048, 4_096, 8_192, 16_384)
_WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# The two values under which cuBLAS is reproducible; source: cuBLAS documentation, "Results reproducibility". The
# first (eight buffers of 4 MiB) is the fast one.
_WORKSPACES = (":4096:8", ":16:8")
# The quantum that is compared: two datums whose lengths have no factor in common with any tile.
_SUBJECT_LENGTHS = (37, 90)
_SUBJECT_RANK = 8
_NEIGHBOUR_RANKS = (16, 1, 32, 5)
_REPETITIONS = 3
# A module with a property, which type checkers do not see.
_FILLING: Any = torch.utils.deterministic


@dataclass(frozen=True, slots=True)
class BucketReport:
    """What the probe saw in packs of `bucket` rows.

    holds: the subject's bits were the same in every arrangement. largest_difference: of any logprob or gradient
    entry between arrangements, absolute; 0.0 when it holds. agreement: buckets with equal numbers gave equal bits.
    plain_s, strict_s: seconds of one forward and backward of a full pack, without and with strict settings (median).
    half_s: the same, without, for half as many tokens: what padding can cost at worst is strict_s - half_s.
    """

    bucket: int
    num_arrangements: int
    holds: bool
    largest_difference: float
    agreement: int
    plain_s: float
    strict_s: float
    half_s: float

    @property
    def price(self) -> float:
        """Share of time that the settings add; padding not counted."""
        return self.strict_s / self.plain_s - 1.0


@dataclass(frozen=True, slots=True)
class StrictReport:
    """Whether strict mode can be promised on this device with this model and kernel, and its price."""

    device: str
    dtype: str
    kernel: str
    buckets: tuple[BucketReport, ...]

    @property
    def usable_buckets(self) -> tuple[int, ...]:
        """The largest set of buckets within and between which the bits agree; of equally large ones the first."""
        held = [report for report in self.buckets if report.holds]
        sizes = [sum(other.agreement == report.agreement for other in held) for report in held]
        if not held:
            return ()
        largest = held[sizes.index(max(sizes))].agreement
        return tuple(report.bucket for report in held if report.agreement == largest)

    @property
    def holds(self) -> bool:
        """Whether every bucket may be used: a pass may take whichever it fits in."""
        return len(self.usable_buckets) == len(self.buckets)


def enable_strict(device: torch.device) -> None:
    """Set what strict mode needs, for the whole process. On a CPU nothing; on CUDA, before the first product.

    Deterministic algorithms (flash attention's backward among them), no reduced-precision sums in bfloat16 products,
    and a fixed cuBLAS workspace, which cuBLAS reads once: ConfigError when CUDA is already in use without it.
    Passes must also be padded to a usable bucket; see `probe`. Idempotent.
    """
    if device.type == "cpu":
        return
    set_to = os.environ.get(_WORKSPACE_VARIABLE)
    if set_to not in _WORKSPACES:
        in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch, untyped
        if set_to is not None or in_use:
            raise ConfigError(
                f"strict mode needs {_WORKSPACE_VARIABLE} set to one of {', '.join(_WORKSPACES)} before the process "
                f"uses CUDA; it is {'not set' if set_to is None else repr(set_to)}"
            )
        os.environ[_WORKSPACE_VARIABLE] = _WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory would cost a write of every buffer; nothing here reads what it has not written.
    _FILLING.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextmanager
def strict_settings(device: torch.device) -> Iterator[None]:
    """enable_strict for a while; afterwards torch's settings are as before (the environment variable stays)."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = _FILLING.fill_uninitialized_memory
    was_reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        enable_strict(device)
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        _FILLING.fill_uninitialized_memory = was_filling
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = was_reduced


def probe(base: BaseModel, *, buckets: Sequence[int] = TOKEN_BUCKETS, seed: int = 0) -> StrictReport:
    """Compare a quantum's logprobs and gradients, bit for bit, over buckets and arrangements, with `base.kernel`.

    buckets: packed lengths, ascending, each at least twice the subject's 127 tokens. Per bucket six arrangements
    (first, last, twice in between, beside different neighbours, alone, in a pack filled to a third) and a few timed
    passes. Costs about 17 passes a bucket and the memory of the largest one. Raises ConfigError as enable_strict does.
    """
    assert list(buckets) == sorted(set(buckets))
    assert buckets[0] >= 2 * sum(_SUBJECT_LENGTHS)
    workload = _Workload(base, seed)
    seen: list[_Bits] = []
    reports = []
    for bucket in buckets:
        with strict_settings(base.device), _padded_to(base, bucket):
            found = [workload.subject_bits(bucket, arrangement) for arrangement in _ARRANGEMENTS]
            strict_s = workload.seconds(bucket)
        differences = [found[0].difference(other) for other in found[1:]]
        agreement = next((index for index, bits in enumerate(seen) if bits.equals(found[0])), len(seen))
        if agreement == len(seen):
            seen.append(found[0])
        reports.append(
            BucketReport(
                bucket=bucket,
                num_arrangements=len(found),
                holds=all(found[0].equals(other) for other in found[1:]),
                largest_difference=max(differences),
                agreement=agreement,
                plain_s=workload.seconds(bucket),
                strict_s=strict_s,
                half_s=workload.seconds(bucket // 2),
            )
        )
    return StrictReport(str(base.device), str(base.dtype).removeprefix("torch."), base.kernel.name, tuple(reports))


@dataclass(frozen=True, slots=True)
class _Bits:
    """The subject's results: all logprobs in one float32 tensor, and its gradient arena."""

    logprobs: Tensor
    gradient: Tensor

    def equals(self, other: _Bits) -> bool:
        return torch.equal(self.logprobs, other.logprobs) and torch.equal(self.gradient, other.gradient)

    def difference(self, other: _Bits) -> float:
        apart = [(self.logprobs - other.logprobs).abs().max(), (self.gradient - other.gradient).abs().max()]
        return max(float(value) for value in apart)


@contextmanager
def _padded_to(base: BaseModel, bucket: int) -> Iterator[None]:
    """Every pass is padded to the bucket, and the head's groups are of one size; afterwards as before."""
    before = base.pack_buckets
    base.use_buckets((bucket,))
    try:
        yield
    finally:
        base.use_buckets(before)


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """Where the subject lies: the share of the bucket that neighbours fill, the share of them before it, their seed."""

    filled: float
    before: float
    seed: int


_ARRANGEMENTS = (
    _Arrangement(filled=1.0, before=0.0, seed=1),
    _Arrangement(filled=1.0, before=1.0, seed=1),
    _Arrangement(filled=1.0, before=0.5, seed=1),
    _Arrangement(filled=1.0, before=0.3, seed=2),
    # Alone and in little company: the rest is padding.
    _Arrangement(filled=0.0, before=0.0, seed=1),
    _Arrangement(filled=0.3, before=0.7, seed=2),
)


class _Workload:
    """Synthetic quanta: the subject, always the same, and neighbours of other ranks that fill a pack up."""

    def __init__(self, base: BaseModel, seed: int) -> None:
        self._base = base
        self._loss = resolve_loss("cross_entropy", {})
        self._subject = _state(base, _SUBJECT_RANK, seed)
        self._neighbours = [_state(base, rank, seed + 1 + rank) for rank in _NEIGHBOUR_RANKS]
        self._datums = _datums(np.random.default_rng(seed), _SUBJECT_LENGTHS, base.vocab_size)

    def subject_bits(self, bucket: int, arrangement: _Arrangement) -> _Bits:
        """What the subject gets out of one pack of at most `bucket` tokens."""
        num_others = int((bucket - sum(_SUBJECT_LENGTHS)) * arrangement.filled)
        num_before = int(num_others * arrangement.before)
        rng = np.random.default_rng(arrangement.seed)
        before = self._filler(rng, num_before)
        subject = QuantumInput(self._subject, self._datums, self._loss, self._subject.new_scratch())
        results = run_micro_batch(self._base, [*before, subject, *self._filler(rng, num_others - num_before)])
        result = results[len(before)]
        assert result.failure is None, "the probe's numbers are tame"
        assert subject.scratch is not None
        return _Bits(torch.from_numpy(np.concatenate(result.logprobs)), subject.scratch.flat)

    def seconds(self, num_tokens: int) -> float:
        """Median wall time of a training pass over that many tokens, after one that does not count."""
        times = []
        for _ in range(_REPETITIONS + 1):
            quanta = self._filler(np.random.default_rng(3), num_tokens)
            self._wait()
            start = time.perf_counter()
            run_micro_batch(self._base, quanta)
            self._wait()
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:]))

    def _filler(self, rng: np.random.Generator, num_tokens: int) -> list[QuantumInput]:
        """Training quanta of other runs, of uneven sizes, that many tokens together."""
        quanta: list[QuantumInput] = []
        while num_tokens > 0:
            longest = min(QUANTUM_TOKENS, self._base.max_context_length)
            length = min(num_tokens, int(rng.integers(max(1, longest // 4), longest + 1)))
            state = self._neighbours[len(quanta) % len(self._neighbours)]
            datums = _datums(rng, (length,), self._base.vocab_size)
            quanta.append(QuantumInput(state, datums, self._loss, state.new_scratch()))
            num_tokens -= length
        return quanta

    def _wait(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.synchronize(self._base.device)


def _state(base: BaseModel, rank: int, seed: int) -> TrainingState:
    """A run whose B is not zero, so that every gradient is alive."""
    state = new_training_state(base, LoraSpec(rank=rank, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for module in state.weights.modules:
        b = state.weights.b(module)
        b.copy_(torch.empty(b.shape).normal_(0.0, 0.02, generator=generator))
    return state


def _datums(rng: np.random.Generator, lengths: Sequence[int], vocab_size: int) -> tuple[Datum, ...]:
    return tuple(
        Datum(
            tokens=rng.integers(0, vocab_size, length).astype(np.int32),
            inputs={
                "target_tokens": rng.integers(0, vocab_size, length),
                "weights": rng.normal(size=length).astype(np.float32),
            },
        )
        for length in lengths
    )
