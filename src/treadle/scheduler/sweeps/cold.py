"""Runs whose client is gone leave their worker. Nothing of them is dropped: their next op brings them back.

It refuses to know how a run is put away; it only finds out whose turn it is. Invariant: a run that has something
queued is never sent away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from treadle.domain.ids import ModelId
from treadle.store import Store


class ColdStorage(Protocol):
    """A pool as far as its runs may rest. One that does not lead holds none."""

    def resident_runs(self) -> Collection[ModelId]:
        """Runs that its worker holds."""
        ...

    def park_cold(self, model_ids: Iterable[ModelId]) -> None:
        """Have those of these runs that the worker holds leave it between cycles, each once its state is durable."""
        ...


async def put_away(store: Store, pools: Iterable[ColdStorage]) -> int:
    """Send runs of expired and finished sessions to cold storage; how many."""
    num_sent = 0
    for pool in pools:
        resident = pool.resident_runs()
        if resident and (resting := await store.retention.at_rest(resident)):
            pool.park_cold(sorted(resting))
            num_sent += len(resting)
    return num_sent
