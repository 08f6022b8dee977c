"""The one writer of a store: group commit.

Writes are small functions on a connection. The writer takes everything that waits, runs it in one transaction, commits
once and answers the callers; while the disk flushes, the next group gathers. It refuses to know what is written.
Invariants: a caller is answered only after its write is durable; a write that fails takes nobody else down; writes
are applied in the order they came.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from treadle.domain.limits import MAX_PENDING_WRITES, MAX_WRITES_PER_COMMIT
from treadle.errors import StoreUnavailable
from treadle.store.engine import Database, Outage

I = TypeVar("I")  # noqa: E741 (an item)
T = TypeVar("T")

# A write that only another process's write at the same time made fail is tried so often in all.
_MAX_TRIES = 5

BatchWrite: TypeAlias = Callable[[sa.Connection, Sequence[I]], Sequence[T]]
"""Writes many items at once and returns one value per item, in order."""


@dataclass(frozen=True, slots=True)
class CommitReport:
    """One transaction: how many writes it took together, how long it took, whether it is durable."""

    num_writes: int
    seconds: float
    is_durable: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    write: BatchWrite[Any, Any]
    item: Any
    after_commit: Callable[[Any], None] | None
    answer: asyncio.Future[Any]

    def resolve(self, value: Any) -> None:
        if self.after_commit is not None:
            # Through the loop, which reports one that raises: it must not end the writer.
            self.answer.get_loop().call_soon(self.after_commit, value)
        # The caller may have been cancelled meanwhile; its write stands.
        if not self.answer.done():
            self.answer.set_result(value)

    def reject(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Writer:
    """Runs in a task of its own from construction until `close`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pending: deque[_Pending] = deque()
        self._has_work = asyncio.Event()
        self._is_closing = False
        self._outage = Outage(database.dialect, "writes")
        # Called on the event loop behind each transaction.
        self.on_commit: Callable[[CommitReport], None] = lambda _: None
        self._task = asyncio.create_task(self._run(), name="store-writer")

    async def run(self, write: Callable[[sa.Connection], T], *, after_commit: Callable[[T], None] | None = None) -> T:
        """What `write` returned, once it is durable. It may run twice, so it must only touch the database.

        after_commit is called with that value before the caller goes on, and even when the caller was cancelled.
        Raises what `write` raises, with nothing of it written, and StoreUnavailable when too many writes wait.
        """
        result: T = await self._submit(_run_each, write, after_commit)
        return result

    async def run_batched(
        self, write: BatchWrite[I, T], item: I, *, after_commit: Callable[[T], None] | None = None
    ) -> T:
        """Like `run`, for a write that handles neighbours of its kind in one call: what it returned for `item`."""
        result: T = await self._submit(write, item, after_commit)
        return result

    @property
    def num_pending(self) -> int:
        """Writes that wait for the next transaction."""
        return len(self._pending)

    async def close(self) -> None:
        """Commit what waits, then stop. Idempotent."""
        self._is_closing = True
        self._has_work.set()
        await self._task

    def _submit(
        self, write: BatchWrite[Any, Any], item: Any, after_commit: Callable[[Any], None] | None
    ) -> asyncio.Future[Any]:
        if self._is_closing:
            raise StoreUnavailable("the store is closed")
        if len(self._pending) >= MAX_PENDING_WRITES:
            raise StoreUnavailable(f"the database is behind: {MAX_PENDING_WRITES} writes are waiting")
        answer = asyncio.get_running_loop().create_future()
        pending = _Pending(write, item, after_commit, answer)
        self._pending.append(pending)
        self._has_work.set()
        return pending.answer

    async def _run(self) -> None:
        while self._pending or not self._is_closing:
            if not self._pending:
                self._has_work.clear()
                await self._has_work.wait()
                continue
            count = min(len(self._pending), MAX_WRITES_PER_COMMIT)
            await self._commit([self._pending.popleft() for _ in range(count)])

    async def _commit(self, group: Sequence[_Pending], *, num_tries: int = 1) -> None:
        """Commit the group as one; when a write of it fails, each of them alone."""
        is_applied = False

        def apply(conn: sa.Connection) -> list[Any]:
            nonlocal is_applied
            is_applied = False
            answers = _apply(conn, group)
            is_applied = True
            return answers

        began = time.perf_counter()
        try:
            values = await self._database.write(apply)
        except Exception as error:  # noqa: BLE001 (handed to the callers whose writes failed)
            self.on_commit(CommitReport(len(group), time.perf_counter() - began, is_durable=False))
            if num_tries < _MAX_TRIES and self._may_pass(error, is_applied=is_applied):
                await self._commit(group, num_tries=num_tries + 1)
            elif len(group) > 1 and not is_applied and self._database.dialect.outage(error) is None:
                # In front of what came meanwhile, and with it when an outage comes in between.
                self._pending.extendleft(reversed(group))
                for _ in range(len(group)):
                    if self._pending:
                        await self._commit([self._pending.popleft()])
            else:
                self._reject(group, error)
            return
        self._outage.is_over()
        self.on_commit(CommitReport(len(group), time.perf_counter() - began, is_durable=True))
        for pending, value in zip(group, values, strict=True):
            pending.resolve(value)

    def _may_pass(self, error: Exception, *, is_applied: bool) -> bool:
        """Whether the same writes may succeed right now: another one was in the way, or the connection was lost.

        Not one that was lost in the commit, which may have come through: that is for the callers to find out.
        """
        is_lost = isinstance(error, DBAPIError) and error.connection_invalidated and not is_applied
        return is_lost or self._database.dialect.is_conflict(error)

    def _reject(self, group: Sequence[_Pending], error: Exception) -> None:
        """Tell the callers. In an outage also those whose writes wait: each group would wait for the database again."""
        if isinstance(error, SQLAlchemyError | StoreUnavailable):
            error = self._outage.translated(error)
        if not isinstance(error, StoreUnavailable):
            for pending in group:
                pending.reject(error)
            return
        waiting = [*group, *self._pending]
        self._pending.clear()
        for pending in waiting:
            # One for each: whoever raises it adds its own traceback.
            pending.reject(StoreUnavailable(error.message))


def _apply(conn: sa.Connection, group: Sequence[_Pending]) -> list[Any]:
    values: list[Any] = []
    for write, neighbours in groupby(group, key=lambda pending: pending.write):
        items = [pending.item for pending in neighbours]
        answers = write(conn, items)
        assert len(answers) == len(items), "a batched write answers every item"
        values.extend(answers)
    return values


def _run_each(conn: sa.Connection, writes: Sequence[Callable[[sa.Connection], Any]]) -> list[Any]:
    return [write(conn) for write in writes]
