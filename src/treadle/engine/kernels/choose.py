"""Which kernel computes the LoRA terms on a device: a table made from measurements, never a race at run time.

A race would choose one kernel in a run and another in its replay, and the numbers would differ in the last bits.
Nothing but the device kind and whether the optional libraries are there decides, and the numerics profile names the
result.
Invariant: every kernel that can be chosen keeps a segment's bits independent of its company (tests/numerics).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from treadle.engine.kernels import grouped_mm, triton_lora
from treadle.engine.kernels.base import LoraKernel
from treadle.engine.kernels.grouped_mm import GroupedMm
from treadle.engine.kernels.segment_loop import SegmentLoop
from treadle.engine.kernels.triton_lora import TritonLora
from treadle.errors import ConfigError

AUTO = "auto"
_ANY_RANK = 1 << 30
_KERNELS: dict[str, Callable[[], LoraKernel]] = {
    "segment-loop": SegmentLoop,
    "grouped-mm": GroupedMm,
    "triton": TritonLora,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel for adapters of up to `max_rank` on one kind of device, and what that rests on."""

    device_kind: str
    max_rank: int
    kernel: str
    measured: str


# Geometric mean, over the cells of the rank, of the time of forward and backward as a multiple of the loop's.
# A pass has one kernel, so a table whose lines for one device kind differ needs a kernel that splits by rank first.
# The number of segments is no key on purpose: it is company. (On a CPU grouped-mm takes 0.6 to 0.8 of the loop's time
# at 64 segments of 8 to 32 rows and hidden 128 to 512, and loses nearly everywhere else.)
CHOICES = (
    # python scripts/bench/kernel_race.py --save; benchmarks/results/cpu-2core/kernels.json
    # (AMD EPYC, torch 2.13, float32, one thread, CPU-seconds, 33 cells per rank: ranks 1 to 64, segments 1 to 64,
    # rows 8 to 512, hidden 128 to 2,048)
    Choice("cpu", 1, "segment-loop", "grouped-mm 2.4x; the loop is the fastest in 30 of 33 cells"),
    Choice("cpu", 4, "segment-loop", "grouped-mm 1.3x; the loop is the fastest in 21 of 33 cells"),
    Choice("cpu", 8, "segment-loop", "grouped-mm 1.3x; the loop is the fastest in 25 of 33 cells"),
    Choice("cpu", 16, "segment-loop", "grouped-mm 1.4x; the loop is the fastest in 26 of 33 cells"),
    Choice("cpu", 32, "segment-loop", "grouped-mm 1.3x; the loop is the fastest in 24 of 33 cells"),
    Choice("cpu", _ANY_RANK, "segment-loop", "grouped-mm 1.4x; the loop is the fastest in 27 of 33 cells"),
    # python scripts/bench/kernel_race.py --device cuda --dtype bfloat16 --save
    Choice(
        "cuda",
        _ANY_RANK,
        "segment-loop",
        "not measured yet. The loop is plain library products, whose correctness needs no GPU of ours; triton has "
        "run in an interpreter only, and grouped-mm waits for the device at each call in float32",
    ),
)


def choose_kernel(device: torch.device, name: str = AUTO) -> LoraKernel:
    """The kernel for passes on this device: the table's, or the one of that name if it is not "auto".

    Ranks of one pass may differ; the table has one kernel for all ranks of a device kind (tests say so). Raises
    ConfigError for a name that is not known or that cannot run on the device.
    """
    if name != AUTO:
        return kernel_named(name, device)
    chosen = {choice.kernel for choice in CHOICES if choice.device_kind == device.type}
    if not chosen:
        raise ConfigError(f"no kernel was chosen for device {device}; known device kinds: {', '.join(_device_kinds())}")
    assert len(chosen) == 1, "different kernels for different ranks of one device kind"
    return kernel_named(chosen.pop(), device)


def chosen_for(device_kind: str, rank: int) -> Choice:
    """The table's line for adapters of this rank. KeyError for a device kind that the table does not have."""
    lines = sorted((c for c in CHOICES if c.device_kind == device_kind), key=lambda choice: choice.max_rank)
    for choice in lines:
        if rank <= choice.max_rank:
            return choice
    raise KeyError((device_kind, rank))


def available_kernels(device: torch.device) -> tuple[str, ...]:
    """Names of the kernels that can run on the device, the reference first."""
    usable = {
        "segment-loop": True,
        "grouped-mm": grouped_mm.is_available(),
        "triton": triton_lora.is_available(device),
    }
    return tuple(name for name in _KERNELS if usable[name])


def kernel_named(name: str, device: torch.device) -> LoraKernel:
    """The kernel of that name. Raises ConfigError when there is none, or when it cannot run on the device."""
    if name not in _KERNELS:
        raise ConfigError(f"kernel {name!r} is not known; known: {', '.join((AUTO, *_KERNELS))}")
    usable = available_kernels(device)
    if name not in usable:
        raise ConfigError(f"kernel {name!r} cannot run on {device}; usable there: {', '.join((AUTO, *usable))}")
    return _KERNELS[name]()


def _device_kinds() -> list[str]:
    return sorted({choice.device_kind for choice in CHOICES})
