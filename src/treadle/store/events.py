"""Hints that rows came or were finished, and that a pool changed hands.

A hint may be missing (another process wrote the row and its notification was lost), so whoever listens also polls now
and then; the table is the truth. Callbacks run on the event loop, after the commit, one loop turn later: a callback
that raises is reported by the loop and disturbs neither the writer nor the other callbacks.
Invariant: what this process announces is forwarded to the others once; what came from them is only relayed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.ops import OpKind
from treadle.domain.usage import UsageKind

EnqueuedCallback: TypeAlias = Callable[[PoolName, OpKind], None]
FinishedCallback: TypeAlias = Callable[[tuple[RequestId, ...]], None]
UsedCallback: TypeAlias = Callable[[str, UsageKind, float], None]
PoolCallback: TypeAlias = Callable[[PoolName], None]
Unsubscribe: TypeAlias = Callable[[], None]


class Forwarding(Protocol):
    """Takes hints to other processes. Neither blocks nor raises."""

    def enqueued(self, pool: PoolName, kind: OpKind) -> None: ...

    def finished(self, request_ids: Sequence[RequestId]) -> None: ...

    def pool_changed(self, pool: PoolName) -> None: ...


class Events:
    """Who wants to know."""

    def __init__(self) -> None:
        # Keyed by an object of their own, so that one function may subscribe twice.
        self._on_enqueued: dict[object, EnqueuedCallback] = {}
        self._on_finished: dict[object, FinishedCallback] = {}
        self._on_pool: dict[object, PoolCallback] = {}
        self._on_used: dict[object, UsedCallback] = {}
        self._forwarding: Forwarding | None = None

    def forward_to(self, forwarding: Forwarding) -> None:
        """Tell other processes too, from now on."""
        self._forwarding = forwarding

    def on_enqueued(self, callback: EnqueuedCallback) -> Unsubscribe:
        """Call back for each new row that may make something runnable; the returned function ends it (idempotent).

        That is every queued row, and a sequenced op that was refused at admission: it may close a hole.
        """
        return _subscribe(self._on_enqueued, callback)

    def on_finished(self, callback: FinishedCallback) -> Unsubscribe:
        """Call back for each commit that finished requests; the returned function ends it (idempotent)."""
        return _subscribe(self._on_finished, callback)

    def on_pool_changed(self, callback: PoolCallback) -> Unsubscribe:
        """Call back when a pool's lease was given back or its leader reported; the returned function ends it."""
        return _subscribe(self._on_pool, callback)

    def on_used(self, callback: UsedCallback) -> Unsubscribe:
        """Call back with base model, kind and amount of what this process commits; the returned function ends it."""
        return _subscribe(self._on_used, callback)

    def announce_used(self, amounts: Mapping[tuple[str, UsageKind], float]) -> None:
        """Usage was committed here; other processes count their own."""
        for (base_model, kind), amount in amounts.items():
            _call_soon(self._on_used, base_model, kind, amount)

    def announce_enqueued(self, pool: PoolName, kind: OpKind) -> None:
        self.relay_enqueued(pool, kind)
        if self._forwarding is not None:
            self._forwarding.enqueued(pool, kind)

    def announce_finished(self, request_ids: Sequence[RequestId]) -> None:
        self.relay_finished(request_ids)
        if self._forwarding is not None and request_ids:
            self._forwarding.finished(request_ids)

    def announce_pool(self, pool: PoolName) -> None:
        self.relay_pool(pool)
        if self._forwarding is not None:
            self._forwarding.pool_changed(pool)

    def relay_enqueued(self, pool: PoolName, kind: OpKind) -> None:
        """Like `announce_enqueued`, for what another process announced."""
        _call_soon(self._on_enqueued, pool, kind)

    def relay_finished(self, request_ids: Sequence[RequestId]) -> None:
        """Like `announce_finished`, for what another process announced."""
        if request_ids:
            _call_soon(self._on_finished, tuple(request_ids))

    def relay_pool(self, pool: PoolName) -> None:
        """Like `announce_pool`, for what another process announced."""
        _call_soon(self._on_pool, pool)


def _subscribe(callbacks: dict[object, Callable[..., None]], callback: Callable[..., None]) -> Unsubscribe:
    key = object()
    callbacks[key] = callback

    def unsubscribe() -> None:
        callbacks.pop(key, None)

    return unsubscribe


def _call_soon(callbacks: dict[object, Callable[..., None]], *args: object) -> None:
    loop = asyncio.get_running_loop()
    for callback in callbacks.values():
        loop.call_soon(callback, *args)
