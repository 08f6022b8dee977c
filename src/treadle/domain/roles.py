"""What the workers of a pool do, and how many are wanted. It refuses to know where they run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """BOTH: training and samples share the device. TRAINING: cycles, and of samples only what no other sampler of its
    pool can do. SAMPLING: samples alone; no run lives there."""

    BOTH = "both"
    TRAINING = "training"
    SAMPLING = "sampling"


@dataclass(frozen=True, slots=True)
class Scale:
    """workers: that train. samplers: that only sample; with 0 the others do that too."""

    workers: int = 1
    samplers: int = 0
