"""The operators' decisions about pools as this process knows them, never older than a moment.

Asking costs nothing. A task looks at the version a few times a second, and at once when a pool is said to have changed;
whoever listens is called behind each change. It refuses to know what anybody does about it. Invariant: while the
database answers, a decision that was committed anywhere is seen here within a second; while it does not, the last
picture stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from treadle.domain.ids import PoolName
from treadle.domain.pool_decisions import PoolDecisions
from treadle.errors import TreadleError
from treadle.store.policy_watch import LOOK_EVERY_S
from treadle.store.store import Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)


class PoolWatch:
    """Looks between `start` and `stop`, on the event loop of its store."""

    def __init__(self, store: Store, *, every_s: float = LOOK_EVERY_S) -> None:
        self._store = store
        self._every_s = every_s
        self._now = PoolDecisions()
        self._hint = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._is_away = False

    @property
    def now(self) -> PoolDecisions:
        """The newest picture that this process has."""
        return self._now

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call back, on the event loop, when `now` has become another one."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Read the first picture and go on looking. Called once. Raises StoreUnavailable."""
        assert self._task is None, "started twice"
        await self.refresh()
        self._task = asyncio.create_task(self._run(), name="pool-watch")

    async def stop(self) -> None:
        """Stop looking. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def refresh(self) -> PoolDecisions:
        """The picture as it stands in the store now. Raises StoreUnavailable."""
        found = await self._store.pool_settings.read()
        if found.version > self._now.version:
            self._now = found
            for listener in self._listeners:
                listener()
        return self._now

    async def _run(self) -> None:
        unsubscribe = self._store.events.on_pool_changed(self._note_hint)
        try:
            while True:
                await self._wait()
                try:
                    if await self._store.pool_settings.version() != self._now.version:
                        await self.refresh()
                    self._is_away = False
                except TreadleError as error:
                    if not self._is_away:
                        log.warning("decisions about pools not read", reason=error.message)
                    self._is_away = True
        finally:
            unsubscribe()

    def _note_hint(self, _pool: PoolName) -> None:
        self._hint.set()

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._every_s):
                await self._hint.wait()
        self._hint.clear()
