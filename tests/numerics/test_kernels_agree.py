"""Every LoRA kernel against the loop over segments, and against itself in other company.

Tolerances: sums of products in float32 differ between kernels by the order of addition, 2e-6 of the largest entry at
these sizes; what is stored in bfloat16 may then round to the neighbour, one step of 2^-7. A segment's own numbers in
other company are compared bit for bit.

Triton's kernels run here under Triton's interpreter, in a process of their own: whether functions are interpreted is
decided when they are defined.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import AdapterArena, AdapterWeights, ProjectionGroup, ProjectionShape, adapter_layout
from treadle.engine.kernels import grouped_mm, triton_lora
from treadle.engine.kernels.base import LoraKernel, LoraSegment, PassSegments
from treadle.engine.kernels.choose import choose_kernel
from treadle.engine.kernels.grouped_mm import GroupedMm
from treadle.engine.kernels.segment_loop import SegmentLoop
from treadle.engine.kernels.triton_lora import TritonLora

CPU = torch.device("cpu")
QKV, O_PROJ, GATE_UP = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj"
_GROUPS = (
    ProjectionGroup(
        QKV,
        tuple(
            ProjectionShape(f"self_attn.{leaf}", 40, out)
            for leaf, out in (("q_proj", 72), ("k_proj", 24), ("v_proj", 24))
        ),
    ),
    ProjectionGroup(O_PROJ, (ProjectionShape("self_attn.o_proj", 72, 40),)),
    ProjectionGroup(GATE_UP, (ProjectionShape("mlp.gate_proj", 40, 68), ProjectionShape("mlp.up_proj", 40, 68))),
)
_WIDTHS = {QKV: (40, 120), O_PROJ: (72, 40), GATE_UP: (40, 136)}

# grouped_mm is in every torch that we support from 2.10 on; Triton's kernels are here in the interpreter only.
KERNELS: list[type[LoraKernel]] = [
    *([GroupedMm] if grouped_mm.is_available() else []),
    *([TritonLora] if triton_lora.is_available(CPU) else []),
]
ALL_KERNELS: list[type[LoraKernel]] = [SegmentLoop, *KERNELS]


@dataclass(frozen=True)
class Quantum:
    """What a segment is made from: a run (by number), its rank, its rows, and whether it trains."""

    run: int
    rank: int
    rows: int
    trains: bool = True
    train_attn: bool = True


# Ranks 1, odd, above one tile of the Triton kernels; lengths below, at and above theirs; two quanta of one run, of
# which the second is not next to the first; one that does not train; one without adapters on attention.
MIXED = (
    Quantum(0, 3, 33),
    Quantum(1, 16, 32),
    Quantum(0, 3, 5),
    Quantum(2, 1, 70),
    Quantum(3, 35, 1),
    Quantum(4, 16, 9, trains=False),
    Quantum(5, 4, 6, train_attn=False),
)
EQUAL = (Quantum(0, 8, 16), Quantum(1, 8, 24), Quantum(1, 8, 40), Quantum(2, 8, 8))


@dataclass
class Pack:
    """A pass over some quanta, with rows before, between and behind them that belong to nobody."""

    segments: PassSegments
    x: Tensor
    y: Tensor
    dy: Tensor
    dx: Tensor


def make_pack(quanta: Sequence[Quantum], group: str, dtype: torch.dtype, *, gap: int = 0) -> Pack:
    """The numbers of a quantum (its rows and its run) depend on the quantum alone, not on where it lies."""
    num_inputs, num_outputs = _WIDTHS[group]
    weights: dict[int, AdapterWeights] = {}
    grads: dict[int, AdapterArena] = {}
    segments = []
    num_rows = gap
    for quantum in quanta:
        if quantum.run not in weights:
            layout = adapter_layout(_GROUPS, LoraSpec(rank=quantum.rank, seed=0, train_attn=quantum.train_attn))
            weights[quantum.run] = AdapterWeights(
                layout, noise(layout.num_elements, quantum.run) * 0.3, 32 / quantum.rank
            )
            grads[quantum.run] = AdapterArena(layout, noise(layout.num_elements, 100 + quantum.run))
        arena = grads[quantum.run] if quantum.trains else None
        segments.append(LoraSegment(weights[quantum.run], num_rows, num_rows + quantum.rows, arena))
        num_rows += quantum.rows + gap
    tensors = [noise((num_rows, width), 0) for width in (num_inputs, num_outputs, num_outputs, num_inputs)]
    for quantum, segment in zip(quanta, segments, strict=True):
        for index, tensor in enumerate(tensors):
            seed = 1_000 + 10 * quantum.rows + index
            tensor[segment.start : segment.stop] = noise((quantum.rows, tensor.shape[1]), seed)
    return Pack(PassSegments(segments), *(tensor.to(dtype) for tensor in tensors))


def noise(shape: int | tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(kernel: LoraKernel, pack: Pack, group: str) -> None:
    kept = kernel.add(pack.x, pack.y, pack.segments, group)
    kernel.add_grads(pack.dy, pack.x, kept, pack.dx, pack.segments, group)


def assert_packs_close(actual: Pack, expected: Pack) -> None:
    for mine, theirs in ((actual.y, expected.y), (actual.dx, expected.dx)):
        rounding = 0.0 if mine.dtype == torch.float32 else 2.0**-7
        assert_close(mine.float(), theirs.float(), rtol=rounding)
    for mine, theirs in zip(actual.segments, expected.segments, strict=True):
        if mine.grads is not None and theirs.grads is not None:
            assert_close(mine.grads.flat, theirs.grads.flat)


def assert_close(actual: Tensor, expected: Tensor, *, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [QKV, O_PROJ, GATE_UP])
@pytest.mark.parametrize(("quanta", "gap"), [(MIXED, 3), (EQUAL, 0)])
@pytest.mark.parametrize("make_kernel", KERNELS)
def test_kernel_equals_the_loop(
    make_kernel: type[LoraKernel], quanta: Sequence[Quantum], gap: int, group: str, dtype: torch.dtype
) -> None:
    actual, expected = (make_pack(quanta, group, dtype, gap=gap) for _ in range(2))
    before = make_pack(quanta, group, dtype, gap=gap)
    run(make_kernel(), actual, group)
    run(SegmentLoop(), expected, group)
    assert_packs_close(actual, expected)
    assert not torch.equal(expected.y, before.y)
    assert not torch.equal(expected.dx, before.dx)
    # Rows that belong to nobody, or to a run without adapters here, stay as they were.
    is_idle = torch.ones(len(actual.x), dtype=torch.bool)
    for segment in actual.segments:
        if segment.adapter.group(group) is not None:
            is_idle[segment.start : segment.stop] = False
    assert bool(is_idle.any()) == (gap > 0 or (quanta is MIXED and group != GATE_UP))
    assert torch.equal(actual.y[is_idle], before.y[is_idle])
    assert torch.equal(actual.dx[is_idle], before.dx[is_idle])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_kernel", ALL_KERNELS)
def test_a_segment_has_the_same_bits_in_any_company(make_kernel: type[LoraKernel], dtype: torch.dtype) -> None:
    # Both quanta of run 0 belong together: their gradients add up in one arena.
    others = [quantum for quantum in MIXED if quantum.run != 0]
    together = make_pack(MIXED, QKV, dtype)
    run(make_kernel(), together, QKV)
    reordered = make_pack([*reversed(others), *(quantum for quantum in MIXED if quantum.run == 0)], QKV, dtype, gap=5)
    run(make_kernel(), reordered, QKV)
    seen = dict(zip(MIXED, together.segments, strict=True))
    for segment in reordered.segments:
        matching = [q for q, s in seen.items() if s.adapter.flat.equal(segment.adapter.flat)]
        quantum = next(q for q in matching if q.rows == segment.stop - segment.start)
        assert_same_bits(together, seen[quantum], reordered, segment)
    for number in {quantum.run for quantum in MIXED}:
        mine = [quantum for quantum in MIXED if quantum.run == number]
        alone = make_pack(mine, QKV, dtype)
        run(make_kernel(), alone, QKV)
        for quantum, segment in zip(mine, alone.segments, strict=True):
            assert_same_bits(together, seen[quantum], alone, segment)


def assert_same_bits(left: Pack, left_segment: LoraSegment, right: Pack, right_segment: LoraSegment) -> None:
    left_rows, right_rows = (slice(s.start, s.stop) for s in (left_segment, right_segment))
    assert torch.equal(left.x[left_rows], right.x[right_rows]), "the comparison is of one quantum with itself"
    assert torch.equal(left.y[left_rows], right.y[right_rows])
    assert torch.equal(left.dx[left_rows], right.dx[right_rows])
    if left_segment.grads is not None:
        assert right_segment.grads is not None
        assert torch.equal(left_segment.grads.flat, right_segment.grads.flat)


@pytest.mark.parametrize("make_kernel", KERNELS)
def test_quanta_are_reduced_alone_and_added_in_order(make_kernel: type[LoraKernel]) -> None:
    first, second = Quantum(0, 8, 40), Quantum(0, 8, 24)
    both = make_pack([first, second], O_PROJ, torch.float32)
    run(make_kernel(), both, O_PROJ)
    total = make_pack([first], O_PROJ, torch.float32).segments[0].grads
    assert total is not None
    for quantum in (first, second):
        one = make_pack([quantum], O_PROJ, torch.float32)
        arena = one.segments[0].grads
        assert arena is not None
        arena.flat.zero_()
        run(make_kernel(), one, O_PROJ)
        total.flat.add_(arena.flat)
    arena = both.segments[0].grads
    assert arena is not None
    assert torch.equal(arena.flat, total.flat)


@pytest.mark.parametrize("make_kernel", ALL_KERNELS)
def test_not_a_number_stays_in_its_segment(make_kernel: type[LoraKernel]) -> None:
    clean, spoilt = (make_pack(MIXED, QKV, torch.float32) for _ in range(2))
    victim = spoilt.segments[1]
    for tensor in (spoilt.x, spoilt.dy):
        tensor[victim.start : victim.stop] = float("nan")
    run(make_kernel(), clean, QKV)
    run(make_kernel(), spoilt, QKV)
    assert victim.grads is not None
    assert bool(victim.grads.flat.isnan().any())
    for index, (mine, theirs) in enumerate(zip(clean.segments, spoilt.segments, strict=True)):
        if index != 1:
            assert torch.equal(clean.y[mine.start : mine.stop], spoilt.y[mine.start : mine.stop])
            assert torch.equal(clean.dx[mine.start : mine.stop], spoilt.dx[mine.start : mine.stop])
            if mine.grads is not None and theirs.grads is not None:
                assert torch.equal(mine.grads.flat, theirs.grads.flat)


@pytest.mark.parametrize("make_kernel", ALL_KERNELS)
def test_a_gradient_given_up_after_the_forward_is_not_written(make_kernel: type[LoraKernel]) -> None:
    pack, expected = (make_pack(MIXED, QKV, torch.float32) for _ in range(2))
    kernel = make_kernel()
    # The second time with the same segments, so that what was prepared for their gradients is out of date.
    run(kernel, pack, QKV)
    for _ in range(2):
        run(kernel, expected, QKV)
    kept = kernel.add(pack.x, pack.y, pack.segments, QKV)
    given_up = pack.segments[1].grads
    assert given_up is not None
    before = given_up.flat.clone()
    pack.segments[1].grads = None
    kernel.add_grads(pack.dy, pack.x, kept, pack.dx, pack.segments, QKV)
    assert torch.equal(given_up.flat, before)
    assert torch.equal(pack.dx, expected.dx)
    for index, (mine, theirs) in enumerate(zip(pack.segments, expected.segments, strict=True)):
        if index != 1 and mine.grads is not None and theirs.grads is not None:
            assert torch.equal(mine.grads.flat, theirs.grads.flat)


@pytest.mark.parametrize("make_kernel", ALL_KERNELS)
def test_without_dx_the_gradients_are_the_same(make_kernel: type[LoraKernel]) -> None:
    with_dx, without = (make_pack(MIXED, QKV, torch.float32) for _ in range(2))
    kernel = make_kernel()
    run(kernel, with_dx, QKV)
    kept = kernel.add(without.x, without.y, without.segments, QKV)
    kernel.add_grads(without.dy, without.x, kept, None, without.segments, QKV)
    for mine, theirs in zip(with_dx.segments, without.segments, strict=True):
        if mine.grads is not None and theirs.grads is not None:
            assert torch.equal(mine.grads.flat, theirs.grads.flat)


@pytest.mark.parametrize("quanta", [(), (Quantum(5, 4, 6, train_attn=False),)])
@pytest.mark.parametrize("make_kernel", ALL_KERNELS)
def test_without_adapters_nothing_happens(make_kernel: type[LoraKernel], quanta: Sequence[Quantum]) -> None:
    pack, before = (make_pack(quanta, QKV, torch.float32, gap=8) for _ in range(2))
    run(make_kernel(), pack, QKV)
    assert torch.equal(pack.y, before.y)
    assert torch.equal(pack.dx, before.dx)


@pytest.mark.parametrize("make_kernel", ALL_KERNELS)
def test_what_is_prepared_once_per_pass_changes_nothing(make_kernel: type[LoraKernel]) -> None:
    prepared, plain = make_pack(MIXED, QKV, torch.float32), make_pack(MIXED, QKV, torch.float32)
    kernel = make_kernel()
    segments = list(plain.segments)
    for _ in range(2):
        run(kernel, prepared, QKV)
        kept = kernel.add(plain.x, plain.y, segments, QKV)
        kernel.add_grads(plain.dy, plain.x, kept, plain.dx, segments, QKV)
    assert torch.equal(prepared.y, plain.y)
    assert torch.equal(prepared.dx, plain.dx)


@pytest.mark.parametrize("make_kernel", KERNELS)
def test_a_head_in_float32_over_bfloat16_rows(make_kernel: type[LoraKernel]) -> None:
    actual, expected = (make_pack(EQUAL, GATE_UP, torch.bfloat16) for _ in range(2))
    for pack in (actual, expected):
        pack.y, pack.dy = pack.y.float(), pack.dy.float()
    run(make_kernel(), actual, GATE_UP)
    run(SegmentLoop(), expected, GATE_UP)
    assert_packs_close(actual, expected)


def test_what_is_chosen_where_strict_mode_is_promised_is_tested_here() -> None:
    assert type(choose_kernel(CPU)) in ALL_KERNELS


@pytest.mark.timeout(300)
def test_triton_kernels_agree_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if triton_lora.is_available(CPU):
        pytest.skip("already in the interpreter: this file's other tests are the test")
    # -W: what Triton itself warns of at import is not ours.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-k",
        "TritonLora",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
