"""Threads that run queries: the event loop hands over functions, and gets their values back.

One hop per query, however many statements it has; under load a thread takes everything that waits and hands all values
back at once, so that a busy server pays for few hops. It refuses to know SQL.
Invariant: every function handed over is run, or its caller is told that the lanes are closed.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from treadle.errors import StoreUnavailable

C = TypeVar("C")
T = TypeVar("T")

# Functions run before the first of their values is handed back: enough to share the hop, few enough not to wait for.
_MAX_PER_TURN = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    work: Callable[[Any], Any]
    answer: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Done:
    job: _Job
    value: Any = None
    error: Exception | None = None


class Lanes(Generic[C]):
    """Some threads that serve one queue. Used from one event loop, which is the one that constructed it.

    call: runs a function on whatever a thread works with (a connection, say) and returns its value.
    """

    def __init__(self, name: str, *, count: int, max_waiting: int, call: Callable[[Callable[[C], Any]], Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._max_waiting = max_waiting
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, work: Callable[[C], T]) -> T:
        """What `work` returns. Raises what it raises, and StoreUnavailable when closed or too far behind."""
        if self._is_closed:
            raise StoreUnavailable("the store is closed")
        if self._jobs.qsize() >= self._max_waiting:
            raise StoreUnavailable(f"the database is behind: {self._max_waiting} queries are waiting")
        answer: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put(_Job(work, answer))
        return await answer

    async def close(self) -> None:
        """Run what waits, then end the threads. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _serve(self) -> None:
        while (jobs := self._next_jobs()) is not None:
            done = [self._run(job) for job in jobs if not job.answer.cancelled()]
            try:
                self._loop.call_soon_threadsafe(_hand_back, done)
            except RuntimeError:
                return  # the loop is closed: nobody is left to answer

    def _next_jobs(self) -> list[_Job] | None:
        """What waits, at least one job; None at the end."""
        job = self._jobs.get()
        if job is None:
            return None
        jobs = [job]
        while len(jobs) < _MAX_PER_TURN:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                # The end is this thread's next turn.
                self._jobs.put(None)
                break
            jobs.append(job)
        return jobs

    def _run(self, job: _Job) -> _Done:
        try:
            return _Done(job, value=self._call(job.work))
        except Exception as error:  # noqa: BLE001 (handed to the caller whose function failed)
            return _Done(job, error=error)


def _hand_back(done: Sequence[_Done]) -> None:
    for one in done:
        answer = one.job.answer
        # The caller may have been cancelled meanwhile.
        if answer.done():
            continue
        if one.error is not None:
            answer.set_exception(one.error)
        else:
            answer.set_result(one.value)
