"""One cycle on a worker: restores, set-ups, ONE stream of packed passes over all runs, steps, publishes.

Within a model the phases follow its seq order, so running them phase by phase over all models keeps every order
that matters. Each `yield` ends a bounded piece of work, where the device may go to sampling for a while.
Invariant: every planned op gets exactly one outcome, whatever happens to its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import assert_never

from treadle.domain.ids import BlobKey, ModelId, RequestId
from treadle.domain.ops import (
    CreateModelOp,
    LoadWeightsOp,
    OpKind,
    OptimStepOp,
    PassOp,
    Phase,
    SaveForSamplerOp,
    SaveWeightsOp,
    UnloadModelOp,
    phase_of,
)
from treadle.domain.outcome import (
    BlobResult,
    CycleOutcome,
    Failure,
    ModelResult,
    OpOutcome,
    OpResult,
    StepResult,
)
from treadle.domain.plan import FIRST_INCARNATION, RestoreItem, StateTag, WorkItem
from treadle.domain.states import Category
from treadle.engine.adapter import new_training_state
from treadle.engine.base_model import BaseModel
from treadle.engine.files import decode_state, encode_state
from treadle.engine.optim import adamw_step
from treadle.engine.passes import QuantumResult, run_micro_batch
from treadle.errors import StaleTag, TreadleError
from treadle.telemetry.logs import get_logger
from treadle.worker.blob_io import BlobIO
from treadle.worker.failures import failure_of, internal_failure
from treadle.worker.open_pass import OpenPass
from treadle.worker.slots import Slots
from treadle.worker.versions import Versions
from treadle.worker.work import DecodedCycle, DecodedItem

log = get_logger(__name__)

QuantumRef = tuple[OpenPass, int]


class CycleRunner:
    """Executes cycles one after another; passes that are spread over cycles wait in it for their next part."""

    def __init__(
        self, *, base: BaseModel, slots: Slots, versions: Versions, blobs: BlobIO, micro_batch_tokens: int
    ) -> None:
        self._base = base
        self._slots = slots
        self._versions = versions
        self._blobs = blobs
        self._micro_batch_tokens = micro_batch_tokens
        self._open_passes: dict[RequestId, OpenPass] = {}
        self._outcomes: dict[RequestId, OpOutcome] = {}
        self._lost: dict[ModelId, Failure] = {}
        self._num_forwards = 0

    def forget_parts(self) -> None:
        """Drop passes that are only partly done: a new leader starts them again from their first part."""
        self._open_passes.clear()

    def forget_run(self, model_id: ModelId) -> None:
        """Drop what is partly done of one run."""
        self._open_passes = {
            request_id: part for request_id, part in self._open_passes.items() if part.op.model_id != model_id
        }

    def execute(self, cycle: DecodedCycle) -> Generator[None, None, CycleOutcome]:
        """Run the cycle in bounded pieces and return its outcome, in plan order."""
        started = time.perf_counter()
        self._outcomes = {}
        self._lost = {}
        self._num_forwards = 0
        for restore in cycle.restores:
            self._restore(restore)
            yield
        by_phase: dict[Phase, list[DecodedItem]] = {phase: [] for phase in Phase}
        for item in cycle.items:
            by_phase[phase_of(item.item.planned.kind)].append(item)
        yield from self._run_alone(by_phase[Phase.SETUP])
        yield from self._run_passes(by_phase[Phase.PASS])
        yield from self._run_alone(by_phase[Phase.STEP])
        yield from self._run_alone(by_phase[Phase.PUBLISH])
        outcomes = tuple(self._outcomes[item.item.planned.request_id] for item in cycle.items)
        return CycleOutcome(
            token=cycle.token,
            cycle=cycle.cycle,
            outcomes=outcomes,
            compute_s=time.perf_counter() - started,
            num_forwards=self._num_forwards,
        )

    def _restore(self, restore: RestoreItem) -> None:
        """Rebuild a run; when that fails, its ops in this cycle fail with the reason, as an error of ours."""
        self._slots.drop(restore.model_id)
        # A pass begun on the state before must not go on adding to it.
        self.forget_run(restore.model_id)
        try:
            if restore.blob_key is None:
                state = new_training_state(self._base, restore.lora)
            else:
                state = decode_state(self._blobs.read(restore.blob_key), self._base)
        except TreadleError as error:
            log.error("restore failed", model_id=restore.model_id, reason=error.message)
            self._lost[restore.model_id] = Failure(
                f"the state of run {restore.model_id} could not be read back: {error.message}", Category.SERVER
            )
            return
        except Exception as error:  # noqa: BLE001 (worker entry: no memory for one run must not end the others)
            log.error("restore failed", model_id=restore.model_id, exc=error)
            self._lost[restore.model_id] = internal_failure(f"the restore of run {restore.model_id}")
            return
        self._slots.put(state, restore.tag)

    def _run_alone(self, items: Sequence[DecodedItem]) -> Iterator[None]:
        """Ops that are not passes, one per piece."""
        for item in items:
            self._run_one(item)
            yield

    def _run_one(self, item: DecodedItem) -> None:
        planned = item.item.planned
        result = self._refusal(item) or self._guarded(item, self._apply)
        if isinstance(result, Failure):
            if item.item.starts_from is None:
                message = f"run {planned.model_id} does not exist: its creation failed: {result.message}"
                self._lost[planned.model_id] = Failure(message, result.category)
            self._settle(item.item, failure=result)
            return
        if planned.kind is OpKind.UNLOAD_MODEL:
            self._slots.drop(planned.model_id)
        self._settle(item.item, result=result)

    def _guarded(self, item: DecodedItem, apply: Callable[[DecodedItem], OpResult]) -> OpResult | Failure:
        """What `apply` gives, or why it failed. Ops are atomic in the engine, so a failure has left no trace."""
        planned = item.item.planned
        try:
            return apply(item)
        except TreadleError as error:
            return failure_of(error)
        except Exception as error:  # noqa: BLE001 (worker entry: a bug in one op must not end the others)
            log.error("op failed", request_id=planned.request_id, kind=planned.kind, exc=error)
            return internal_failure(planned.request_id)

    def _apply(self, item: DecodedItem) -> OpResult:
        op = item.op
        match op:
            case CreateModelOp():
                tag = StateTag(op.model_id, incarnation=FIRST_INCARNATION, applied_seq=0)
                self._slots.put(new_training_state(self._base, op.lora), tag)
                return ModelResult(op.model_id)
            case LoadWeightsOp():
                return self._load(op, item.item)
            case OptimStepOp():
                metrics = adamw_step(self._slots.state(op.model_id), op.adam)
                num_skipped = self._slots.take_skipped_passes(op.model_id) + item.item.num_refused_passes
                return StepResult({**metrics, "skipped_passes": float(num_skipped)})
            case SaveWeightsOp():
                return self._save(op.model_id, op.seq_id, item.item.blob_key, with_optimizer=True)
            case SaveForSamplerOp():
                saved = self._save(op.model_id, op.seq_id, item.item.blob_key, with_optimizer=False)
                self._versions.publish(saved.blob_key, self._slots.state(op.model_id).weights)
                return saved
            case UnloadModelOp():
                return ModelResult(op.model_id)
            case PassOp():
                raise AssertionError("passes run packed, not alone")
            case Failure():
                raise AssertionError("unreadable ops are settled before")
            case _:
                assert_never(op)

    def _load(self, op: LoadWeightsOp, item: WorkItem) -> ModelResult:
        state = decode_state(self._blobs.read(op.blob_key), self._base, with_optimizer=op.with_optimizer)
        incarnation = FIRST_INCARNATION if item.starts_from is None else item.starts_from.incarnation
        self._slots.put(state, StateTag(op.model_id, incarnation=incarnation, applied_seq=op.seq_id))
        return ModelResult(op.model_id)

    def _save(self, model_id: ModelId, seq_id: int, key: BlobKey | None, *, with_optimizer: bool) -> BlobResult:
        assert key is not None, "the scheduler assigns a key to every save"
        state = self._slots.state(model_id)
        data = encode_state(state, self._base, with_optimizer=with_optimizer, applied_seq=seq_id)
        return BlobResult(blob_key=key, num_bytes=self._blobs.write(key, data), lora=state.spec)

    def _run_passes(self, items: Sequence[DecodedItem]) -> Iterator[None]:
        """All runs' quanta in plan order, packed into as few forwards as memory allows."""
        parts = [(item.item, self._open(item)) for item in items]
        refs: list[QuantumRef] = [
            (part, index)
            for item, part in parts
            if isinstance(part, OpenPass)
            for index in range(item.planned.quantum_start, item.planned.quantum_stop)
        ]
        for batch in self._micro_batches(refs):
            self._run_batch(batch)
            yield
        # Refusals are settled here too, so that a run's numbers are consumed in order.
        for item, part in parts:
            if isinstance(part, Failure):
                self._settle(item, failure=part)
            else:
                self._close_part(item, part)

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
        open_pass = self._open_passes[request_id] = OpenPass(item.op, self._slots.state(planned.model_id))
        return open_pass

    def _refusal(self, item: DecodedItem) -> Failure | None:
        """Why an op may not start here. A state that is not the one the leader means is dropped, for a restore."""
        if isinstance(item.op, Failure):
            return item.op
        planned = item.item.planned
        if (lost := self._lost.get(planned.model_id)) is not None:
            return lost
        try:
            self._slots.check(planned.model_id, item.item.starts_from, planned.seq_id)
        except StaleTag as error:
            log.error("stale tag", request_id=planned.request_id, reason=error.message)
            self._slots.drop(planned.model_id)
            return failure_of(error)
        return None

    def _micro_batches(self, refs: Sequence[QuantumRef]) -> Iterator[list[QuantumRef]]:
        """Whole quanta in order, up to the token limit together; a larger one alone."""
        batch: list[QuantumRef] = []
        num_tokens = 0
        for open_pass, index in refs:
            size = open_pass.num_tokens(index)
            if batch and num_tokens + size > self._micro_batch_tokens:
                yield batch
                batch, num_tokens = [], 0
            batch.append((open_pass, index))
            num_tokens += size
        if batch:
            yield batch

    def _run_batch(self, batch: Sequence[QuantumRef]) -> None:
        """One forward and backward. If it breaks, its ops start again one by one, so that only the guilty one fails."""
        live = [ref for ref in batch if ref[0].failure is None]
        if not live:
            return
        try:
            results = self._forward_backward(live)
        except Exception as error:  # noqa: BLE001 (worker entry: any breakage is retried op by op)
            log.error("micro-batch failed", quanta=len(live), exc=error)
            self._run_separately(live)
            return
        for (open_pass, index), result in zip(live, results, strict=True):
            open_pass.take(index, result)

    def _forward_backward(self, refs: Sequence[QuantumRef]) -> list[QuantumResult]:
        self._num_forwards += 1
        return run_micro_batch(self._base, [open_pass.quantum(index) for open_pass, index in refs])

    def _run_separately(self, refs: Sequence[QuantumRef]) -> None:
        """Each op of a broken batch again, from its first quantum: half a gradient may be in its scratch."""
        stops: dict[OpenPass, int] = {open_pass: index + 1 for open_pass, index in refs}
        for open_pass, stop in stops.items():
            open_pass.restart()
            for index in range(stop):
                try:
                    (result,) = self._forward_backward([(open_pass, index)])
                except Exception as error:  # noqa: BLE001 (worker entry: this op alone is to blame)
                    log.error("quantum failed", model_id=open_pass.op.model_id, seq_id=open_pass.op.seq_id, exc=error)
                    open_pass.fail(internal_failure("this request"))
                    break
                open_pass.take(index, result)

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
        """The op is over: its number is consumed, its outcome is final."""
        assert (result is None) != (failure is None)
        planned = item.planned
        assert planned.request_id not in self._outcomes, "one outcome per op"
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
            failure=failure,
            is_partial=is_partial,
            tag_after=self._slots.tag(planned.model_id),
            num_tokens=planned.num_tokens if failure is None else 0,
        )
