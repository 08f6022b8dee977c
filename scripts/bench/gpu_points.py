"""Which points gpu.py measures, what each is expected to take, and which are dropped when time is short.

Knows no devices. Invariant: what is chosen depends on the budget and the GEMM rate alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from models import model_config
from workload import ModelShape, Workload, even_lengths, useful_flops

# Of the GEMM rate, and seconds per pass whatever its tokens: deliberately poor, so that estimates err upwards.
_POOR_SHARE = 0.30
_PASS_S = {"ours": 0.15, "peft": 0.30}
_SETUP_S = 2.0
# In turns: every side once untimed, and with PEFT the gate's pass of each.
_UNTIMED_TURNS = {False: 1, True: 2}


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is: the real thing, or the test of the script."""

    is_tiny: bool
    sizes: tuple[str, ...]
    strict_sizes: tuple[str, ...]
    strict_buckets: tuple[int, ...]
    dtype: torch.dtype
    rank: int
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    tenants: tuple[int, ...]
    longest: int
    pass_tokens: int
    # Less than ours: PEFT keeps several times our bytes per token.
    peft_pass_tokens: int

    @staticmethod
    def full() -> Scale:
        return Scale(
            is_tiny=False,
            sizes=("4b", "8b", "0.6b"),
            strict_sizes=("4b",),
            strict_buckets=(1024, 2048, 4096, 8192, 16384),
            dtype=torch.bfloat16,
            rank=32,
            ranks=(8, 16, 32, 64),
            tokens=(256, 1024, 4096, 16384),
            tenants=(1, 8, 64),
            longest=2048,
            pass_tokens=16384,
            peft_pass_tokens=4096,
        )

    @staticmethod
    def tiny() -> Scale:
        return Scale(
            is_tiny=True,
            sizes=("tiny",),
            strict_sizes=("tiny",),
            strict_buckets=(256,),
            dtype=torch.float32,
            rank=8,
            ranks=(8, 64),
            tokens=(16, 64),
            tenants=(1, 8),
            longest=32,
            pass_tokens=256,
            peft_pass_tokens=256,
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement. name: also its key in the results and in the predictions."""

    name: str
    size: str
    workload: Workload
    with_peft: bool
    repetitions: int
    recompute: str = "none"


def points_of(scale: Scale) -> list[Point]:
    """All points, the most important model first, each point once."""
    found: dict[str, Point] = {}
    first = scale.sizes[0]
    for size in scale.sizes:
        for tokens in scale.tokens:
            # P0 and P1 at every point would cost half of the time and say little more.
            with_peft = size == first or tokens in (scale.tokens[0], scale.tokens[-2])
            _add(found, size, Workload(8, even_lengths(tokens, scale.longest), scale.rank), with_peft)
        total = scale.tokens[-1]
        for tenants in scale.tenants if size == first else (scale.tenants[0], scale.tenants[-1]):
            # Equal sequences too, or attention would differ: how many tenants send them is then all that differs.
            lengths = even_lengths(total // tenants, total // scale.tenants[-1])
            _add(found, size, Workload(tenants, lengths, scale.rank), with_peft=False)
    for rank in scale.ranks:
        _add(found, first, Workload(8, even_lengths(scale.tokens[1], scale.longest), rank), with_peft=False)
    for mode in ("selective", "full"):
        workload = Workload(8, even_lengths(scale.tokens[-2], scale.longest), scale.rank)
        _add(found, first, workload, with_peft=False, recompute=mode)
    return list(found.values())


def choose(points: Sequence[Point], budget_s: float, gemm_tflops: float) -> tuple[list[Point], list[Point]]:
    """What fits in the budget, in order, and what was dropped: the most expensive first."""
    kept = list(points)
    dropped: list[Point] = []
    while kept and sum(estimate_s(point, gemm_tflops) for point in kept) > budget_s:
        largest = max(kept, key=lambda point: estimate_s(point, gemm_tflops))
        kept.remove(largest)
        dropped.append(largest)
    return kept, dropped


def estimate_s(point: Point, gemm_tflops: float) -> float:
    """Wall seconds that the point may take, set-up and untimed calls included."""
    flops = useful_flops(ModelShape.of(model_config(point.size)), point.workload).total
    busy_s = flops / (_POOR_SHARE * gemm_tflops * 1e12)
    # Each loop of PEFT runs two tenants of this many.
    turn_s = busy_s + _PASS_S["ours"]
    if point.with_peft:
        turn_s += 2 * (busy_s * min(1.0, 2 / point.workload.num_tenants) + 2 * _PASS_S["peft"])
    return _SETUP_S + turn_s * (point.repetitions + _UNTIMED_TURNS[point.with_peft])


def _add(found: dict[str, Point], size: str, workload: Workload, with_peft: bool, recompute: str = "none") -> None:
    name = f"{size}: {workload.label} r{workload.rank}" + ("" if recompute == "none" else f" {recompute}")
    if name not in found:
        # Long steps vary little, and there is little time.
        repetitions = 5 if workload.num_tokens <= 8192 else 3 if workload.num_tokens <= 65_536 else 2
        found[name] = Point(name, size, workload, with_peft, repetitions, recompute)
