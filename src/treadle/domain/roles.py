"""What the workers of a pool do. It refuses to know how many there are and where they run."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """BOTH: training and samples share the device. TRAINING: cycles, and of samples only what no other sampler of its
    pool can do. SAMPLING: samples alone; no run lives there."""

    BOTH = "both"
    TRAINING = "training"
    SAMPLING = "sampling"
