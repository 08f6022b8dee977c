"""Waiting for results: one hub per gateway wakes everybody whose request was committed.

It is fed by committed rows only, and a slow poll of the ids somebody waits for is the truth behind it (rows
committed by another process, a lost notification). It refuses to know what a result means.
Invariant: a waiter subscribes before it reads, so a commit between its read and its wait wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator

from treadle.domain.ids import RequestId, SamplingSessionId, SessionId, TenantId
from treadle.domain.records import FutureRecord
from treadle.domain.states import RequestState
from treadle.errors import NotFound, ResultExpired, StoreUnavailable, TreadleError
from treadle.store import Completion, Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# Draining is looked at this often; a held poll delays the end of the server by at most this.
TICK_S = 0.25
# The truth behind the notifications. One narrow query for all ids that are waited for.
POLL_S = 1.0
# What a poll costs a draining server: it answers almost at once, but a client that asks again
# immediately (tinker 0.38 does, without back-off) must not spin.
DRAIN_HOLD_S = 0.25


class Waiter:
    """One waiting call. Wake-ups between two waits are remembered.

    is_brief: it came while the server was stopping, and is over in a moment anyway.
    """

    def __init__(self, *, is_brief: bool) -> None:
        self._event = asyncio.Event()
        self.is_brief = is_brief
        self.is_released = False

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

    def __init__(self, *, store: Store, is_draining: Callable[[], bool], metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._is_draining = is_draining
        self._waiters: dict[str, set[Waiter]] = {}
        # The same for those who wait for any completion of a sampling session, and where each stood at the last poll.
        self._pollers: dict[str, set[Waiter]] = {}
        self._positions: dict[SamplingSessionId, int] = {}
        self._delivered: set[RequestId] = set()
        self._beats: set[SessionId] = set()
        self._task: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._is_stopped = False

    @property
    def num_waiters(self) -> int:
        """Calls that are being held now."""
        return sum(len(waiters) for held in (self._waiters, self._pollers) for waiters in held.values())

    async def start(self) -> None:
        """Listen and poll, until `stop`. Called once."""
        assert self._task is None, "the hub was started twice"
        self._unsubscribe = self._store.events.on_finished(self.wake_finished)
        self._task = asyncio.create_task(self._run(), name="gateway-futures-hub")

    async def stop(self) -> None:
        """Let every waiter go, and stop. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        self._unsubscribe()
        self._is_stopped = True
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self._wake_all()

    def wake_finished(self, request_ids: Iterable[RequestId]) -> None:
        """Wake whoever waits for these committed requests."""
        for request_id in request_ids:
            _wake(self._waiters, request_id)
            # A sample's id is `{sampling_session_id}:{seq_id}`; its session's poller waits for the former.
            _wake(self._pollers, request_id.rpartition(":")[0])

    async def future(self, request_id: RequestId, tenant_id: TenantId, *, hold_s: float) -> FutureRecord:
        """The tenant's request: final, or still queued after `hold_s` seconds. Raises NotFound."""
        deadline = self._deadline(hold_s)
        with self._subscribed(self._waiters, request_id) as waiter:
            while True:
                try:
                    record = await self._store.requests.future(request_id)
                except StoreUnavailable:
                    # The SDK would ask again at once, for ever (protocol 3.1): hold it like any other waiter.
                    if await self._waited(waiter, min(deadline, asyncio.get_running_loop().time() + POLL_S)):
                        continue
                    raise
                if record is None and await self._store.retention.was_forgotten(request_id, tenant_id):
                    raise ResultExpired(f"request {request_id} is over, and no longer kept")
                if record is None or record.tenant_id != tenant_id:
                    raise NotFound(f"request {request_id[:120]!r} does not exist")
                if record.state is not RequestState.QUEUED or not await self._waited(waiter, deadline):
                    return record

    async def completions(
        self, sampling_session_id: SamplingSessionId, *, after: int, cloned_sampler_id: int, limit: int, hold_s: float
    ) -> list[Completion]:
        """Finished samples behind position `after`, as soon as there are any; none after `hold_s` seconds."""
        deadline = self._deadline(hold_s)
        with self._subscribed(self._pollers, sampling_session_id) as waiter:
            while True:
                completions = await self._store.sampling.completions(
                    sampling_session_id, after=after, cloned_sampler_id=cloned_sampler_id, limit=limit
                )
                if completions or not await self._waited(waiter, deadline):
                    return completions

    def delivered(self, request_id: RequestId) -> None:
        """A result went out; the store hears of it with the next poll, which costs no write per result."""
        self._delivered.add(request_id)

    def beat(self, session_id: SessionId) -> None:
        """A session's client is there; the store hears of it with the next poll, like of deliveries."""
        self._beats.add(session_id)

    def _deadline(self, hold_s: float) -> float:
        held_s = min(hold_s, DRAIN_HOLD_S) if self._is_draining() else hold_s
        return asyncio.get_running_loop().time() + held_s

    async def _waited(self, waiter: Waiter, deadline: float) -> bool:
        """Whether there may be news: False when time is up, or the hub lets everybody go."""
        remaining_s = deadline - asyncio.get_running_loop().time()
        if remaining_s <= 0 or self._is_stopped:
            return False
        await waiter.wait(remaining_s)
        return not (self._is_stopped or waiter.is_released)

    @contextlib.contextmanager
    def _subscribed(self, held: dict[str, set[Waiter]], key: str) -> Iterator[Waiter]:
        """A waiter that is woken for `key` from now on."""
        waiter = Waiter(is_brief=self._is_draining())
        held.setdefault(key, set()).add(waiter)
        try:
            yield waiter
        finally:
            waiters = held[key]
            waiters.discard(waiter)
            if not waiters:
                del held[key]

    def _wake_all(self) -> None:
        for held in (self._waiters, self._pollers):
            for key in held:
                _wake(held, key)

    def _release_all(self) -> None:
        """Everybody who waits now is answered now; who comes later is held for a moment only."""
        for waiters in (*self._waiters.values(), *self._pollers.values()):
            for waiter in waiters:
                if not waiter.is_brief:
                    waiter.is_released = True
                    waiter.wake()

    async def _run(self) -> None:
        was_draining = False
        next_poll_at = 0.0
        while True:
            await asyncio.sleep(TICK_S)
            is_draining = self._is_draining()
            if is_draining and not was_draining:
                self._release_all()
            was_draining = is_draining
            now = asyncio.get_running_loop().time()
            if now < next_poll_at:
                continue
            next_poll_at = now + POLL_S
            try:
                await self.poll()
            except TreadleError as error:
                # The database is away; waiters get their 408 in time, and the next poll asks again.
                log.warning("results could not be polled", reason=error.message)
            except Exception as error:  # noqa: BLE001 (a listed boundary: without the poll, waiters of other processes hang)
                log.error("polling results failed unexpectedly", exc=error)
                self._metrics.caught_errors.labels(boundary="sweep").inc()

    async def poll(self) -> None:
        """One look at the truth: wake whose request is final, and note what was delivered and who is there."""
        beats, self._beats = self._beats, set()
        if beats:
            await self._store.sessions.touch(sorted(beats))
        delivered, self._delivered = self._delivered, set()
        if delivered:
            await self._store.requests.mark_delivered(sorted(delivered))
        if self._waiters:
            states = await self._store.requests.futures_state([RequestId(key) for key in self._waiters])
            for request_id, state in states.items():
                if state is not RequestState.QUEUED:
                    _wake(self._waiters, request_id)
        if self._pollers:
            await self._poll_positions()

    async def _poll_positions(self) -> None:
        """Wake the pollers of sampling sessions that moved since the last poll, and those seen for the first time."""
        before = self._positions
        self._positions = await self._store.sampling.newest_positions([SamplingSessionId(key) for key in self._pollers])
        for sampling_session_id, position in self._positions.items():
            if before.get(sampling_session_id) != position:
                _wake(self._pollers, sampling_session_id)


def _wake(held: dict[str, set[Waiter]], key: str) -> None:
    for waiter in held.get(key, ()):
        waiter.wake()
