"""The chunked head: against autograd on full logits, bounded memory, and the shapes that come back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_builders import VOCAB_SIZE, make_datum, make_datums, make_state, quantum_of
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.domain.losses import LOSSES, resolve_loss
from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import (
    HEAD_MODULE,
    AdapterArena,
    AdapterWeights,
    ProjectionGroup,
    ProjectionShape,
    adapter_layout,
)
from treadle.engine.base_model import BaseModel
from treadle.engine.head import HeadResult, HeadTask, head_profile, piece_rows, run_head
from treadle.engine.losses import SEQUENCE_LOSSES, TOKEN_LOSSES, rows_with_gradient, sequence_lengths
from treadle.engine.passes import run_micro_batch, sum_metrics

HIDDEN = 24
SCALE = 2.0


class LargestTensor(TorchDispatchMode):
    """Remembers the most rows of any [rows, vocabulary] tensor that an operation made, and the head's GEMMs' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows = 0
        self.gemm_rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == VOCAB_SIZE:
                self.num_rows = max(self.num_rows, tensor.shape[0])
        if func.overloadpacket is torch.ops.aten.mm and (HIDDEN, VOCAB_SIZE) in (
            tuple(args[1].shape),
            tuple(args[1].shape)[::-1],
        ):
            self.gemm_rows.append(args[0].shape[0])
        return out


@dataclass(frozen=True)
class BareHead:
    """All that the head wants of a base model."""

    head_weight_VD: torch.Tensor


def bare_head(seed: int = 0) -> BareHead:
    generator = torch.Generator().manual_seed(seed)
    return BareHead(torch.randn(VOCAB_SIZE, HIDDEN, generator=generator) * 0.3)


def make_task(
    loss: str, lengths: Sequence[int], *, seed: int, columns: int = 1, rank: int = 4, idle: float = 0.4
) -> HeadTask:
    """A quantum for the head alone, with an adapter on it whose B is not zero; it starts at row 0."""
    rng = np.random.default_rng(seed)
    resolved = resolve_loss(loss, {})
    num_rows = sum(lengths)
    shape = (num_rows, columns)
    signal = (rng.normal(size=shape) * (rng.random(shape) >= idle)).astype(np.float32)
    inputs = {
        "weights": signal,
        "advantages": signal,
        "logprobs": rng.normal(-5, 0.5, shape).astype(np.float32),
        "clip_low_threshold": np.full(shape, 0.7, dtype=np.float32),
        "clip_high_threshold": np.full(shape, 1.5, dtype=np.float32),
        "sequence_ratio_mask": (rng.random(shape) >= 0.5).astype(np.float32),
        "sampling_logprobs": rng.normal(-5, 0.5, shape).astype(np.float32),
        "sampled_runs": np.broadcast_to((np.arange(num_rows) // 9 % 3)[:, None], shape).astype(np.float32),
    }
    shapes = ProjectionShape(HEAD_MODULE, HIDDEN, VOCAB_SIZE)
    layout = adapter_layout([ProjectionGroup(HEAD_MODULE, (shapes,))], LoraSpec(rank=rank, seed=0))
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(layout.num_elements, generator=generator) * 0.1
    return HeadTask(
        start=0,
        stop=num_rows,
        targets=torch.from_numpy(rng.integers(0, VOCAB_SIZE, shape)),
        inputs={name: torch.from_numpy(value) for name, value in inputs.items()},
        has_gradient=rows_with_gradient(resolved, inputs),
        sequence_lengths=sequence_lengths(resolved, inputs, lengths),
        loss=resolved,
        adapter=AdapterWeights(layout, flat, SCALE),
        grads=AdapterArena(layout, torch.zeros_like(flat)),
    )


def mixed_tasks(*, idle: float = 0.4) -> list[HeadTask]:
    """Every loss; the sequence losses stand between others and are longer than a piece."""
    tasks = []
    for index, loss in enumerate([*sorted(LOSSES), "cross_entropy", "gspo"]):
        lengths = (300, 7) if loss in ("gspo", "dro") else (5, 1 + 13 * index)
        columns = 3 if loss == "cross_entropy" and index > len(LOSSES) - 1 else 1
        tasks.append(make_task(loss, lengths, seed=index, columns=columns, rank=1 + index, idle=idle))
    return tasks


def hidden_of(task: HeadTask, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1_000 + seed)
    return torch.randn(task.stop - task.start, HIDDEN, generator=generator)


def run_tasks(
    base: BareHead, tasks: Sequence[HeadTask], seeds: Sequence[int], *, group_rows: int | None = None
) -> tuple[list[HeadResult], list[torch.Tensor], list[torch.Tensor]]:
    """Results, d loss / d hidden and adapter gradients per task, of one pack with fresh gradients."""
    placed, start = [], 0
    for task in tasks:
        num_rows = task.stop - task.start
        grads = None if task.grads is None else AdapterArena(task.grads.layout, torch.zeros_like(task.grads.flat))
        placed.append(replace(task, start=start, stop=start + num_rows, grads=grads))
        start += num_rows
    hidden = torch.zeros(-(-start // 16) * 16, HIDDEN)
    hidden[:start] = torch.cat([hidden_of(task, seed) for task, seed in zip(tasks, seeds, strict=True)])
    d_hidden = torch.zeros_like(hidden)
    results = run_head(base, hidden, placed, d_hidden, group_rows=group_rows)
    assert not d_hidden[start:].any()
    return (
        results,
        [d_hidden[task.start : task.stop] for task in placed],
        [torch.zeros(0) if task.grads is None else task.grads.flat for task in placed],
    )


@pytest.mark.parametrize("idle", [0.0, 0.4, 1.0])
def test_every_loss_equals_autograd_on_full_logits(idle: float) -> None:
    base, tasks = bare_head(), mixed_tasks(idle=idle)
    results, d_hidden, d_flat = run_tasks(base, tasks, range(len(tasks)))
    for index, task in enumerate(tasks):
        hidden = hidden_of(task, index).double().requires_grad_()
        flat = task.adapter.flat.double().requires_grad_()
        places = {place.which: place for place in task.adapter.layout.places}
        a, b = (flat[p.offset : p.offset + p.num_elements].view(p.shape) for p in (places["A"], places["B"]))
        full = hidden @ base.head_weight_VD.double().t() + SCALE * (hidden @ a.t()) @ b
        logprobs = full.log_softmax(dim=1).gather(1, task.targets)
        torch.testing.assert_close(results[index].logprobs.double(), logprobs.detach(), rtol=1e-5, atol=1e-5)
        # The losses themselves are tested elsewhere; here their gradient is led through the vocabulary.
        lp = logprobs.detach().float()
        if task.loss.name in SEQUENCE_LOSSES:
            terms = SEQUENCE_LOSSES[task.loss.name](lp, task.inputs, task.loss.config, task.sequence_lengths)
        else:
            terms = TOKEN_LOSSES[task.loss.name](lp, task.inputs, task.loss.config)
        torch.testing.assert_close(results[index].losses, terms.loss, rtol=1e-4, atol=1e-5)
        assert results[index].metrics.keys() == terms.metrics.keys()
        logprobs.backward(terms.grad.double())
        assert hidden.grad is not None
        assert flat.grad is not None
        torch.testing.assert_close(d_hidden[index].double(), hidden.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(d_flat[index].double(), flat.grad, rtol=1e-4, atol=1e-3)
        assert bool(d_flat[index].any()) == (idle < 1 or task.loss.name == "dro")


def test_mixed_losses_have_the_bits_that_each_has_alone() -> None:
    base, tasks = bare_head(), mixed_tasks()
    results, d_hidden, d_flat = run_tasks(base, tasks, range(len(tasks)))
    for index, task in enumerate(tasks):
        (alone,), (d_hidden_alone,), (d_flat_alone,) = run_tasks(base, [task], [index])
        assert torch.equal(alone.logprobs, results[index].logprobs)
        assert torch.equal(alone.losses, results[index].losses)
        assert alone.metrics == results[index].metrics
        assert torch.equal(d_hidden_alone, d_hidden[index])
        assert torch.equal(d_flat_alone, d_flat[index])


def test_the_size_of_a_group_is_no_part_of_the_numbers() -> None:
    base, tasks = bare_head(), mixed_tasks()
    small = run_tasks(base, tasks, range(len(tasks)))
    large = run_tasks(base, tasks, range(len(tasks)), group_rows=4 * piece_rows(VOCAB_SIZE))
    for one, other in zip(small[0], large[0], strict=True):
        assert torch.equal(one.logprobs, other.logprobs)
        assert torch.equal(one.losses, other.losses)
    for one_grad, other_grad in zip([*small[1], *small[2]], [*large[1], *large[2]], strict=True):
        assert torch.equal(one_grad, other_grad)


@pytest.mark.parametrize(("loss", "forward_only", "rows"), [
    # Forward over all rows; backward over those with a gradient, rounded up to 16.
    ("cross_entropy", False, [160, 64]),
    ("cross_entropy", True, [160]),
    # The same, and logits once more for the rows with a gradient.
    ("gspo", False, [160, 64, 64]),
    ("gspo", True, [160]),
])  # fmt: skip
def test_the_head_takes_two_gemms_and_a_loss_over_datums_three(loss: str, forward_only: bool, rows: list[int]) -> None:
    task = make_task(loss, (100, 60), seed=0, idle=0.0)
    for name in ("weights", "advantages"):
        task.inputs[name][:100] = 0
    signal = {name: value.numpy() for name, value in task.inputs.items()}
    task = replace(task, has_gradient=rows_with_gradient(task.loss, signal))
    if forward_only:
        task = replace(task, grads=None)
    with LargestTensor() as watch:
        run_tasks(bare_head(), [task], [0])
    assert watch.gemm_rows == rows


def test_pieces_and_profile_depend_on_the_vocabulary_alone() -> None:
    assert [piece_rows(size) for size in (160, 4_096, 32_000, 128_256, 151_936)] == [256, 256, 256, 128, 128]
    assert head_profile(160) != head_profile(151_936)


_PEAK = r"""
import re, sys
from pathlib import Path
import numpy as np, torch
from types import SimpleNamespace
from treadle.domain.losses import resolve_loss
from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import *
from treadle.engine.head import HeadTask, run_head
torch.set_num_threads(1)
vocabulary, hidden, dtype, loss = 151936, 8, getattr(torch, sys.argv[1]), sys.argv[2]
base = SimpleNamespace(head_weight_VD=torch.randn(vocabulary, hidden).to(dtype))
shape = ProjectionShape("lm_head", hidden, vocabulary)
layout = adapter_layout([ProjectionGroup("lm_head", (shape,))], LoraSpec(rank=2, seed=0))
weights = AdapterWeights(layout, torch.randn(layout.num_elements), 1.0)
grads = AdapterArena(layout, torch.zeros(layout.num_elements))
def run(tokens):
    # Most rows have a gradient, in stretches that overlap when they are moved up.
    has_gradient = np.arange(tokens) % 100 < 80
    signal = torch.from_numpy(has_gradient[:, None].astype(np.float32))
    names = ("weights", "advantages", "logprobs", "sequence_ratio_mask", "clip_low_threshold", "clip_high_threshold")
    inputs = {name: signal for name in names}
    targets = torch.zeros(tokens, 1, dtype=torch.int64)
    task = HeadTask(0, tokens, targets, inputs, has_gradient, (tokens,), resolve_loss(loss, {}), weights, grads)
    x = torch.randn(tokens, hidden).to(dtype)
    run_head(base, x, [task], torch.zeros_like(x))
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
run(16)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
run(640)
print((peak() - before) / (4096 * vocabulary * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize(("dtype", "loss"), [("float32", "gspo"), ("bfloat16", "cross_entropy")])
def test_logits_memory_stays_under_a_twentieth_of_the_full_tensor(dtype: str, loss: str) -> None:
    # In a process of its own, as the resident set's peak counts what no hook in torch would see. Five groups of rows
    # instead of the 32 of 4,096 tokens: groups follow one another in the same memory. bench/head.py measures all.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, dtype, loss], capture_output=True, text=True, check=True, env=environment
    )
    assert 0.01 < float(done.stdout) < 0.05


@pytest.mark.parametrize("forward_only", [False, True])
def test_logits_of_more_than_a_group_never_exist(base: BaseModel, forward_only: bool) -> None:
    rng = np.random.default_rng(0)
    quanta = [
        quantum_of(
            make_state(base, LoraSpec(rank=2, seed=seed)), make_datums(rng, [300, 299]), forward_only=forward_only
        )
        for seed in range(2)
    ]
    with LargestTensor() as watch:
        run_micro_batch(base, quanta)
    assert watch.num_rows == piece_rows(VOCAB_SIZE) == 256


def test_logprobs_have_the_shape_of_the_targets(base: BaseModel) -> None:
    rng = np.random.default_rng(1)
    datums = [make_datum(rng, 7), make_datum(rng, 9, columns=3), make_datum(rng, 4, columns=1)]
    (result,) = run_micro_batch(base, [quantum_of(make_state(base, LoraSpec(rank=2, seed=0)), datums)])
    assert [array.shape for array in result.logprobs] == [(7,), (9, 3), (4, 1)]
    assert all(array.dtype == np.float32 and array.max() < 0 for array in result.logprobs)
    expected = -sum(
        float((array * datum.inputs["weights"]).sum()) for array, datum in zip(result.logprobs, datums, strict=True)
    )
    assert result.metrics == {"loss:sum": pytest.approx(expected, rel=1e-5)}


def test_one_target_of_several_columns_is_that_target_alone(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(2), 20)
    targets, weights = datum.inputs["target_tokens"], datum.inputs["weights"]
    wide = type(datum)(
        tokens=datum.tokens,
        inputs={
            "target_tokens": np.stack([targets, (targets + 1) % VOCAB_SIZE], axis=1),
            "weights": np.stack([weights, np.zeros_like(weights)], axis=1),
        },
    )
    state = make_state(base, LoraSpec(rank=2, seed=0))
    narrow_quantum, wide_quantum = quantum_of(state, [datum]), quantum_of(state, [wide])
    narrow_result, wide_result = run_micro_batch(base, [narrow_quantum, wide_quantum])
    np.testing.assert_array_equal(narrow_result.logprobs[0], wide_result.logprobs[0][:, 0])
    assert narrow_quantum.scratch is not None
    assert wide_quantum.scratch is not None
    torch.testing.assert_close(narrow_quantum.scratch.flat, wide_quantum.scratch.flat, rtol=1e-5, atol=1e-6)


def test_absent_weights_count_one(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(3), 12)
    bare = type(datum)(tokens=datum.tokens, inputs={"target_tokens": datum.inputs["target_tokens"]})
    (result,) = run_micro_batch(base, [quantum_of(make_state(base, LoraSpec(rank=2, seed=0)), [bare])])
    assert result.metrics["loss:sum"] == pytest.approx(-float(result.logprobs[0].sum()), rel=1e-6)


def test_per_token_clips_replace_the_configured_ones(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(4), 40, "ppo")
    wide_open = {
        "clip_low_threshold": np.zeros(40, dtype=np.float32),
        "clip_high_threshold": np.full(40, 1e9, dtype=np.float32),
    }
    free = type(datum)(tokens=datum.tokens, inputs={**datum.inputs, **wide_open})
    state = make_state(base, LoraSpec(rank=2, seed=0))
    clipped, unclipped, reference = run_micro_batch(
        base,
        [
            quantum_of(state, [datum], "ppo"),
            quantum_of(state, [free], "ppo"),
            quantum_of(state, [free], "importance_sampling"),
        ],
    )
    assert clipped.metrics["clipped_tokens:sum"] > 0
    assert unclipped.metrics["clipped_tokens:sum"] == 0
    assert unclipped.metrics["loss:sum"] == pytest.approx(reference.metrics["loss:sum"], rel=1e-6)
    assert sum_metrics([clipped, unclipped])["loss:sum"] == pytest.approx(
        clipped.metrics["loss:sum"] + unclipped.metrics["loss:sum"]
    )


def test_quantum_without_signal_trains_nothing(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(5), 30)
    datum.inputs["weights"][:] = 0  # type: ignore[index]
    quantum = quantum_of(make_state(base, LoraSpec(rank=2, seed=0)), [datum])
    (result,) = run_micro_batch(base, [quantum])
    assert result.metrics["loss:sum"] == 0
    assert quantum.scratch is not None
    assert not quantum.scratch.flat.any()
