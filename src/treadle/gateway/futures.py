"""Waiting for results: one hub per gateway wakes everybody whose request was committed.

It is fed by committed rows only, and a slow poll of the ids somebody waits for is the truth behind it (rows
committed by another process, a lost notification). It refuses to know what a result means.
Invariant: a waiter subscribes before it reads, so a commit between its read and its wait wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator

from treadle.domain.ids import RequestId, SamplingSessionId
from treadle.domain.records import FutureRecord
from treadle.domain.states import RequestState
from treadle.store import Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# Draining is looked at this often; a held poll delays the end of the server by at most this.
TICK_S = 0.25
# The truth behind the notifications. One narrow query for all ids that are waited for.
POLL_S = 1.0
# What a poll costs a draining server: it answers almost at once, but a client that asks again
# immediately (tinker 0.38 does, without back-off) must not spin.
DRAIN_HOLD_S = 0.25


class Waiter:
    """One waiting call. Wake-ups between two waits are remembered."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def wake(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Return at the next wake-up, or after `timeout_s` seconds; the caller reads again either way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        self._event.clear()


class FuturesHub:
    """Waiters by request id, and by sampling session for its poller."""

    def __init__(self, *, store: Store, is_draining: Callable[[], bool]) -> None:
        self._store = store
        self._is_draining = is_draining
        self._waiters: dict[str, set[Waiter]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def num_waiters(self) -> int:
        return sum(len(waiters) for waiters in self._waiters.values())

    async def start(self) -> None:
        """Begin to poll. The notifications of this process work without it."""
        assert self._task is None, "the hub was started twice"
        self._task = asyncio.create_task(self._run(), name="gateway-futures-hub")

    async def stop(self) -> None:
        """Stop polling and let every waiter go. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._wake_all()

    def on_finished(self, request_ids: Iterable[RequestId]) -> None:
        """Wake whoever waits for these committed requests. Called on the event loop."""
        for request_id in request_ids:
            self._wake(request_id)
            # A sample's id is `{sampling_session_id}:{seq_id}`; its session's poller waits for the former.
            self._wake(request_id.rpartition(":")[0])

    def hold_s(self, asked_s: float) -> float:
        """How long a poll may be held now: as asked, or a moment while the server is stopping."""
        return min(asked_s, DRAIN_HOLD_S) if self._is_draining() else asked_s

    @contextlib.contextmanager
    def subscribed(self, key: RequestId | SamplingSessionId) -> Iterator[Waiter]:
        """A waiter that is woken for `key` from now on."""
        waiter = Waiter()
        self._waiters.setdefault(key, set()).add(waiter)
        try:
            yield waiter
        finally:
            waiters = self._waiters[key]
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[key]

    def _wake(self, key: str) -> None:
        for waiter in self._waiters.get(key, ()):
            waiter.wake()

    def _wake_all(self) -> None:
        for key in tuple(self._waiters):
            self._wake(key)
