"""Rows that were read before: for good, or for as long as the store confirms them.

It refuses to know what the rows are and who may see them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from treadle.gateway.deps import Clock

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

EndedAmong: TypeAlias = Callable[[Sequence[K]], Awaitable[Collection[K]]]


class RecentRows(Generic[K, V]):
    """A bounded map that forgets what was used least recently."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        value = self._rows.get(key)
        if value is not None:
            self._rows.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        self._rows[key] = value
        self._rows.move_to_end(key)
        if len(self._rows) > self._capacity:
            self._rows.popitem(last=False)

    def forget(self, key: K) -> None:
        self._rows.pop(key, None)

    def items(self) -> list[tuple[K, V]]:
        return list(self._rows.items())


@dataclass(slots=True)
class _Belief(Generic[V]):
    value: V
    confirmed_at: float


class ConfirmedRows(Generic[K, V]):
    """Rows that may end, like a key that is revoked: believed for `lifetime_s` and then confirmed, all in one read.

    With a thousand clients that is one query a second instead of a thousand. `ended` says which of some keys are over.
    Invariant: what `get` returns was not over `lifetime_s` seconds ago, or when the store was last asked on the way.
    """

    def __init__(self, *, capacity: int, lifetime_s: float, clock: Clock, ended: EndedAmong[K]) -> None:
        self._rows: RecentRows[K, _Belief[V]] = RecentRows(capacity)
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._ended = ended
        self._confirming: asyncio.Task[float] | None = None

    async def get(self, key: K) -> V | None:
        """The row, or None when it must be read. Raises what the store raises when it cannot be asked."""
        belief = self._rows.get(key)
        if belief is None or self._clock.monotonic() - belief.confirmed_at < self._lifetime_s:
            return None if belief is None else belief.value
        if self._confirming is None or self._confirming.done():
            self._confirming = asyncio.create_task(self._confirm(), name="gateway-confirm-rows")
        # Shielded: the caller that happened to be first may be cancelled, and others wait for the same answer.
        asked_at = await asyncio.shield(self._confirming)
        belief = self._rows.get(key)
        return belief.value if belief is not None and belief.confirmed_at >= asked_at else None

    def put(self, key: K, value: V, *, read_at: float) -> None:
        """Believe a row from `read_at` on, the monotonic time before it was read."""
        self._rows.put(key, _Belief(value, read_at))

    def holds(self, key: K) -> bool:
        """Whether there is such a row, confirmed or not."""
        return self._rows.get(key) is not None

    def believed(self) -> list[tuple[K, V]]:
        """All rows, as they were confirmed last."""
        return [(key, belief.value) for key, belief in self._rows.items()]

    def forget(self, key: K) -> None:
        self._rows.forget(key)

    async def _confirm(self) -> float:
        """Ask the store about all rows; the time before it was asked."""
        asked_at, beliefs = self._clock.monotonic(), self._rows.items()
        ended = await self._ended([key for key, _ in beliefs])
        for key, belief in beliefs:
            if key in ended:
                self._rows.forget(key)
            else:
                belief.confirmed_at = max(belief.confirmed_at, asked_at)
        return asked_at
