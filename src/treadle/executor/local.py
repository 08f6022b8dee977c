"""An executor whose worker is a child process of this server, joined by a pipe.

Two threads own the pipe's ends, so the event loop never blocks on it: one sends in order, one receives and
hands messages to the loop. The child dies with the pipe; a child that dies on its own is reported once.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar, TypeVarTuple, assert_never

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.outcome import CycleOutcome, PoolFacts
from treadle.domain.plan import CycleWork, SampleWork, StateTag
from treadle.errors import ConfigError, Fenced, ServerError, TreadleError, WorkerDied
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.messages import (
    CallDone,
    CancelSamples,
    CycleDone,
    CycleRefused,
    Evict,
    FromWorker,
    Loaded,
    LoadFailed,
    RunCycle,
    SamplesDone,
    Snapshot,
    Stop,
    SubmitSamples,
    ToWorker,
    WorkerConfig,
)
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

Value = TypeVar("Value")
Args = TypeVarTuple("Args")

# How long a worker may take to leave after Stop before it is killed.
STOP_TIMEOUT_S = 10.0
# What is started as a worker, followed by the number of its end of the pipe.
WORKER_COMMAND = (sys.executable, "-m", "treadle.executor.child")


class LocalExecutor:
    """One worker process. `start` may be called once; after a death make a new executor."""

    def __init__(self, config: WorkerConfig, *, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._config = config
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        self._loaded: asyncio.Future[PoolFacts] | None = None
        self._cycle: asyncio.Future[CycleOutcome] | None = None
        self._calls: dict[int, asyncio.Future[CallDone]] = {}
        self._call_ids = itertools.count(1)
        self._is_stopping = False
        self._death_reason: str | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id, once started."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Start the process without waiting for its model; `start` then waits. Idempotent."""
        if self._process is not None:
            return
        ours, theirs = Pipe(duplex=True)
        # A session of its own: Ctrl-C reaches the server only, which then drains before it stops the worker.
        self._process = subprocess.Popen(
            [*self._command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._connection = ours
        ours.send(self._config)

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        """See Executor.start."""
        assert self._loaded is None, "an executor starts once"
        self.launch()
        loop = asyncio.get_running_loop()
        self._loaded = loop.create_future()
        threading.Thread(target=self._send_forever, name="treadle-worker-send", daemon=True).start()
        threading.Thread(
            target=self._receive_forever,
            args=(loop, on_samples, on_death),
            name="treadle-worker-receive",
            daemon=True,
        ).start()
        return await self._loaded

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        """See Executor.run_cycle."""
        assert self._cycle is None, "a worker runs one cycle at a time"
        self._check_alive()
        self._cycle = asyncio.get_running_loop().create_future()
        self._outbox.put(RunCycle(work))
        try:
            return await self._cycle
        finally:
            self._cycle = None

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        """See Executor.submit_samples."""
        self._check_alive()
        self._outbox.put(SubmitSamples(tuple(samples)))

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """See Executor.cancel_samples."""
        self._outbox.put(CancelSamples(tuple(request_ids)))

    async def snapshot(self, targets: Sequence[tuple[StateTag, str]]) -> dict[ModelId, int]:
        """See Executor.snapshot."""
        call_id = next(self._call_ids)
        done = await self._call(call_id, Snapshot(call_id=call_id, targets=tuple(targets)))
        return dict(done.num_bytes)

    async def evict(self, model_ids: Sequence[ModelId]) -> None:
        """See Executor.evict."""
        call_id = next(self._call_ids)
        await self._call(call_id, Evict(call_id=call_id, model_ids=tuple(model_ids)))

    async def stop(self) -> None:
        """See Executor.stop."""
        self._is_stopping = True
        process = self._process
        if process is None:
            return
        self._outbox.put(Stop())
        self._outbox.put(None)
        if not self._has_loaded:
            process.kill()  # still loading: nothing in it is worth waiting for
        await asyncio.to_thread(_wait_or_kill, process)

    @property
    def _has_loaded(self) -> bool:
        # Whoever waited for the model may have been cancelled, and the future with it.
        loaded = self._loaded
        return loaded is not None and loaded.done() and not loaded.cancelled() and loaded.exception() is None

    def _check_alive(self) -> None:
        if self._death_reason is not None:
            raise WorkerDied(self._death_reason)

    async def _call(self, call_id: int, message: ToWorker) -> CallDone:
        self._check_alive()
        future: asyncio.Future[CallDone] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        self._outbox.put(message)
        try:
            return await future
        finally:
            del self._calls[call_id]

    def _send_forever(self) -> None:
        assert self._connection is not None
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                return  # the receiving side reports the death

    def _receive_forever(
        self, loop: asyncio.AbstractEventLoop, on_samples: SamplesCallback, on_death: DeathCallback
    ) -> None:
        assert self._connection is not None
        while True:
            try:
                message: FromWorker = self._connection.recv()
            except (EOFError, OSError):
                break
            _call_soon(loop, self._dispatch, message, on_samples)
        assert self._process is not None
        status = self._process.wait()
        _call_soon(loop, self._ended, status, on_death)

    def _dispatch(self, message: FromWorker, on_samples: SamplesCallback) -> None:
        match message:
            case Loaded(facts=facts):
                _resolve(self._loaded, facts)
            case LoadFailed(message=text, is_config=is_config):
                _reject(self._loaded, ConfigError(text) if is_config else ServerError(text))
            case CycleDone(outcome=outcome):
                _resolve(self._cycle, outcome)
            case CycleRefused(message=text):
                _reject(self._cycle, Fenced(text))
            case SamplesDone(outcomes=outcomes):
                on_samples(outcomes)
            case CallDone(call_id=call_id):
                _resolve(self._calls.get(call_id), message)
            case _:
                assert_never(message)

    def _ended(self, status: int, on_death: DeathCallback) -> None:
        """The process is gone: fail what waits for it, and tell the owner unless it was asked to go."""
        reason = f"the worker process ended with status {status}"
        self._death_reason = reason
        self._outbox.put(None)
        waiting = [self._loaded, self._cycle, *self._calls.values()]
        was_loaded = self._has_loaded
        for future in waiting:
            _reject(future, WorkerDied(reason))
        if was_loaded and not self._is_stopping:
            log.error("worker died", base_model=self._config.base_model, status=status)
            on_death(reason)


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[*Args], object], *args: *Args) -> None:
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        return  # the loop is closed: nobody is left to tell


def _resolve(future: asyncio.Future[Value] | None, value: Value) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _reject(future: asyncio.Future[Any] | None, error: TreadleError) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
