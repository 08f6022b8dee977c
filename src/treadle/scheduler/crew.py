"""The workers of a pool while this server leads it: as many slots as are wanted, and what they share.

It starts and ends slots, gives each that trains a loop over the runs of its tenants, and feeds all of them samples from
one loop. It refuses to know the lease. Invariant: what ends the lead ends every slot, and in a drain each has persisted
its runs before that is called clean.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from treadle.blobs import BlobStore
from treadle.domain.commands import OperatorCommand
from treadle.domain.ids import ModelId, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.outcome import PoolFacts
from treadle.domain.policy import Policies
from treadle.domain.roles import Role, Scale
from treadle.errors import ConfigError, ServerError
from treadle.executor.base import SamplingExecutor
from treadle.scheduler.clock_settings import CycleSettings
from treadle.scheduler.cycle_loop import CycleLoop
from treadle.scheduler.lead import Lead
from treadle.scheduler.quarantine import Quarantine
from treadle.scheduler.sampling_loop import SamplingLoop
from treadle.scheduler.slot import Slot, slot_name
from treadle.scheduler.tenancy import Tenancy
from treadle.store import Store
from treadle.store.slots import Slots, WorkerReport
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# A worker that is not started yet, for the number of a slot and what it is for. Unless that is SAMPLING it is an
# Executor.
MakeExecutor = Callable[[int, Role], SamplingExecutor]


@dataclass(frozen=True, slots=True)
class CrewCounts:
    """workers: by the state of their slots."""

    workers: Mapping[str, int] = field(default_factory=dict)
    num_resident_runs: int = 0
    num_running_samples: int = 0


class Crew:
    """See the module. `serve` once; on_change: called whenever a worker came or went."""

    def __init__(
        self,
        *,
        lead: Lead,
        store: Store,
        blobs: BlobStore,
        make_executor: MakeExecutor,
        settings: CycleSettings,
        metrics: Metrics,
        clock: Callable[[], float],
        weights: Callable[[], Mapping[TenantId, float]],
        policies: Callable[[], Policies],
        is_paused: Callable[[], bool],
        scale: Scale,
        on_change: Callable[[Crew], None],
        may_replace: Callable[[Slot, ServerError | ConfigError], bool],
    ) -> None:
        self._lead = lead
        self._pool = lead.lease.pool
        self._store = store
        self._blobs = blobs
        self._make_executor = make_executor
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._weights = weights
        self._policies = policies
        self._is_paused = is_paused
        self._scale = scale
        self._on_change = on_change
        self._may_replace = may_replace
        self._tenancy = Tenancy(
            pool=self._pool,
            store=store,
            monotonic=asyncio.get_running_loop().time,
            on_moved=self._wake_cycles,
        )
        self._samples = SamplingLoop(
            pool=self._pool,
            store=store,
            blobs=blobs,
            lead=lead,
            metrics=metrics,
            clock=clock,
            home=self._tenancy.placement.home,
            policies=policies,
            is_paused=is_paused,
        )
        self._slots: dict[str, Slot] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._commands: Collection[OperatorCommand] = ()
        self._news = asyncio.Event()
        self._is_draining = False
        self._num_deaths_before = 0
        # Of the newest worker that trains and has loaded.
        self.facts: PoolFacts | None = None

    # What it is told.

    def wake(self, kind: OpKind) -> None:
        """A request of this kind was queued."""
        if kind is OpKind.SAMPLE:
            self._samples.wake()
            return
        for loop in self._loops():
            loop.wake(kind)

    def wake_all(self) -> None:
        """Look again, whatever is being waited for."""
        self._wake_cycles()
        self._samples.wake()

    def _wake_cycles(self) -> None:
        for loop in self._loops():
            loop.wake_all()
        self._news.set()

    def park_cold(self, model_ids: Iterable[ModelId]) -> None:
        """See CycleLoop.park_cold."""
        model_ids = list(model_ids)
        for loop in self._loops():
            loop.park_cold(model_ids)

    def take_commands(self, commands: Collection[OperatorCommand]) -> None:
        """See CycleLoop.take_commands: each loop carries out those about its own runs."""
        self._commands = commands
        for loop in self._loops():
            loop.take_commands(commands)

    def set_scale(self, scale: Scale) -> None:
        """How many are wanted from now on."""
        self._scale = scale
        self._news.set()

    def drain(self) -> None:
        """Have every slot finish its cycle and persist its runs; `serve` then returns. Idempotent."""
        self._is_draining = True
        self._samples.stop()
        for slot in self._slots.values():
            slot.drain()
        self._news.set()

    # What it tells.

    @property
    def num_up(self) -> int:
        """Workers that have loaded."""
        return sum(slot.is_up for slot in self._slots.values())

    @property
    def num_deaths(self) -> int:
        """Of workers, since the lead began."""
        return self._num_deaths_before + sum(slot.num_deaths for slot in self._slots.values())

    @property
    def is_complete(self) -> bool:
        """Every slot has loaded once."""
        return bool(self._slots) and all(slot.has_loaded for slot in self._slots.values())

    def why_not_ready(self) -> str:
        """Why the pool cannot train, or cannot sample; "" when it can do both."""
        if not any(slot.trains for slot in self._slots.values()):
            return "its workers are starting"
        for trains in (True, False):
            of_kind = [slot for slot in self._slots.values() if slot.trains is trains and not slot.is_leaving]
            if not trains and any(slot.is_up and slot.role is Role.BOTH for slot in self._slots.values()):
                continue  # samples are done, by whoever trains
            if of_kind and not any(slot.is_up for slot in of_kind):
                what = "" if trains else "no sampler: "
                return what + (next((slot.reason for slot in of_kind if slot.reason), "") or "the worker is starting")
        return ""

    def resident_runs(self) -> Collection[ModelId]:
        """Runs that the workers hold."""
        return [run for loop in self._loops() for run in loop.resident_runs()]

    def report(self) -> Slots:
        """What the workers hold, and how they are."""
        workers = [
            self._report_of(slot) for slot in sorted(self._slots.values(), key=lambda s: (not s.trains, s.index))
        ]
        return Slots(sorted(self.resident_runs()), self._samples.num_running(), workers)

    def _report_of(self, slot: Slot) -> WorkerReport:
        return WorkerReport(
            name=slot.name,
            role=slot.role.value,
            state=slot.state.value,
            reason=slot.reason,
            num_tenants=len(self._tenancy.placement.tenants_of(slot.index)) if slot.trains else 0,
            num_runs=0 if slot.cycles is None else len(slot.cycles.resident_runs()),
            num_samples=sum(self._samples.num_running(slot.name).values()),
            num_deaths=slot.num_deaths,
        )

    def count(self) -> CrewCounts:
        """How many there are of what, for metrics."""
        states = Counter(slot.state.value for slot in self._slots.values())
        return CrewCounts(states, len(self.resident_runs()), sum(self._samples.num_running().values()))

    def _loops(self) -> list[CycleLoop]:
        return [slot.cycles for slot in self._slots.values() if slot.cycles is not None]

    # What it does.

    async def serve(self) -> None:
        """Have as many slots as are wanted until drained. Raises what ended one for good, and Fenced."""
        sampling = asyncio.create_task(self._samples.run(), name=f"samples {self._pool}")
        try:
            while True:
                self._news.clear()
                self._adjust()
                if self._is_draining and not self._tasks:
                    break
                await self._wait(sampling)
                self._reap(sampling)
            await sampling
        finally:
            for task in (sampling, *self._tasks.values()):
                task.cancel()
            await asyncio.gather(sampling, *self._tasks.values(), return_exceptions=True)
            await self._tenancy.close()

    async def _wait(self, sampling: asyncio.Task[None]) -> None:
        news = asyncio.create_task(self._news.wait())
        tasks = [*self._tasks.values(), *([] if self._is_draining else [sampling])]
        waiting: set[asyncio.Future[Any]] = {news, *(task for task in tasks if not task.done())}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()

    def _reap(self, sampling: asyncio.Task[None]) -> None:
        """Let go of slots that have ended; raise what ended one, in a drain when all others have persisted theirs."""
        if sampling.done() and sampling.exception() is not None:
            sampling.result()
        ended = [name for name, task in self._tasks.items() if task.done()]
        failed = [name for name in ended if self._tasks[name].exception() is not None]
        if failed and self._is_draining and len(ended) < len(self._tasks):
            return
        for name in (*failed, *ended):
            self._tasks[name].result()
        for name in ended:
            slot = self._slots.pop(name)
            del self._tasks[name]
            slot.quarantine.is_closed = True
            self._lead.closed(name)
            self._num_deaths_before += slot.num_deaths
            if slot.trains:
                self._tenancy.closed(slot.index)
            log.info("slot closed", pool=self._pool, slot=name)
        if ended:
            self._on_change(self)

    def _adjust(self) -> None:
        """Start what is wanted, and have leave what is not, once others can do what it does."""
        if self._is_draining:
            return
        wanted = {slot_name(index, trains=True): index for index in range(self._scale.workers)}
        samplers = {slot_name(index, trains=False): index for index in range(self._scale.samplers)}
        is_first = not self._slots
        training_role = Role.TRAINING if is_first and samplers else self._training_role()
        for slot in self._slots.values():
            if slot.trains and slot.role is not training_role:
                slot.role = training_role
                self._samples.wake()
        staying = [slot for name, slot in self._slots.items() if name in wanted or name in samplers]
        for name, slot in self._slots.items():
            # One that leaves ends before another one takes its place.
            is_wanted = name in wanted or name in samplers
            if slot.is_leaving or not (is_wanted or _is_missed(slot, staying)):
                self._have_leave(slot)
        for name, index in (wanted | samplers).items():
            if name not in self._slots:
                role = training_role if name in wanted else Role.SAMPLING
                self._start(index, role, is_first=is_first)
        self._on_change(self)

    def _training_role(self) -> Role:
        """Whoever trains goes on with samples until one of the samplers that were added has loaded."""
        samplers = [slot for slot in self._slots.values() if not slot.trains and not slot.is_leaving]
        takes_over = self._scale.samplers and any(slot.is_first or slot.has_loaded for slot in samplers)
        return Role.TRAINING if takes_over else Role.BOTH

    def _have_leave(self, slot: Slot) -> None:
        """Tell it once, and end its loop when nobody lives there any more."""
        if not slot.is_leaving:
            log.info("slot leaves", pool=self._pool, slot=slot.name)
            slot.leave()
            if slot.trains:
                self._tenancy.is_leaving(slot.index)
        if slot.trains and not self._tenancy.placement.tenants_of(slot.index):
            slot.end_cycles()

    def _start(self, index: int, role: Role, *, is_first: bool) -> None:
        name = slot_name(index, trains=role is not Role.SAMPLING)
        quarantine = Quarantine(self._lead.suspicions)
        cycles = None
        if role is not Role.SAMPLING:
            self._tenancy.opened(index)
            cycles = self._loop(index, name, quarantine)
            cycles.take_commands(self._commands)
        slot = self._slots[name] = Slot(
            pool=self._pool,
            index=index,
            role=role,
            make_executor=self._make_executor,
            cycles=cycles,
            samples=self._samples,
            quarantine=quarantine,
            metrics=self._metrics,
            owner=self,
            is_first=is_first,
        )
        self._tasks[name] = asyncio.create_task(slot.run(), name=f"slot {self._pool}#{name}")

    def _loop(self, index: int, name: str, quarantine: Quarantine) -> CycleLoop:
        return CycleLoop(
            pool=self._pool,
            store=self._store,
            blobs=self._blobs,
            lead=self._lead,
            slot=name,
            tenancy=self._tenancy.of(index),
            settings=self._settings,
            metrics=self._metrics,
            clock=self._clock,
            quarantine=quarantine,
            weights=self._weights,
            policies=self._policies,
            is_paused=self._is_paused,
        )

    # What its slots tell it.

    def slot_loading(self, slot: Slot) -> None:
        """See SlotOwner."""
        self._on_change(self)

    def slot_up(self, slot: Slot, facts: PoolFacts) -> None:
        """See SlotOwner."""
        if slot.trains:
            self.facts = facts
            self._tenancy.came_up(slot.index)
        self._news.set()
        self._on_change(self)

    def slot_down(self, slot: Slot, reason: str) -> None:
        """See SlotOwner."""
        if slot.trains:
            self._tenancy.went_down(slot.index)
        self._on_change(self)

    def may_replace(self, slot: Slot, death: ServerError | ConfigError) -> bool:
        """See SlotOwner."""
        return self._may_replace(slot, death)


def _is_missed(slot: Slot, staying: Collection[Slot]) -> bool:
    """Whether nobody of those who stay is up to do what this one does."""
    if not slot.is_up:
        return False
    others = [other for other in staying if other.is_up and not other.is_leaving]
    if slot.trains:
        return not any(other.trains for other in others)
    return all(other.role is Role.TRAINING for other in others)
