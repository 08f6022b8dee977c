"""The operators' decisions as this process knows them, never older than a moment.

Asking costs nothing. A task looks at the version a few times a second and reads the picture when that moved. It
refuses to know what anybody does about it. Invariant: while the database answers, a decision that was committed
anywhere is seen here within a second; while it does not, the last picture stays.
"""

from __future__ import annotations

import asyncio
import contextlib

from treadle.domain.policy import Policies
from treadle.errors import TreadleError
from treadle.store.store import Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

LOOK_EVERY_S = 0.4


class PolicyWatch:
    """Looks between `start` and `stop`, on the event loop of its store."""

    def __init__(self, store: Store, *, every_s: float = LOOK_EVERY_S) -> None:
        self._store = store
        self._every_s = every_s
        self._now = Policies()
        self._task: asyncio.Task[None] | None = None
        self._is_away = False

    @property
    def now(self) -> Policies:
        """The newest picture that this process has."""
        return self._now

    async def start(self) -> None:
        """Read the first picture and go on looking. Called once. Raises StoreUnavailable."""
        assert self._task is None, "started twice"
        await self.refresh()
        self._task = asyncio.create_task(self._run(), name="policy-watch")

    async def stop(self) -> None:
        """Stop looking. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def refresh(self) -> Policies:
        """The picture as it stands in the store now. Raises StoreUnavailable."""
        found = await self._store.policies.read()
        if found.version >= self._now.version:
            self._now = found
        return self._now

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                if await self._store.policies.version() != self._now.version:
                    await self.refresh()
                self._is_away = False
            except TreadleError as error:
                if not self._is_away:
                    log.warning("policies not read", reason=error.message)
                self._is_away = True
