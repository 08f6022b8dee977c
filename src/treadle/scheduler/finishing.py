"""From a worker's outcomes to what one cycle commits. Pure: it reads no clock and writes nothing.

The rules of the log live here: which sequence numbers are consumed, when a run's state changed, which blob is
its newest exact snapshot, and which names become visible.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, RequestId, TenantId, TinkerPath
from treadle.domain.ops import LoadWeightsOp, OpKind, SaveForSamplerOp, SaveWeightsOp, TrainingOp
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
)
from treadle.domain.states import ModelState
from treadle.scheduler.runs import Run
from treadle.wire import results


@dataclass(slots=True)
class _RunChange:
    """How one run moves in this cycle, before it becomes a ModelAdvance."""

    next_seq_id: int
    state: ModelState | None = None
    state_message: str = ""
    incarnation: int | None = None
    changed_seq: int | None = None
    snapshot_key: BlobKey | None = None
    snapshot_seq: int | None = None


@dataclass(slots=True)
class CycleLedger:
    """Collects what a cycle commits. `now` is the store's clock at its end."""

    now: float
    finished: list[FinishedRequest] = field(default_factory=list)
    never_received: list[NewRequest] = field(default_factory=list)
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    sampling_sessions: list[SamplingSessionRecord] = field(default_factory=list)
    run_log: list[RunLogEntry] = field(default_factory=list)
    trained_tokens: dict[TenantId, int] = field(default_factory=dict)
    _changes: dict[ModelId, _RunChange] = field(default_factory=dict)

    def _change(self, run: Run) -> _RunChange:
        record = run.record
        if record.model_id not in self._changes:
            self._changes[record.model_id] = _RunChange(record.next_seq_id)
        return self._changes[record.model_id]

    @property
    def is_empty(self) -> bool:
        """Nothing to commit."""
        return not (self.finished or self._changes)

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
                assert isinstance(op, SaveWeightsOp | SaveForSamplerOp)
                return self._book_save(run, outcome, op, blob)
            case PassResult() | StepResult() | None:
                raise AssertionError("passes and steps arrive encoded")
            case _:
                assert_never(outcome.result)

    def _book_save(
        self, run: Run, outcome: OpOutcome, op: SaveWeightsOp | SaveForSamplerOp, blob: BlobResult
    ) -> EncodedResult:
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
                )
            )
            return results.saved_for_sampler_result(sampling_session_id=op.sampling_session_id)
        assert op.name is not None
        kind = CheckpointKind.TRAINING if isinstance(op, SaveWeightsOp) else CheckpointKind.SAMPLER
        path = str(TinkerPath(record.model_id, kind, op.name))
        self.checkpoints.append(
            CheckpointRecord(
                model_id=record.model_id,
                tenant_id=record.tenant_id,
                kind=kind,
                name=op.name,
                tinker_path=path,
                blob_key=blob.blob_key,
                size_bytes=blob.num_bytes,
                seq_id=outcome.seq_id,
                created_at=self.now,
                base_model=record.base_model,
                lora=blob.lora,
                expires_at=None if op.ttl_s is None else self.now + op.ttl_s,
                user_metadata=op.user_metadata,
            )
        )
        if kind is CheckpointKind.TRAINING:
            return results.saved_weights_result(path)
        return results.saved_for_sampler_result(path=path)

    def _book_state(self, run: Run, outcome: OpOutcome, op: TrainingOp | None) -> None:
        """R1 and R3 of the log: what the op did to the run's state, and whether a blob now holds exactly that."""
        change = self._change(run)
        match outcome.kind:
            case OpKind.CREATE_MODEL:
                change.state, change.incarnation = ModelState.READY, FIRST_INCARNATION
                # The seed makes the untouched run again: a snapshot without a blob.
                change.changed_seq, change.snapshot_seq = outcome.seq_id, outcome.seq_id
            case OpKind.LOAD_WEIGHTS:
                assert isinstance(op, LoadWeightsOp)
                change.changed_seq = outcome.seq_id
                if op.creates_model:
                    change.state, change.incarnation = ModelState.READY, FIRST_INCARNATION
                if op.with_optimizer:
                    # Without the optimiser the blob is not the state: restoring it would revive old moments.
                    change.snapshot_key, change.snapshot_seq = op.blob_key, outcome.seq_id
            case OpKind.FORWARD_BACKWARD:
                change.changed_seq = outcome.seq_id
                tenant = run.record.tenant_id
                self.trained_tokens[tenant] = self.trained_tokens.get(tenant, 0) + outcome.num_tokens_of_op
                self._log(outcome)
            case OpKind.OPTIM_STEP:
                change.changed_seq = outcome.seq_id
                self._log(outcome)
            case OpKind.SAVE_WEIGHTS:
                # The file holds everything, the open gradient included.
                assert isinstance(outcome.result, BlobResult)
                change.snapshot_key, change.snapshot_seq = outcome.result.blob_key, outcome.seq_id
            case OpKind.UNLOAD_MODEL:
                change.state = ModelState.UNLOADED
            case OpKind.FORWARD | OpKind.SAVE_FOR_SAMPLER:
                pass
            case OpKind.SAMPLE:
                raise AssertionError("samples are never part of a cycle")
            case _:
                assert_never(outcome.kind)

    def _log(self, outcome: OpOutcome) -> None:
        assert isinstance(outcome.result, PassResult | StepResult)
        metrics = {**outcome.result.metrics, "num_tokens": float(outcome.num_tokens_of_op)}
        self.run_log.append(
            RunLogEntry(
                model_id=outcome.model_id,
                seq_id=outcome.seq_id,
                kind=outcome.kind,
                created_at=self.now,
                metrics=metrics,
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
                snapshot_key=change.snapshot_key,
                snapshot_seq=change.snapshot_seq,
            )
            for model_id, change in self._changes.items()
        )
        return FinishedCycle(
            finished=tuple(self.finished),
            never_received=tuple(self.never_received),
            advances=advances,
            checkpoints=tuple(self.checkpoints),
            sampling_sessions=tuple(self.sampling_sessions),
            run_log=tuple(self.run_log),
            trained_tokens=self.trained_tokens,
        )
