"""Background sweeps: what may be forgotten is, by the rules of docs/lifecycle.md. Start with `Sweeper`."""

from __future__ import annotations

from treadle.scheduler.sweeps.cold import ColdStorage
from treadle.scheduler.sweeps.sweeper import Sweeper

__all__ = ["ColdStorage", "Sweeper"]
