"""A worker: one base model, the runs resident on it, and the sampler that shares its weights.

It gets plans and payloads and returns outcomes. It refuses to know where they come from, when, or for whom.
Invariant: a run's state and its tag change together, by whole ops only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

from treadle.domain.ids import BlobKey, ModelId, RequestId
from treadle.domain.outcome import CycleOutcome, PoolFacts, SampledPart, SampleOutcome
from treadle.domain.plan import StateTag
from treadle.engine.base_model import BaseModel
from treadle.engine.files import encode_state
from treadle.engine.memory import PassLimits
from treadle.errors import Fenced, TreadleError
from treadle.sampler.base import Sampler, SampleRequest
from treadle.telemetry import phases
from treadle.telemetry.logs import get_logger
from treadle.worker.blob_io import BlobIO
from treadle.worker.cycle import CycleRunner
from treadle.worker.device_loss import reraise_if_device_is_lost
from treadle.worker.failures import failure_of, internal_failure
from treadle.worker.handoff import Handoff
from treadle.worker.slots import ParkingRules, Slots
from treadle.worker.versions import Versions
from treadle.worker.work import DecodedCycle, DecodedSample

log = get_logger(__name__)

# Less than an executor waits for a worker that is told to stop.
LAST_WRITES_S = 7.0


class Worker:
    """Owned by one compute thread; nothing here is thread-safe."""

    def __init__(
        self,
        *,
        base: BaseModel,
        sampler: Sampler,
        blobs: BlobIO,
        limits: PassLimits,
        handoff: Handoff | None = None,
        parking: ParkingRules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """handoff: where versions without a name go; None: to the blobs, before their save is answered."""
        self._base = base
        self._sampler = sampler
        self._blobs = blobs
        self._slots = Slots(base, parking, clock=clock)
        self._handoff = handoff or Handoff(blobs)
        self._versions = Versions(base, self._handoff)
        self._token = 0
        self._runner = CycleRunner(
            base=base,
            slots=self._slots,
            versions=self._versions,
            blobs=blobs,
            handoff=self._handoff,
            limits=limits,
        )
        self._refused: list[SampleOutcome] = []

    @property
    def facts(self) -> PoolFacts:
        return self._base.facts

    def begin_cycle(self, cycle: DecodedCycle) -> Generator[None, None, CycleOutcome]:
        """A generator that runs the cycle, one bounded piece per step, and returns its outcome.

        Raises Fenced at once when the plan's token is older than one seen before.
        """
        if cycle.token < self._token:
            raise Fenced(f"cycle {cycle.cycle} carries token {cycle.token}, this worker has seen {self._token}")
        if cycle.token > self._token:
            self._token = cycle.token
            # Parts of ops that an older leader had sent are void: the new one starts them again.
            self._runner.forget_parts()
        return self._runner.execute(cycle)

    def encode_snapshot(self, tag: StateTag, with_open_gradient: bool) -> bytes | None:
        """The file of a run's whole state at exactly that tag; None to leave it out (see Executor.snapshot).

        Also when it cannot be made: one run's failure must not cost the others theirs. Raises when the device is lost.
        """
        model_id = tag.model_id
        if self._slots.tag(model_id) != tag:
            return None
        is_open = model_id in self._runner.busy_runs or self._slots.has_open_gradient(model_id)
        if is_open and not with_open_gradient:
            return None
        try:
            was_parked = self._slots.is_parked(model_id)
            state = self._runner.with_room(lambda: self._slots.state(model_id))
            data = encode_state(state, self._base, with_optimizer=True, applied_seq=tag.applied_seq)
            if was_parked:
                # A drain writes all runs, and they may be more than memory holds together.
                self._slots.park(model_id)
        except Exception as error:  # noqa: BLE001 (worker entry: one run must not cost the others theirs)
            reraise_if_device_is_lost(error)
            log.error("snapshot failed", model_id=model_id, exc=error)
            return None
        return data

    def write_blob(self, key: str, data: bytes) -> int:
        """Store bytes durably; how many. May be called from another thread. Raises as the blob store does."""
        return self._blobs.write(key, data)

    def evict(self, model_ids: Sequence[ModelId]) -> None:
        """Forget runs and free their memory. Idempotent."""
        for model_id in model_ids:
            self._runner.forget_run(model_id)
            self._slots.drop(model_id)

    @property
    def seconds_until_parking(self) -> float | None:
        """When `park_idle` has something to do; None: not before new work."""
        return self._slots.seconds_until_due(busy=self._runner.busy_runs)

    def park_idle(self) -> None:
        """Between units of work: park runs over the limit in bytes, and one that has been idle for long enough."""
        busy = self._runner.busy_runs
        self._slots.park_over_limit(busy=busy)
        self._slots.park_one_due(busy=busy)

    def make_room(self) -> None:
        """Free memory that nobody needs at this moment: park idle runs, drop kept versions."""
        self._runner.make_room()

    @property
    def has_samples(self) -> bool:
        return self._sampler.has_work or bool(self._refused)

    def submit_samples(self, samples: Sequence[DecodedSample]) -> None:
        """Queue samples; one whose weights cannot be had ends in a failure and leaves the others alone."""
        requests: list[SampleRequest] = []
        for sample in samples:
            key: BlobKey | None = sample.op.blob_key
            try:
                adapter = None if key is None else self._versions.get(key)
            except TreadleError as error:
                # A blob store that is away for now: the client sends the sample again.
                outcome = SampleOutcome(sample.request_id, failure=failure_of(error), is_transient=error.retryable)
                self._refused.append(outcome)
                continue
            except Exception as error:  # noqa: BLE001 (worker entry: no memory for one adapter must not end them all)
                reraise_if_device_is_lost(error)
                log.error("adapter not loaded", request_id=sample.request_id, exc=error)
                failure = internal_failure("this sample")
                self._refused.append(SampleOutcome(request_id=sample.request_id, failure=failure))
                continue
            requests.append(
                SampleRequest(request_id=sample.request_id, tenant_id=sample.tenant_id, op=sample.op, adapter=adapter)
            )
        self._sampler.submit(requests)

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """Drop samples that nobody waits for; unknown ids are ignored."""
        self._sampler.cancel(request_ids)

    def sample_step(self, max_s: float) -> tuple[SampleOutcome, ...]:
        """Run one bounded unit of sampling; what finished."""
        refused, self._refused = self._refused, []
        finished = self._sampler.step(max_s) if self._sampler.has_work else []
        if self._sampler.has_work:
            phases.phase(phases.Phase.SAMPLING)
        return (*refused, *finished)

    def close(self) -> None:
        """The worker is to end: make durable what its saves were answered for, for so long as an end may take."""
        self._handoff.close(LAST_WRITES_S)

    def sampled_parts(self) -> tuple[SampledPart, ...]:
        """What running samples that somebody watches have got since the last call."""
        return tuple(self._sampler.take_parts())
