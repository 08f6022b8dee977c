"""The only package that speaks SQL. Start with `Store.open`."""

from __future__ import annotations

from treadle.store.pools import PoolReport
from treadle.store.sampling import Completion
from treadle.store.store import Store
from treadle.store.writer import CommitReport

__all__ = ["CommitReport", "Completion", "PoolReport", "Store"]
