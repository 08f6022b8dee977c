"""One worker of a pool, and its successors: started, fed, and replaced when it dies, until it is not wanted any more.

A slot is a place for a worker. What it had in hand when the worker died is restored by its own loop with the next one;
nobody on another slot waits for that. It refuses to know the lease and the other slots.
Invariant: at most one worker of a slot is fed at a time, and a worker is stopped before the slot says that it is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol, cast

from treadle.domain.ids import PoolName
from treadle.domain.outcome import PoolFacts
from treadle.domain.roles import Role, Scale
from treadle.errors import ConfigError, Fenced, ServerError, WorkerDied
from treadle.executor.base import DeathCallback, Executor, SamplingExecutor
from treadle.scheduler.cycle_loop import CycleLoop
from treadle.scheduler.quarantine import Quarantine
from treadle.scheduler.samplers import Sampler
from treadle.scheduler.sampling_loop import SamplingLoop
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# Pause before a dead worker is replaced: the first time at once, then doubling up to the last value.
RESTART_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0)
# A worker that lived this long, or ran a cycle, did not die of starting: the next one gets no pause again. What kills
# in a cycle is the quarantine's to find.
STEADY_S = 60.0
# Before a worker that could not be loaded is tried again beside others that could.
LOAD_PAUSES_S = (10.0, 30.0, 60.0, 300.0)
# A worker that leaves finishes its samples for so long; what is left then begins anew on another one.
LEAVE_PATIENCE_S = 120.0
LEAVE_POLL_S = 0.1


class SlotState(StrEnum):
    """LEAVING: it is up, and ends when its tenants have moved and its samples are done."""

    LOADING = "loading"
    UP = "up"
    LEAVING = "leaving"
    DOWN = "down"


class SlotOwner(Protocol):
    """What a slot tells its pool. Called on the event loop."""

    def slot_loading(self, slot: Slot) -> None:
        """A worker is being started."""

    def slot_up(self, slot: Slot, facts: PoolFacts) -> None:
        """Its worker has loaded."""

    def slot_down(self, slot: Slot, reason: str) -> None:
        """Its worker is gone; its loop has ended. reason: "" when it was told to."""

    def may_replace(self, slot: Slot, death: ServerError | ConfigError) -> bool:
        """Whether another worker may do better than one that could not be loaded, or died."""
        ...


class Slot:
    """A place for workers. `run` until `leave` or `drain`.

    cycles: its loop; None for one that only samples. role may change while it runs, between BOTH and TRAINING.
    """

    def __init__(
        self,
        *,
        pool: PoolName,
        index: int,
        role: Role,
        make_executor: Callable[[int, Role], SamplingExecutor],
        cycles: CycleLoop | None,
        samples: SamplingLoop,
        quarantine: Quarantine,
        metrics: Metrics,
        owner: SlotOwner,
        is_first: bool = False,
    ) -> None:
        """is_first: it was there when the lead began."""
        assert (cycles is None) == (role is Role.SAMPLING)
        self.index = index
        self.cycles = cycles
        self.quarantine = quarantine
        self.state = SlotState.LOADING
        self.reason = "the worker is loading its model"
        self.num_deaths = 0
        self.is_first = is_first
        # A worker of it has loaded at least once.
        self.has_loaded = False
        self._pool = pool
        self._role = role
        self._make_executor = make_executor
        self._samples = samples
        self._metrics = metrics
        self._owner = owner
        self._sampler: Sampler | None = None
        self._leaving = asyncio.Event()
        self._draining = asyncio.Event()
        quarantine.on_change(samples.wake)

    @property
    def name(self) -> str:
        """Within its pool: a number, behind an s when it only samples."""
        return slot_name(self.index, trains=self.trains)

    @property
    def trains(self) -> bool:
        return self.cycles is not None

    @property
    def role(self) -> Role:
        return self._role

    @role.setter
    def role(self, role: Role) -> None:
        assert (role is Role.SAMPLING) == (not self.trains), "what a worker can do does not change"
        self._role = role
        if self._sampler is not None:
            self._sampler.role = role

    @property
    def is_up(self) -> bool:
        """Its worker has loaded, and is wanted."""
        return self.state is SlotState.UP

    @property
    def is_leaving(self) -> bool:
        return self._leaving.is_set()

    def leave(self) -> None:
        """It is not wanted any more: take nothing new, and end when nothing is left. Idempotent.

        Its loop goes on, for the sake of those who move, until `end_cycles`.
        """
        self._leaving.set()
        if self._sampler is not None:
            self._sampler.is_leaving = True
        if self.state is SlotState.UP:
            self.state = SlotState.LEAVING

    def end_cycles(self) -> None:
        """Nobody lives here any more. Idempotent."""
        assert self.is_leaving
        if self.cycles is not None:
            self.cycles.stop()

    def drain(self) -> None:
        """Finish the cycle in flight, persist every run, stop the worker; `run` then returns. Idempotent."""
        self._draining.set()
        if self.cycles is not None:
            self.cycles.stop()

    @property
    def _is_ending(self) -> bool:
        return self._draining.is_set() or (self._leaving.is_set() and self.state is not SlotState.LEAVING)

    async def run(self) -> None:
        """One worker after another, for as long as the slot is wanted.

        Raises what ended the last one in a drain, what no other worker would do better with, and Fenced.
        """
        # A count that begins at 1 hides its first one from whoever looks at increases.
        self._metrics.worker_deaths.labels(self._pool, self.name)
        num_deaths = num_failed_loads = 0
        now = asyncio.get_running_loop().time
        while not self._is_ending:
            started_at, work_before, had_loaded = now(), self._work_done(), self.has_loaded
            try:
                await self._serve_one()
                return
            except (ServerError, ConfigError) as death:
                if isinstance(death, Fenced) or not self._owner.may_replace(self, death):
                    raise
                self._note_death(death)
                if self._draining.is_set() and self.trains:
                    raise  # nothing was persisted, which must not look like a clean end
                if now() - started_at > STEADY_S or self._work_done() > work_before:
                    num_deaths = 0
                pauses: tuple[float, ...] = RESTART_PAUSES_S
                num = num_deaths
                if not isinstance(death, WorkerDied) and not had_loaded:
                    pauses, num = LOAD_PAUSES_S, num_failed_loads
                    num_failed_loads += 1
                pause_s = pauses[min(num, len(pauses) - 1)]
                num_deaths += 1
                why = death.message
                log.warning("worker is replaced", pool=self._pool, slot=self.name, reason=why, pause_s=pause_s)
                await self._pause(pause_s)

    def _work_done(self) -> int:
        return 0 if self.cycles is None else self.cycles.num_finished

    def _note_death(self, death: ServerError | ConfigError) -> None:
        self._metrics.worker_deaths.labels(self._pool, self.name).inc()
        self.num_deaths += 1
        self._owner.slot_down(self, death.message)

    async def _pause(self, pause_s: float) -> None:
        """Wait, unless the slot ends."""
        ending = [asyncio.create_task(event.wait()) for event in (self._draining, self._leaving)]
        try:
            await asyncio.wait(ending, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ending:
                task.cancel()

    async def _serve_one(self) -> None:
        """Load a worker and feed it until the slot ends or the worker dies."""
        self.state, self.reason = SlotState.LOADING, "the worker is loading its model"
        self._owner.slot_loading(self)
        executor = self._make_executor(self.index, self._role)
        died: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_death(reason: str) -> None:
            if not died.done():
                died.set_exception(WorkerDied(reason))

        why = ""
        try:
            facts = await self._started(executor, on_death)
            if facts is None:
                return
            self.has_loaded = True
            self.quarantine.is_closed = False
            self.state, self.reason = SlotState.UP, ""
            self._owner.slot_up(self, facts)
            log.info(
                "worker ready",
                pool=self._pool,
                slot=self.name,
                role=self._role.value,
                revision=facts.revision,
                device=facts.device,
                dtype=facts.dtype,
            )
            await self._feed(executor, facts, died)
        except (ServerError, ConfigError) as error:
            why = error.message
            # No worker may ever load here again: what is suspected must not wait for one.
            self.quarantine.is_closed |= self.state is SlotState.LOADING
            raise
        finally:
            self._took_down(why)
            if not died.cancel():
                died.exception()  # one that came too late for `_feed` shows in what was asked of the worker then
            await executor.stop()
            self._owner.slot_down(self, why)

    def _took_down(self, why: str) -> None:
        """Nothing more goes to the worker."""
        self.state, self.reason = SlotState.DOWN, why
        if why and self.has_loaded:
            # It knows what was there, and that goes to others only behind this.
            if self.cycles is not None:
                self.cycles.note_death(why)
            else:
                self.quarantine.worker_died()
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            self._samples.detach(sampler)

    async def _started(self, executor: SamplingExecutor, on_death: DeathCallback) -> PoolFacts | None:
        """What the executor says once its model is loaded; None when the end of the slot came first."""
        name = self.name
        starting = asyncio.create_task(
            executor.start(on_samples=lambda outcomes: self._samples.on_samples(name, outcomes), on_death=on_death)
        )
        ending = [asyncio.create_task(event.wait()) for event in (self._draining, self._leaving)]
        either: set[asyncio.Task[Any]] = {starting, *ending}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return starting.result() if starting.done() else None
        finally:
            for task in either:
                task.cancel()
            await asyncio.gather(*either, return_exceptions=True)

    async def _feed(self, executor: SamplingExecutor, facts: PoolFacts, died: asyncio.Future[None]) -> None:
        """Feed the worker until the slot ends. A death, or an error of its loop, ends the loop before it is raised.

        The loop is told to end rather than cancelled: a commit on its way must not be torn from its consequences.
        """
        self._sampler = Sampler(self.name, self.index, self._role, executor, self.quarantine)
        self._samples.attach(self._sampler)
        if self.cycles is None:
            await self._until_ended(died)
            return
        # A slot that trains gets an executor that trains: see MakeExecutor.
        trainer = cast(Executor, executor)
        loop = asyncio.create_task(self.cycles.run(trainer, facts))
        ends: set[asyncio.Future[None]] = {loop, died}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            self.cycles.abandon()
            [ended] = await asyncio.gather(loop, return_exceptions=True)
            if died.done():
                died.result()
            if isinstance(ended, BaseException):
                raise ended
        finally:
            loop.cancel()
        await self.cycles.persist(trainer)
        if self._leaving.is_set():
            await self._finish_samples(died)

    async def _until_ended(self, died: asyncio.Future[None]) -> None:
        """Of a worker that only samples. Raises WorkerDied."""
        events = [asyncio.create_task(event.wait()) for event in (self._draining, self._leaving)]
        ends: set[asyncio.Future[Any]] = {*events, died}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                died.result()
        finally:
            for task in events:
                task.cancel()
        if not self._draining.is_set():
            await self._finish_samples(died)

    async def _finish_samples(self, died: asyncio.Future[None]) -> None:
        """Wait for what was handed over, for a while. A death meanwhile is no loss: others get the samples."""
        sampler = self._sampler
        assert sampler is not None
        now = asyncio.get_running_loop().time
        deadline = now() + LEAVE_PATIENCE_S
        while sampler.running and now() < deadline and not self._draining.is_set() and not died.done():
            await asyncio.wait([died], timeout=LEAVE_POLL_S)


def slot_name(index: int, *, trains: bool) -> str:
    """A worker's name within its pool."""
    return str(index) if trains else f"s{index}"


def slot_names(scale: Scale) -> set[str]:
    """Those of all workers of such a pool."""
    trainers = {slot_name(index, trains=True) for index in range(scale.workers)}
    return trainers | {slot_name(index, trains=False) for index in range(scale.samplers)}
