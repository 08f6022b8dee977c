"""From a worker's outcomes to what one cycle commits. Pure: it reads no clock and writes nothing.

The rules of the log live here: which sequence numbers are consumed, when a run's state changed, which blobs hold
exactly that state and so serve as its snapshots, and which names become visible. Replayed ops never come here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import assert_never

from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, RequestId, TinkerPath
from treadle.domain.ops import LoadWeightsOp, OpKind, SaveExternalOp, SaveForSamplerOp, SaveWeightsOp, TrainingOp
from treadle.domain.outcome import (
    BlobResult,
    EncodedResult,
    Failure,
    ModelResult,
    OpOutcome,
    PassResult,
    StepResult,
)
from treadle.domain.plan import FIRST_INCARNATION
from treadle.domain.records import (
    CheckpointRecord,
    FinishedCycle,
    FinishedRequest,
    ModelAdvance,
    NewRequest,
    RunLogEntry,
    SamplingSessionRecord,
    SnapshotRecord,
)
from treadle.domain.states import ModelState
from treadle.scheduler.runs import Run
from treadle.wire import results

SaveOp = SaveWeightsOp | SaveForSamplerOp | SaveExternalOp


@dataclass(slots=True)
class _RunChange:
    """How one run moves in this cycle, before it becomes a ModelAdvance."""

    next_seq_id: int
    state: ModelState | None = None
    state_message: str = ""
    incarnation: int | None = None
    changed_seq: int | None = None


@dataclass(frozen=True, slots=True)
class OpTimes:
    """When an op's row came in and when the first part of it was sent to a worker, on the store's clock."""

    queued_at: float
    sent_at: float


@dataclass(slots=True)
class CycleLedger:
    """Collects what a cycle commits.

    now: the store's clock at its end. cycle: its number. times: of its ops. numerics_profile: the worker's.
    """

    now: float
    cycle: int = 0
    times: Mapping[RequestId, OpTimes] = field(default_factory=dict)
    numerics_profile: str = ""
    finished: list[FinishedRequest] = field(default_factory=list)
    never_received: list[NewRequest] = field(default_factory=list)
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    sampling_sessions: list[SamplingSessionRecord] = field(default_factory=list)
    snapshots: list[SnapshotRecord] = field(default_factory=list)
    run_log: list[RunLogEntry] = field(default_factory=list)
    _changes: dict[ModelId, _RunChange] = field(default_factory=dict)

    def _change(self, run: Run) -> _RunChange:
        record = run.record
        if record.model_id not in self._changes:
            self._changes[record.model_id] = _RunChange(record.next_seq_id)
        return self._changes[record.model_id]

    @property
    def is_empty(self) -> bool:
        """Nothing to commit."""
        return not (self.finished or self.snapshots or self._changes)

    def consume(self, run: Run, seq_id: int) -> None:
        """Everything up to `seq_id` is settled."""
        change = self._change(run)
        change.next_seq_id = max(change.next_seq_id, seq_id + 1)

    def fail(self, run: Run, request_id: RequestId, seq_id: int, failure: Failure) -> None:
        """A request that ends in an error; its sequence number is consumed. With its creation (seq 0) fails the run."""
        self.finished.append(FinishedRequest(request_id=request_id, failure=failure))
        self.consume(run, seq_id)
        if seq_id == 0:
            self.set_state(run, ModelState.FAILED, failure.message)

    def refuse(self, request_id: RequestId, failure: Failure) -> None:
        """A request that ends in an error and has no part in its run."""
        self.finished.append(FinishedRequest(request_id=request_id, failure=failure))

    def set_state(self, run: Run, state: ModelState, message: str) -> None:
        """The run is lost, failed or ready."""
        change = self._change(run)
        change.state, change.state_message = state, message

    def restored(self, run: Run, incarnation: int) -> None:
        """The worker rebuilt the run under a new incarnation."""
        self._change(run).incarnation = incarnation

    def record_outcome(self, run: Run, outcome: OpOutcome, op: TrainingOp | None) -> None:
        """Book one op's outcome. `op` is given for saves and loads, whose names it carries."""
        if outcome.is_partial:
            return
        if outcome.failure is not None:
            self.fail(run, outcome.request_id, outcome.seq_id, outcome.failure)
            return
        self.consume(run, outcome.seq_id)
        encoded = outcome.encoded or self._book_success(run, outcome, op)
        self._book_state(run, outcome, op)
        self.finished.append(FinishedRequest(request_id=outcome.request_id, result=encoded))

    def _book_success(self, run: Run, outcome: OpOutcome, op: TrainingOp | None) -> EncodedResult:
        """The result's bytes for ops whose results carry names instead of numbers."""
        match outcome.result:
            case ModelResult(model_id=model_id):
                if isinstance(op, LoadWeightsOp):
                    return results.load_weights_result(op.path, model_id)
                if outcome.kind is OpKind.UNLOAD_MODEL:
                    return results.unload_result(model_id)
                return results.create_model_result(model_id)
            case BlobResult() as blob:
                assert isinstance(op, SaveOp)
                return self._book_save(run, outcome, op, blob)
            case PassResult() | StepResult() | None:
                raise AssertionError("passes and steps arrive encoded")
            case _:
                assert_never(outcome.result)

    def _book_save(self, run: Run, outcome: OpOutcome, op: SaveOp, blob: BlobResult) -> EncodedResult:
        record = run.record
        if isinstance(op, SaveForSamplerOp) and op.sampling_session_id is not None:
            self.sampling_sessions.append(
                SamplingSessionRecord(
                    sampling_session_id=op.sampling_session_id,
                    session_id=record.session_id,
                    tenant_id=record.tenant_id,
                    pool=record.pool,
                    base_model=record.base_model,
                    created_at=self.now,
                    blob_key=blob.blob_key,
                    model_id=record.model_id,
                    seq_id=outcome.seq_id,
                    is_inflight=op.is_inflight,
                )
            )
            return results.saved_for_sampler_result(sampling_session_id=op.sampling_session_id)
        assert op.name is not None
        path = str(TinkerPath(record.model_id, kind_of_save(op), op.name))
        self.checkpoints.append(
            CheckpointRecord(
                model_id=record.model_id,
                tenant_id=record.tenant_id,
                kind=kind_of_save(op),
                name=op.name,
                tinker_path=path,
                blob_key=blob.blob_key,
                size_bytes=blob.num_bytes,
                seq_id=outcome.seq_id,
                created_at=self.now,
                base_model=record.base_model,
                lora=blob.lora,
                expires_at=None if op.ttl_s is None else self.now + op.ttl_s,
                user_metadata={} if isinstance(op, SaveExternalOp) else op.user_metadata,
                is_encrypted=isinstance(op, SaveExternalOp) and bool(op.recipients),
            )
        )
        match op:
            case SaveWeightsOp():
                return results.saved_weights_result(path)
            case SaveForSamplerOp():
                return results.saved_for_sampler_result(path=path)
            case SaveExternalOp():
                return results.saved_external_result(path, size_bytes=blob.num_bytes)
            case _:
                assert_never(op)

    def _book_state(self, run: Run, outcome: OpOutcome, op: TrainingOp | None) -> None:
        """What the op did to the run's state, and whether a blob now holds exactly that."""
        change = self._change(run)
        match outcome.kind:
            case OpKind.CREATE_MODEL:
                change.state, change.incarnation = ModelState.READY, FIRST_INCARNATION
                change.changed_seq = outcome.seq_id
                # The seed makes the untouched run again: a snapshot without a blob.
                self._register(outcome, None)
            case OpKind.LOAD_WEIGHTS:
                assert isinstance(op, LoadWeightsOp)
                change.changed_seq = outcome.seq_id
                if op.creates_model:
                    change.state, change.incarnation = ModelState.READY, FIRST_INCARNATION
                # So a load is never replayed, and what becomes of the checkpoint's name changes nothing.
                self._register(outcome, op.blob_key, with_optimizer=op.with_optimizer)
            case OpKind.FORWARD_BACKWARD | OpKind.OPTIM_STEP:
                change.changed_seq = outcome.seq_id
                self._log(outcome)
            case OpKind.SAVE_WEIGHTS:
                # The file holds everything, the open gradient included.
                assert isinstance(outcome.result, BlobResult)
                self._register(outcome, outcome.result.blob_key, num_bytes=outcome.result.num_bytes)
            case OpKind.UNLOAD_MODEL:
                change.state = ModelState.UNLOADED
            case OpKind.FORWARD | OpKind.SAVE_FOR_SAMPLER | OpKind.SAVE_EXTERNAL:
                pass
            case OpKind.SAMPLE | OpKind.CREATE_CUSTOM_LOSS:
                raise AssertionError(f"{outcome.kind} is never part of a cycle")
            case _:
                assert_never(outcome.kind)

    def _register(
        self, outcome: OpOutcome, key: BlobKey | None, *, with_optimizer: bool = True, num_bytes: int = 0
    ) -> None:
        """The blob holds the run's state right behind this op; without one, the run's seed does."""
        self.snapshots.append(
            SnapshotRecord(
                model_id=outcome.model_id,
                seq_id=outcome.seq_id,
                blob_key=key,
                with_optimizer=with_optimizer,
                num_bytes=num_bytes,
                numerics_profile=self.numerics_profile,
            )
        )

    def _log(self, outcome: OpOutcome) -> None:
        assert isinstance(outcome.result, PassResult | StepResult)
        times = self.times[outcome.request_id]
        metrics = {**outcome.result.metrics, "num_tokens": float(outcome.num_tokens_of_op)}
        self.run_log.append(
            RunLogEntry(
                model_id=outcome.model_id,
                seq_id=outcome.seq_id,
                kind=outcome.kind,
                created_at=self.now,
                metrics=metrics,
                queued_s=max(0.0, times.sent_at - times.queued_at),
                run_s=max(0.0, self.now - times.sent_at),
                cycle=self.cycle,
            )
        )

    def close(self) -> FinishedCycle:
        """What to commit."""
        advances = tuple(
            ModelAdvance(
                model_id=model_id,
                next_seq_id=change.next_seq_id,
                state=change.state,
                state_message=change.state_message,
                incarnation=change.incarnation,
                changed_seq=change.changed_seq,
            )
            for model_id, change in self._changes.items()
        )
        return FinishedCycle(
            finished=tuple(self.finished),
            never_received=tuple(self.never_received),
            advances=advances,
            checkpoints=tuple(self.checkpoints),
            sampling_sessions=tuple(self.sampling_sessions),
            snapshots=tuple(self.snapshots),
            run_log=tuple(self.run_log),
        )


def kind_of_save(op: SaveOp) -> CheckpointKind:
    """What kind of checkpoint a save makes."""
    match op:
        case SaveWeightsOp():
            return CheckpointKind.TRAINING
        case SaveForSamplerOp():
            return CheckpointKind.SAMPLER
        case SaveExternalOp():
            return CheckpointKind.EXTERNAL
        case _:
            assert_never(op)
