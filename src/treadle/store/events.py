"""In-process hints that rows came or were finished.

A hint may be missing (another process wrote the row), so whoever listens also polls now and then; the table is the
truth. Callbacks run on the event loop, after the commit, one loop turn later: a callback that raises is reported by
the loop and disturbs neither the writer nor the other callbacks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.ops import OpKind

EnqueuedCallback: TypeAlias = Callable[[PoolName, OpKind], None]
FinishedCallback: TypeAlias = Callable[[tuple[RequestId, ...]], None]
Unsubscribe: TypeAlias = Callable[[], None]


class Events:
    """Who wants to know."""

    def __init__(self) -> None:
        # Keyed by an object of their own, so that one function may subscribe twice.
        self._on_enqueued: dict[object, EnqueuedCallback] = {}
        self._on_finished: dict[object, FinishedCallback] = {}

    def on_enqueued(self, callback: EnqueuedCallback) -> Unsubscribe:
        """Call back for each new row that may make something runnable; the returned function ends it (idempotent).

        That is every queued row, and a sequenced op that was refused at admission: it may close a hole.
        """
        return _subscribe(self._on_enqueued, callback)

    def on_finished(self, callback: FinishedCallback) -> Unsubscribe:
        """Call back for each commit that finished requests; the returned function ends it (idempotent)."""
        return _subscribe(self._on_finished, callback)

    def announce_enqueued(self, pool: PoolName, kind: OpKind) -> None:
        loop = asyncio.get_running_loop()
        for callback in self._on_enqueued.values():
            loop.call_soon(callback, pool, kind)

    def announce_finished(self, request_ids: Sequence[RequestId]) -> None:
        if not request_ids:
            return
        loop = asyncio.get_running_loop()
        for callback in self._on_finished.values():
            loop.call_soon(callback, tuple(request_ids))


def _subscribe(callbacks: dict[object, Callable[..., None]], callback: Callable[..., None]) -> Unsubscribe:
    key = object()
    callbacks[key] = callback

    def unsubscribe() -> None:
        callbacks.pop(key, None)

    return unsubscribe
