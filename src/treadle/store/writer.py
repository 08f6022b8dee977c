"""The one writer of a store: group commit.

Writes are small functions on a connection. The writer takes everything that waits, runs it in one transaction, commits
once and answers the callers; while the disk flushes, the next group gathers. It refuses to know what is written.
Invariants: a caller is answered only after its write is durable; a write that fails takes nobody else down; writes
are applied in the order they came.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from treadle.domain.limits import MAX_PENDING_WRITES, MAX_WRITES_PER_COMMIT
from treadle.errors import StoreUnavailable
from treadle.store.dialect import Dialect
from treadle.store.engine import Database, translate

I = TypeVar("I")  # noqa: E741 (an item)
T = TypeVar("T")

# A write that only another process's write at the same time made fail is tried so often in all.
_MAX_TRIES = 5

BatchWrite: TypeAlias = Callable[[sa.Connection, Sequence[I]], Sequence[T]]
"""Writes many items at once and returns one value per item, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    write: BatchWrite[Any, Any]
    item: Any
    after_commit: Callable[[Any], None] | None
    answer: asyncio.Future[Any]
    dialect: Dialect

    def resolve(self, value: Any) -> None:
        if self.after_commit is not None:
            # Through the loop, which reports one that raises: it must not end the writer.
            self.answer.get_loop().call_soon(self.after_commit, value)
        # The caller may have been cancelled meanwhile; its write stands.
        if not self.answer.done():
            self.answer.set_result(value)

    def reject(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(translate(error, self.dialect) if isinstance(error, SQLAlchemyError) else error)


class Writer:
    """Runs in a task of its own from construction until `close`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pending: deque[_Pending] = deque()
        self._has_work = asyncio.Event()
        self._is_closing = False
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
        pending = _Pending(write, item, after_commit, answer, self._database.dialect)
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
        must_isolate = False

        def apply(conn: sa.Connection) -> list[Any]:
            nonlocal must_isolate
            try:
                return _apply(conn, group)
            except Exception:
                must_isolate = len(group) > 1
                raise

        try:
            values = await self._database.write(apply)
        except Exception as error:  # noqa: BLE001 (handed to the callers whose writes failed)
            if must_isolate:
                for pending in group:
                    await self._commit([pending])
            elif self._database.dialect.is_conflict(error) and num_tries < _MAX_TRIES:
                await self._commit(group, num_tries=num_tries + 1)
            else:
                # Alone, or the database itself failed: to repeat every write would wait for it once per write.
                for pending in group:
                    pending.reject(error)
            return
        for pending, value in zip(group, values, strict=True):
            pending.resolve(value)


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
