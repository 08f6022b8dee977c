"""An executor whose worker is a child process of this server, joined by a pipe.

Two threads own the pipe's ends, so the event loop never blocks on it: one sends in order, one receives and
hands messages to the loop. The child dies with the pipe; a child that dies on its own is reported once. One that has
work and is silent for too long hangs: it is killed, which is a death like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple, assert_never

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.limits import HANG_AFTER_S, HANG_FACTOR, PROGRESS_EVERY_S
from treadle.domain.outcome import CycleOutcome, PoolFacts, SnapshotWritten
from treadle.domain.plan import CycleWork, SampleWork, StateTag
from treadle.errors import ConfigError, Fenced, ServerError, TreadleError, WorkerDied
from treadle.executor.base import DeathCallback, PartsCallback, SamplesCallback
from treadle.executor.hangs import Silence
from treadle.executor.messages import (
    CallDone,
    CancelSamples,
    CycleDone,
    CycleRefused,
    Evict,
    FromWorker,
    Loaded,
    LoadFailed,
    Progress,
    RunCycle,
    SamplesDone,
    SamplesGrew,
    Snapshot,
    Stop,
    SubmitSamples,
    ToWorker,
    WorkerConfig,
)
from treadle.executor.spare import WORKER_COMMAND, Spare, StartedProcess, start_process
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

Value = TypeVar("Value")
Args = TypeVarTuple("Args")

# How long a worker may take to leave after Stop before it is killed.
STOP_TIMEOUT_S = 10.0
# A spare's imports take seconds of a core, which a worker that was just started needs for what it has to make up for.
SPARE_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class _WaitingCycle:
    outcome: asyncio.Future[CycleOutcome]
    predicted_s: float


class LocalExecutor:
    """One worker process. `start` may be called once; after a death make a new executor."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        spare: Spare | None = None,
        spare_after_s: float = SPARE_AFTER_S,
        hang_after_s: float = HANG_AFTER_S,
        on_parts: PartsCallback | None = None,
    ) -> None:
        self._config = config
        self._command = command
        self._spare = spare
        self._spare_after_s = spare_after_s
        self._spare_timer: asyncio.TimerHandle | None = None
        self._hang_after_s = hang_after_s
        self._on_parts = on_parts
        self._child: StartedProcess | None = None
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        self._loaded: asyncio.Future[PoolFacts] | None = None
        # By token and cycle number: one, and at a change of leaders the one that is being abandoned.
        self._cycles: dict[tuple[int, int], _WaitingCycle] = {}
        self._calls: dict[int, asyncio.Future[CallDone]] = {}
        self._call_ids = itertools.count(1)
        self._samples: set[RequestId] = set()
        self._silence = Silence(tick_s=self._tick_s)
        self._watching: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._hang_reason: str | None = None
        self._death_reason: str | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id, once started."""
        return None if self._child is None else self._child.process.pid

    def launch(self) -> None:
        """Start the process without waiting for its model; `start` then waits. Idempotent."""
        if self._child is not None:
            return
        spare = None if self._spare is None else self._spare.take(self._command)
        self._child = spare or start_process(self._command)
        log.info("worker launched", base_model=self._config.base_model, pid=self.pid, was_spare=spare is not None)
        # A spare that died a moment ago is found out by the receiving side.
        with contextlib.suppress(OSError):
            self._child.connection.send(self._config)

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
        facts = await self._loaded
        self._watching = asyncio.create_task(self._watch(), name="worker watch")
        if self._spare is not None:
            self._spare_timer = loop.call_later(self._spare_after_s, self._spare.prepare, self._command)
        return facts

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        """See Executor.run_cycle."""
        assert all(token != work.token for token, _ in self._cycles), "one cycle of a leader at a time"
        self._check_alive()
        waiting = _WaitingCycle(asyncio.get_running_loop().create_future(), work.predicted_s)
        self._cycles[work.token, work.cycle] = waiting
        self._outbox.put(RunCycle(work))
        try:
            return await waiting.outcome
        finally:
            del self._cycles[work.token, work.cycle]

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        """See Executor.submit_samples."""
        self._check_alive()
        self._samples.update(sample.request_id for sample in samples)
        self._outbox.put(SubmitSamples(tuple(samples)))

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """See Executor.cancel_samples."""
        self._samples.difference_update(request_ids)
        self._outbox.put(CancelSamples(tuple(request_ids)))

    async def snapshot(
        self, targets: Sequence[tuple[StateTag, str]], *, with_open_gradient: bool = False
    ) -> dict[ModelId, SnapshotWritten]:
        """See Executor.snapshot."""
        call_id = next(self._call_ids)
        done = await self._call(call_id, Snapshot(call_id, tuple(targets), with_open_gradient))
        return dict(done.written)

    async def evict(self, model_ids: Sequence[ModelId]) -> None:
        """See Executor.evict."""
        call_id = next(self._call_ids)
        await self._call(call_id, Evict(call_id=call_id, model_ids=tuple(model_ids)))

    async def stop(self) -> None:
        """See Executor.stop."""
        self._is_stopping = True
        self._cancel_timers()
        if self._child is None:
            return
        process = self._child.process
        self._outbox.put(Stop())
        self._outbox.put(None)
        if not self._has_loaded:
            process.kill()  # still loading: nothing in it is worth waiting for
        await asyncio.to_thread(_wait_or_kill, process)

    def _cancel_timers(self) -> None:
        for timer in (self._watching, self._spare_timer):
            if timer is not None:
                timer.cancel()

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

    @property
    def _tick_s(self) -> float:
        return min(PROGRESS_EVERY_S, self._hang_after_s / 4)

    async def _watch(self) -> None:
        """Kill the worker when it hangs."""
        now = asyncio.get_running_loop().time
        while self._death_reason is None and self._hang_reason is None:
            await asyncio.sleep(self._tick_s)
            self._silence.tick(now(), has_work=bool(self._cycles or self._calls or self._samples))
            predicted_s = max((waiting.predicted_s for waiting in self._cycles.values()), default=0.0)
            if self._silence.seconds < max(self._hang_after_s, HANG_FACTOR * predicted_s):
                continue
            self._hang_reason = f"the worker process hung: no progress for {self._silence.seconds:.0f} s"
            log.error("worker hung", base_model=self._config.base_model, silent_s=self._silence.seconds)
            assert self._child is not None
            self._child.process.kill()

    def _send_forever(self) -> None:
        assert self._child is not None
        while (message := self._outbox.get()) is not None:
            try:
                self._child.connection.send(message)
            except OSError:
                return  # the receiving side reports the death

    def _receive_forever(
        self, loop: asyncio.AbstractEventLoop, on_samples: SamplesCallback, on_death: DeathCallback
    ) -> None:
        assert self._child is not None
        while True:
            try:
                message: FromWorker = self._child.connection.recv()
            except (EOFError, OSError):
                break
            _call_soon(loop, self._dispatch, message, on_samples)
        status = self._child.process.wait()
        _call_soon(loop, self._ended, status, on_death)

    def _dispatch(self, message: FromWorker, on_samples: SamplesCallback) -> None:
        self._silence.heard()
        match message:
            case Loaded(facts=facts):
                _resolve(self._loaded, facts)
            case LoadFailed(message=text, is_config=is_config):
                _reject(self._loaded, ConfigError(text) if is_config else ServerError(text))
            case CycleDone(outcome=outcome):
                _resolve(self._outcome_future(outcome.token, outcome.cycle), outcome)
            case CycleRefused(token=token, cycle=cycle, message=text):
                _reject(self._outcome_future(token, cycle), Fenced(text))
            case SamplesDone(outcomes=outcomes):
                self._samples.difference_update(outcome.request_id for outcome in outcomes)
                on_samples(outcomes)
            case SamplesGrew(parts=parts):
                if self._on_parts is not None:
                    self._on_parts(parts)
            case CallDone(call_id=call_id):
                _resolve(self._calls.get(call_id), message)
            case Progress():
                pass
            case _:
                assert_never(message)

    def _outcome_future(self, token: int, cycle: int) -> asyncio.Future[CycleOutcome] | None:
        waiting = self._cycles.get((token, cycle))
        return None if waiting is None else waiting.outcome

    def _ended(self, status: int, on_death: DeathCallback) -> None:
        """The process is gone: fail what waits for it, and tell the owner unless it was asked to go."""
        reason = self._hang_reason or f"the worker process ended with status {status}"
        self._death_reason = reason
        self._outbox.put(None)
        self._cancel_timers()
        waiting = [self._loaded, *(one.outcome for one in self._cycles.values()), *self._calls.values()]
        was_loaded = self._has_loaded
        for future in waiting:
            _reject(future, WorkerDied(reason))
        if was_loaded and not self._is_stopping:
            log.error("worker died", base_model=self._config.base_model, status=status, reason=reason)
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
