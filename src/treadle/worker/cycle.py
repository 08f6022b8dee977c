"""One cycle on a worker: restores, set-ups, ONE stream of packed passes over all runs, steps, publishes.

Within a model the phases follow its seq order, so running them phase by phase over all models keeps every order
that matters. Each `yield` ends a bounded piece of work, where the device may go to sampling for a while.
Invariant: every planned op gets exactly one outcome, whatever happens to its neighbours.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, assert_never

from treadle.domain.archive import pack_files
from treadle.domain.ids import BlobKey, ModelId, RequestId
from treadle.domain.ops import (
    AdamParams,
    CreateModelOp,
    LoadWeightsOp,
    OpKind,
    OptimStepOp,
    PassOp,
    Phase,
    SaveExternalOp,
    SaveForSamplerOp,
    SaveWeightsOp,
    UnloadModelOp,
    phase_of,
)
from treadle.domain.outcome import (
    BlobResult,
    CycleOutcome,
    CyclePart,
    Failure,
    ModelResult,
    OpOutcome,
    OpResult,
    RestoreEnd,
    RestoreOutcome,
    StepResult,
)
from treadle.domain.plan import FIRST_INCARNATION, RestoreItem, StateTag, WorkItem
from treadle.engine.base_model import BaseModel
from treadle.engine.files import decode_state, encode_state, export_state
from treadle.engine.memory import PassLimits, is_out_of_memory
from treadle.engine.optim import adamw_steps
from treadle.engine.state import TrainingState, new_training_state
from treadle.errors import StaleTag, TreadleError
from treadle.telemetry import phases
from treadle.telemetry.logs import get_logger
from treadle.worker.blob_io import BlobIO
from treadle.worker.device_loss import reraise_if_device_is_lost
from treadle.worker.encryption import encrypted
from treadle.worker.failures import MustRestore, failure_of, internal_failure, must_restore
from treadle.worker.handoff import Handoff
from treadle.worker.micro_batches import MicroBatches, check_fits
from treadle.worker.open_pass import OpenPass
from treadle.worker.restoring import restore_run
from treadle.worker.slots import Slots
from treadle.worker.timings import Timings
from treadle.worker.versions import Versions
from treadle.worker.work import DecodedCycle, DecodedItem

log = get_logger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _DueStep:
    """A step that may be taken now, and the run's state on the device."""

    item: WorkItem
    state: TrainingState
    adam: AdamParams


class CycleRunner:
    """Executes cycles one after another; passes that are spread over cycles wait in it for their next part."""

    def __init__(
        self,
        *,
        base: BaseModel,
        slots: Slots,
        versions: Versions,
        blobs: BlobIO,
        handoff: Handoff,
        limits: PassLimits,
    ) -> None:
        self._base = base
        self._slots = slots
        self._versions = versions
        self._blobs = blobs
        self._handoff = handoff
        self._micro_batches = MicroBatches(base, limits, make_room=self.make_room)
        self._open_passes: dict[RequestId, OpenPass] = {}
        # Steps whose runs are on the device and must stay there until they are taken.
        self._due_steps: dict[ModelId, _DueStep] = {}
        self._outcomes: dict[RequestId, OpOutcome] = {}
        # Why a run's ops cannot run in this cycle, once its creation or its restore has failed.
        self._lost: dict[ModelId, Failure] = {}

    @property
    def busy_runs(self) -> frozenset[ModelId]:
        """Runs with a pass or a step on its way, whose state must stay where it is."""
        return frozenset(part.op.model_id for part in self._open_passes.values()) | self._due_steps.keys()

    def forget_parts(self) -> None:
        """Drop passes that are only partly done: a new leader starts them again from their first part."""
        for model_id in self.busy_runs:
            self.forget_run(model_id)

    def forget_run(self, model_id: ModelId) -> None:
        """Drop what is partly done of one run."""
        parts = {name: part for name, part in self._open_passes.items() if part.op.model_id == model_id}
        for request_id, part in parts.items():
            del self._open_passes[request_id]
            part.fail(must_restore(f"the state of run {model_id} was dropped"))

    def execute(self, cycle: DecodedCycle) -> Generator[None, None, CycleOutcome]:
        """Run the cycle in bounded pieces and return its outcome, in plan order.

        Closed before its end, it leaves some ops of its runs applied and others not: evict them all.
        """
        started = time.perf_counter()
        self._outcomes = {}
        self._lost = {}
        self._micro_batches.num_forwards = 0
        restores = []
        timings = Timings()
        for restore in cycle.restores:
            with timings.of(CyclePart.RESTORE, restore.model_id):
                restores.append(self._restore(restore))
            self._slots.park_over_limit(busy=self.busy_runs)
            yield
        by_phase: dict[Phase, list[DecodedItem]] = {phase: [] for phase in Phase}
        for item in cycle.items:
            by_phase[phase_of(item.item.planned.kind)].append(item)
        yield from self._run_alone(by_phase[Phase.SETUP], CyclePart.SETUP, timings)
        yield from timings.over(CyclePart.PASSES, self._run_passes(by_phase[Phase.PASS]))
        yield from timings.over(CyclePart.STEPS, self._run_steps(by_phase[Phase.STEP]))
        yield from self._run_alone(by_phase[Phase.PUBLISH], CyclePart.PUBLISH, timings)
        outcomes = tuple(self._outcomes[item.item.planned.request_id] for item in cycle.items)
        return CycleOutcome(
            token=cycle.token,
            cycle=cycle.cycle,
            outcomes=outcomes,
            compute_s=time.perf_counter() - started,
            num_forwards=self._micro_batches.num_forwards,
            restores=tuple(restores),
            timings=tuple(timings.taken),
        )

    def _restore(self, restore: RestoreItem) -> RestoreOutcome:
        """Rebuild a run; when that fails, its ops in this cycle do not start."""
        self._drop(restore.model_id)
        outcome = restore_run(restore, base=self._base, blobs=self._blobs, slots=self._slots, with_room=self.with_room)
        if outcome.end is not RestoreEnd.DONE:
            self._lost[restore.model_id] = must_restore(
                f"run {restore.model_id} could not be restored: {outcome.message}"
            )
        return outcome

    def _drop(self, model_id: ModelId) -> None:
        """Forget a run's state, and first the passes on it: one begun on the state before must not go on."""
        self.forget_run(model_id)
        self._slots.drop(model_id)

    def with_room(self, make: Callable[[], Value]) -> Value:
        """What `make` gives, tried again without idle runs and kept versions in memory when it ran out."""
        try:
            return make()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("memory ran out; idle runs are parked", exc=error)
        # Behind the handler, where the failed try's frames are gone.
        self.make_room()
        return make()

    def make_room(self) -> None:
        """Free what nobody needs at this moment: runs can come back, versions can be read again."""
        self._slots.park_all(busy=self.busy_runs)
        self._versions.forget_all()

    def _state(self, model_id: ModelId) -> TrainingState:
        """The run's state, on the device. Raises as Slots.state does."""
        return self.with_room(lambda: self._slots.state(model_id))

    def _run_alone(self, items: Sequence[DecodedItem], part: CyclePart, timings: Timings) -> Iterator[None]:
        """Ops that are not passes, one per piece."""
        for item in items:
            planned = item.item.planned
            with timings.of(part, planned.model_id, planned.request_id):
                self._run_one(item)
            self._slots.park_over_limit(busy=self.busy_runs)
            yield

    def _run_one(self, item: DecodedItem) -> None:
        planned = item.item.planned
        refusal = self._refusal(item)
        result = self._guarded(item, self._apply) if refusal is None else refusal
        if isinstance(result, Failure):
            if item.item.starts_from is None and not isinstance(result, MustRestore):
                message = f"run {planned.model_id} does not exist: its creation failed: {result.message}"
                self._lost[planned.model_id] = Failure(message, result.category)
            self._settle(item.item, failure=result)
            return
        if planned.kind is OpKind.UNLOAD_MODEL:
            self._drop(planned.model_id)
        self._settle(item.item, result=result)

    def _guarded(self, item: DecodedItem, apply: Callable[[DecodedItem], Value]) -> Value | Failure:
        """What `apply` gives, or why it failed. Ops are atomic in the engine, so a failure has left no trace."""
        planned = item.item.planned
        try:
            return apply(item)
        except TreadleError as error:
            return failure_of(error)
        except Exception as error:  # noqa: BLE001 (worker entry: a bug in one op must not end the others)
            reraise_if_device_is_lost(error)
            log.error("op failed", request_id=planned.request_id, kind=planned.kind, exc=error)
            return internal_failure(planned.request_id)

    def _apply(self, item: DecodedItem) -> OpResult:
        op = item.op
        match op:
            case CreateModelOp():
                tag = StateTag(op.model_id, incarnation=FIRST_INCARNATION, applied_seq=0)
                self._slots.put(self.with_room(lambda: new_training_state(self._base, op.lora)), tag)
                return ModelResult(op.model_id)
            case LoadWeightsOp():
                return self._load(op, item.item)
            case OptimStepOp():
                raise AssertionError("steps are taken together, not alone")
            case SaveWeightsOp():
                return self._save(op, item.item.blob_key, self._blobs.write)
            case SaveForSamplerOp():
                # A name promises that the weights stay whatever happens; without one they are for the next samples.
                write = self._handoff.keep if op.name is None else self._blobs.write
                saved = self._save(op, item.item.blob_key, write)
                self._keep_version(op.model_id, saved.blob_key)
                return saved
            case SaveExternalOp():
                return self._export(op, item.item.blob_key)
            case UnloadModelOp():
                return ModelResult(op.model_id)
            case PassOp():
                raise AssertionError("passes run packed, not alone")
            case Failure():
                raise AssertionError("unreadable ops are settled before")
            case _:
                assert_never(op)

    def _load(self, op: LoadWeightsOp, item: WorkItem) -> ModelResult:
        phases.phase(phases.Phase.LOAD, model_id=op.model_id, seq_id=op.seq_id)
        data = self._blobs.read(op.blob_key)
        state = self.with_room(lambda: decode_state(data, self._base, with_optimizer=op.with_optimizer))
        incarnation = FIRST_INCARNATION if item.starts_from is None else item.starts_from.incarnation
        self._slots.put(state, StateTag(op.model_id, incarnation=incarnation, applied_seq=op.seq_id))
        return ModelResult(op.model_id)

    def _save(
        self, op: SaveWeightsOp | SaveForSamplerOp, key: BlobKey | None, write: Callable[[str, bytes], int]
    ) -> BlobResult:
        assert key is not None, "the scheduler assigns a key to every save"
        state = self._state(op.model_id)
        is_whole = isinstance(op, SaveWeightsOp)
        data = encode_state(state, self._base, with_optimizer=is_whole, applied_seq=op.seq_id)
        name = phases.Phase.SAVE if is_whole else phases.Phase.SAVE_FOR_SAMPLER
        phases.phase(name, model_id=op.model_id, seq_id=op.seq_id)
        return BlobResult(blob_key=key, num_bytes=write(key, data), lora=state.spec)

    def _export(self, op: SaveExternalOp, key: BlobKey | None) -> BlobResult:
        """The run's weights as a PEFT directory; encrypted before a byte of it is written."""
        assert key is not None, "the scheduler assigns a key to every save"
        state = self._state(op.model_id)
        archive = pack_files(encrypted(export_state(state, self._base), op.recipients))
        phases.phase(phases.Phase.SAVE_EXTERNAL, model_id=op.model_id, seq_id=op.seq_id)
        return BlobResult(blob_key=key, num_bytes=self._blobs.write(key, archive), lora=state.spec)

    def _keep_version(self, model_id: ModelId, key: BlobKey) -> None:
        """Have the first sample find the version in memory; without memory for it, it will read the blob."""
        try:
            self.with_room(lambda: self._versions.publish(key, self._state(model_id).weights))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("version not kept in memory", model_id=model_id, exc=error)

    def _run_passes(self, items: Sequence[DecodedItem]) -> Iterator[None]:
        """All runs' quanta in plan order, packed into as few forwards as memory allows."""
        waiting = deque((item.item, self._open(item)) for item in items)
        refs = [
            (part, index)
            for item, part in waiting
            if isinstance(part, OpenPass)
            for index in range(item.planned.quantum_start, item.planned.quantum_stop)
        ]
        for _ in self._micro_batches.run(refs):
            self._close_parts(waiting)
            if waiting:
                phases.phase(phases.Phase.MID_PASS, num_ops_left=len(waiting))
            yield
        self._close_parts(waiting)
        assert not waiting, "every planned quantum ran or its op failed"

    def _open(self, item: DecodedItem) -> OpenPass | Failure:
        """The pass with what earlier cycles did of it, or why it may not run."""
        planned = item.item.planned
        request_id = planned.request_id
        if (known := self._open_passes.get(request_id)) is not None and planned.quantum_start == known.num_done:
            return known
        failure = self._refusal(item)
        if failure is not None:
            return failure
        assert isinstance(item.op, PassOp)
        assert planned.quantum_start == 0, "a pass that this worker has not seen starts from its first part"
        try:
            open_pass = OpenPass(item.op, self._state(planned.model_id))
            check_fits(open_pass, self._micro_batches.limits)
        except TreadleError as error:
            return failure_of(error)
        except Exception as error:  # noqa: BLE001 (worker entry: no memory for one run must not end the others)
            reraise_if_device_is_lost(error)
            log.error("run not brought back", model_id=planned.model_id, exc=error)
            return internal_failure("this request")
        self._open_passes[request_id] = open_pass
        return open_pass

    def _run_steps(self, items: Sequence[DecodedItem]) -> Iterator[None]:
        """All runs' steps together, as far as memory holds them; a run's second step goes behind its first."""
        waiting = deque(items)
        while waiting:
            self._gather_steps(waiting)
            self._step_together(tuple(self._due_steps.values()))
            self._due_steps.clear()
            yield

    def _gather_steps(self, waiting: deque[DecodedItem]) -> None:
        """Move from `waiting` to the due steps all that can be taken in one call, and settle those that may not run."""
        assert not self._due_steps
        later: list[DecodedItem] = []
        while waiting:
            item = waiting.popleft()
            model_id = item.item.planned.model_id
            if model_id in self._due_steps:
                later.append(item)
                continue
            refusal = self._refusal(item)
            state = self._guarded(item, self._state_beside) if refusal is None else refusal
            if isinstance(state, Failure):
                self._settle(item.item, failure=state)
                continue
            if state is None:
                waiting.appendleft(item)
                break
            assert isinstance(item.op, OptimStepOp)
            self._due_steps[model_id] = _DueStep(item.item, state, item.op.adam)
        waiting.extendleft(reversed(later))

    def _state_beside(self, item: DecodedItem) -> TrainingState | None:
        """The run's state; None when memory holds it only after the steps that are due."""
        try:
            return self._state(item.item.planned.model_id)
        except Exception as error:
            if not self._due_steps or not is_out_of_memory(error):
                raise
            return None

    def _step_together(self, due: Sequence[_DueStep], *, is_last_try: bool = False) -> None:
        """One step of each of these runs, in one call of the optimiser.

        When it breaks, runs that it had not written to are tried again, each alone.
        """
        versions = [_versions(one.state) for one in due]
        try:
            taken = adamw_steps([(one.state, one.adam) for one in due])
        except Exception as error:  # noqa: BLE001 (worker entry: a bug in steps must not end all runs)
            reraise_if_device_is_lost(error)
            ran_out = is_out_of_memory(error)
            log.error("steps failed", runs=len(due), exc=error)
        else:
            for one, metrics in zip(due, taken, strict=True):
                self._settle_step(one.item, metrics)
            phases.phase(phases.Phase.STEPPED, num_runs=len(due))
            return
        is_touched = [_versions(one.state) != version for one, version in zip(due, versions, strict=True)]
        if ran_out:
            self.make_room()
        for one, touched in zip(due, is_touched, strict=True):
            if not touched and not is_last_try:
                self._step_together((one,), is_last_try=True)
                continue
            if touched:
                # It may be half a step further: it must be restored.
                self._drop(one.item.planned.model_id)
            self._settle(one.item, failure=internal_failure(one.item.planned.request_id))

    def _settle_step(self, item: WorkItem, metrics: Mapping[str, float] | TreadleError) -> None:
        if isinstance(metrics, TreadleError):
            self._settle(item, failure=failure_of(metrics))
            return
        num_skipped = self._slots.take_skipped_passes(item.planned.model_id) + item.num_refused_passes
        self._settle(item, result=StepResult({**metrics, "skipped_passes": float(num_skipped)}))

    def _refusal(self, item: DecodedItem) -> Failure | None:
        """Why an op may not start here. A state that is not the one it starts from is dropped, for a restore."""
        if isinstance(item.op, Failure):
            return item.op
        planned = item.item.planned
        if (lost := self._lost.get(planned.model_id)) is not None:
            return lost
        try:
            self._slots.check(planned.model_id, item.item.starts_from, planned.seq_id)
        except StaleTag as error:
            log.error("stale tag", request_id=planned.request_id, reason=error.message)
            self._drop(planned.model_id)
            return failure_of(error)
        return None

    def _close_parts(self, waiting: deque[tuple[WorkItem, OpenPass | Failure]]) -> None:
        """Settle what is through, in plan order, so that a run's numbers are consumed in order.

        At once, and not at the end of the phase: then a run's ops hold one gradient arena between them.
        """
        while waiting:
            item, part = waiting[0]
            if isinstance(part, Failure):
                if item.planned.kind is OpKind.FORWARD_BACKWARD:
                    self._slots.note_skipped_pass(item.planned.model_id)
                self._settle(item, failure=part)
            elif part.is_done or part.num_done == item.planned.quantum_stop:
                self._close_part(item, part)
            else:
                return
            waiting.popleft()

    def _close_part(self, item: WorkItem, open_pass: OpenPass) -> None:
        """Settle a pass whose last quantum ran or that failed; leave the others open for their next part."""
        planned = item.planned
        if not open_pass.is_done:
            assert not planned.is_last_part
            self._outcomes[planned.request_id] = self._outcome(item, is_partial=True)
            return
        self._open_passes.pop(planned.request_id, None)
        if open_pass.failure is None:
            result = self._guarded(DecodedItem(item, open_pass.op), lambda _: open_pass.finish())
            if not isinstance(result, Failure):
                self._settle(item, result=result)
                outcome = self._outcomes[planned.request_id]
                self._outcomes[planned.request_id] = replace(outcome, num_tokens_of_op=open_pass.total_tokens)
                return
            open_pass.fail(result)
        assert open_pass.failure is not None
        if not open_pass.op.forward_only:
            self._slots.note_skipped_pass(planned.model_id)
        self._settle(item, failure=open_pass.failure)

    def _settle(self, item: WorkItem, *, result: OpResult | None = None, failure: Failure | None = None) -> None:
        """The op is over, its number consumed and its outcome final; or it did not start, and its run is not held."""
        assert (result is None) != (failure is None)
        planned = item.planned
        assert planned.request_id not in self._outcomes, "one outcome per op"
        if isinstance(failure, MustRestore):
            assert planned.model_id not in self._slots, "a run that is held needs no restore"
        self._slots.advance(planned.model_id, planned.seq_id)
        self._outcomes[planned.request_id] = self._outcome(item, result=result, failure=failure)

    def _outcome(
        self,
        item: WorkItem,
        *,
        result: OpResult | None = None,
        failure: Failure | None = None,
        is_partial: bool = False,
    ) -> OpOutcome:
        planned = item.planned
        return OpOutcome(
            request_id=planned.request_id,
            model_id=planned.model_id,
            seq_id=planned.seq_id,
            kind=planned.kind,
            result=result,
            failure=None if failure is None else Failure(failure.message, failure.category),
            is_partial=is_partial,
            tag_after=self._slots.tag(planned.model_id),
            num_tokens=planned.num_tokens if failure is None else 0,
            must_restore=isinstance(failure, MustRestore),
        )


def _versions(state: TrainingState) -> tuple[int, ...]:
    """Changes whenever one of the state's tensors is written to (torch counts writes; arenas of a page together)."""
    return tuple(tensor._version for tensor in (state.weights.flat, state.exp_avg, state.exp_avg_sq))
