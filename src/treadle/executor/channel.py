"""What a server does with one worker that it exchanges messages with, whatever carries them.

Two threads own the transport, so the event loop never blocks on it: one sends in order, one receives and hands messages
to the loop. A worker that ends on its own is reported once. One that has work and is silent for too long hangs: it is
killed, which is a death like any other. It refuses to know how messages travel and what the work means.
Invariant: whatever waits for the worker ends, with its answer or with WorkerDied, and nothing ends twice.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, TypeVarTuple, assert_never

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.limits import HANG_AFTER_S, HANG_FACTOR, PROGRESS_EVERY_S
from treadle.domain.outcome import CycleOutcome, PoolFacts, SnapshotWritten, WorkerVitals
from treadle.domain.plan import CycleWork, SampleWork, StateTag
from treadle.domain.roles import Role
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
)
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

Value = TypeVar("Value")
Args = TypeVarTuple("Args")

# How long a worker may take to leave after Stop before it is killed.
STOP_TIMEOUT_S = 10.0


class Transport(Protocol):
    """One started worker, and the way there and back. Each method may be called from any thread."""

    def send(self, message: ToWorker) -> None:
        """Hand over one message; in the order of the calls, which come from one thread. Raises OSError when that is
        not possible any more; then `receive` ends as well."""
        ...

    def receive(self) -> FromWorker:
        """The next message, once there is one. Raises EOFError or OSError when no more will come."""
        ...

    def kill(self) -> None:
        """End the worker at once, whatever it does. Idempotent."""
        ...

    def wait(self, timeout_s: float | None = None) -> str | None:
        """How the worker ended, as a sentence without a full stop; None: it still lives after timeout_s."""
        ...


class SamplingChannel(ABC):
    """A SamplingExecutor over a transport. `start` may be called once; after a death make a new one.

    name: of the slot, for logs. hang_after_s: how long it may be silent with work at hand.
    """

    def __init__(
        self,
        *,
        role: Role,
        name: str,
        hang_after_s: float = HANG_AFTER_S,
        on_parts: PartsCallback | None = None,
    ) -> None:
        self.role = role
        self.name = name
        # What the worker said last; None from one that does not say.
        self.vitals: WorkerVitals | None = None
        self._hang_after_s = hang_after_s
        self._on_parts = on_parts
        self._transport: Transport | None = None
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        self._loaded: asyncio.Future[PoolFacts] | None = None
        self._samples: set[RequestId] = set()
        self._silence = Silence(tick_s=self._tick_s)
        self._watching: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._hang_reason: str | None = None
        self._death_reason: str | None = None

    @property
    def is_over(self) -> bool:
        """It died, or was told to stop."""
        return self._is_stopping or self._death_reason is not None

    @abstractmethod
    def _open(self) -> Transport:
        """Start the worker, without waiting for its model and without blocking; called once."""

    def launch(self) -> None:
        """Start the worker without waiting for its model; `start` then waits. Idempotent."""
        if self._transport is None:
            self._transport = self._open()

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        """See SamplingExecutor.start."""
        assert self._loaded is None, "an executor starts once"
        self.launch()
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._loaded = loop.create_future()
        threading.Thread(
            target=self._send_forever, args=(self._transport,), name="treadle-worker-send", daemon=True
        ).start()
        threading.Thread(
            target=self._receive_forever,
            args=(self._transport, loop, on_samples, on_death),
            name="treadle-worker-receive",
            daemon=True,
        ).start()
        facts = await self._loaded
        self._watching = asyncio.create_task(self._watch(self._transport), name="worker watch")
        return facts

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        """See SamplingExecutor.submit_samples."""
        self._check_alive()
        self._samples.update(sample.request_id for sample in samples)
        self._outbox.put(SubmitSamples(tuple(samples)))

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """See SamplingExecutor.cancel_samples."""
        self._samples.difference_update(request_ids)
        self._outbox.put(CancelSamples(tuple(request_ids)))

    async def stop(self) -> None:
        """See SamplingExecutor.stop."""
        self._is_stopping = True
        self._cancel_timers()
        if self._transport is None:
            return
        self._outbox.put(Stop())
        self._outbox.put(None)
        # Still loading: nothing in it is worth waiting for.
        await asyncio.to_thread(_end, self._transport, STOP_TIMEOUT_S if self._has_loaded else 0.0)

    def _cancel_timers(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    @property
    def _has_loaded(self) -> bool:
        # Whoever waited for the model may have been cancelled, and the future with it.
        loaded = self._loaded
        return loaded is not None and loaded.done() and not loaded.cancelled() and loaded.exception() is None

    def _check_alive(self) -> None:
        if self._death_reason is not None:
            raise WorkerDied(self._death_reason)

    @property
    def _tick_s(self) -> float:
        return min(PROGRESS_EVERY_S, self._hang_after_s / 4)

    @property
    def _has_work(self) -> bool:
        return bool(self._samples)

    @property
    def _allowed_silence_s(self) -> float:
        return self._hang_after_s

    def _waiting(self) -> list[asyncio.Future[Any]]:
        """What must end when the worker does."""
        return [] if self._loaded is None else [self._loaded]

    async def _watch(self, transport: Transport) -> None:
        """Kill the worker when it hangs."""
        now = asyncio.get_running_loop().time
        while self._death_reason is None and self._hang_reason is None:
            await asyncio.sleep(self._tick_s)
            self._silence.tick(now(), has_work=self._has_work)
            if self._silence.seconds < self._allowed_silence_s:
                continue
            self._hang_reason = f"the worker process hung: no progress for {self._silence.seconds:.0f} s"
            log.error("worker hung", worker=self.name, silent_s=self._silence.seconds)
            # Another thread's: a transport may have to ask somebody far away.
            threading.Thread(target=transport.kill, name="treadle-worker-kill", daemon=True).start()

    def _send_forever(self, transport: Transport) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                transport.send(message)
            except OSError:
                return  # the receiving side reports the death

    def _receive_forever(
        self,
        transport: Transport,
        loop: asyncio.AbstractEventLoop,
        on_samples: SamplesCallback,
        on_death: DeathCallback,
    ) -> None:
        while True:
            try:
                message = transport.receive()
            except (EOFError, OSError):
                break
            _call_soon(loop, self._take, message, on_samples)
        reason = transport.wait()
        _call_soon(loop, self._ended, reason or "the worker ended", on_death)

    def _take(self, message: FromWorker, on_samples: SamplesCallback) -> None:
        self._silence.heard()
        match message:
            case Loaded(facts=facts):
                resolve(self._loaded, facts)
            case LoadFailed(message=text, is_config=is_config):
                reject(self._loaded, ConfigError(text) if is_config else ServerError(text))
            case SamplesDone(outcomes=outcomes):
                self._samples.difference_update(outcome.request_id for outcome in outcomes)
                on_samples(outcomes)
            case SamplesGrew(parts=parts):
                if self._on_parts is not None:
                    self._on_parts(parts)
            case Progress(vitals=vitals):
                self.vitals = vitals or self.vitals
            case CycleDone() | CycleRefused() | CallDone():
                self._take_answer(message)
            case _:
                assert_never(message)

    def _take_answer(self, message: CycleDone | CycleRefused | CallDone) -> None:
        """An answer to what only a worker that trains is asked."""
        raise AssertionError(f"a sampler was not asked for {message!r}")

    def _ended(self, reason: str, on_death: DeathCallback) -> None:
        """The worker is gone: fail what waits for it, and tell the owner unless it was asked to go."""
        self._death_reason = reason = self._hang_reason or reason
        self._outbox.put(None)
        self._cancel_timers()
        was_loaded = self._has_loaded
        for future in self._waiting():
            reject(future, WorkerDied(reason))
        if was_loaded and not self._is_stopping:
            log.error("worker died", worker=self.name, reason=reason)
            on_death(reason)


@dataclass(frozen=True, slots=True)
class _WaitingCycle:
    outcome: asyncio.Future[CycleOutcome]
    predicted_s: float


class Channel(SamplingChannel):
    """An Executor over a transport."""

    def __init__(
        self,
        *,
        role: Role,
        name: str,
        hang_after_s: float = HANG_AFTER_S,
        on_parts: PartsCallback | None = None,
    ) -> None:
        super().__init__(role=role, name=name, hang_after_s=hang_after_s, on_parts=on_parts)
        # By token and cycle number: one, and at a change of leaders the one that is being abandoned.
        self._cycles: dict[tuple[int, int], _WaitingCycle] = {}
        self._calls: dict[int, asyncio.Future[CallDone]] = {}
        self._call_ids = itertools.count(1)

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
    def _has_work(self) -> bool:
        return super()._has_work or bool(self._cycles or self._calls)

    @property
    def _allowed_silence_s(self) -> float:
        predicted_s = max((waiting.predicted_s for waiting in self._cycles.values()), default=0.0)
        return max(self._hang_after_s, HANG_FACTOR * predicted_s)

    def _waiting(self) -> list[asyncio.Future[Any]]:
        return [*super()._waiting(), *(one.outcome for one in self._cycles.values()), *self._calls.values()]

    def _take_answer(self, message: CycleDone | CycleRefused | CallDone) -> None:
        match message:
            case CycleDone(outcome=outcome):
                resolve(self._outcome_future(outcome.token, outcome.cycle), outcome)
            case CycleRefused(token=token, cycle=cycle, message=text):
                reject(self._outcome_future(token, cycle), Fenced(text))
            case CallDone(call_id=call_id):
                resolve(self._calls.get(call_id), message)

    def _outcome_future(self, token: int, cycle: int) -> asyncio.Future[CycleOutcome] | None:
        waiting = self._cycles.get((token, cycle))
        return None if waiting is None else waiting.outcome


def _end(transport: Transport, patience_s: float) -> None:
    if transport.wait(patience_s) is None:
        transport.kill()
        transport.wait()


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[*Args], object], *args: *Args) -> None:
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        return  # the loop is closed: nobody is left to tell


def resolve(future: asyncio.Future[Value] | None, value: Value) -> None:
    """Set the result of a future that somebody still waits for."""
    if future is not None and not future.done():
        future.set_result(value)


def reject(future: asyncio.Future[Any] | None, error: TreadleError) -> None:
    """The same with an error."""
    if future is not None and not future.done():
        future.set_exception(error)
