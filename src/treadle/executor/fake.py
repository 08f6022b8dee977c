"""An executor without a process and without torch: everything a client or a scheduler can see, in numpy.

It is for developers of clients, who want a server that starts at once and answers sensibly, and for tests of what
is above the seam. It keeps all of the seam's rules (state tags, fencing, whole ops, parts, exactly one outcome) and
passes the same contract as the real executors; only its model is a toy (see fake_model.py). What goes wrong in it is
planned (see faults.py); a hang ends with `die`, as the real executor ends one that it has noticed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, assert_never

import numpy as np

from treadle.blobs import BlobStore
from treadle.domain.archive import pack_files
from treadle.domain.ids import BlobKey, ModelId, RequestId
from treadle.domain.ops import (
    CreateModelOp,
    LoadWeightsOp,
    OpKind,
    OptimStepOp,
    PassOp,
    SaveExternalOp,
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
    PassResult,
    PoolFacts,
    RestoreEnd,
    RestoreOutcome,
    SampleOutcome,
    SnapshotWritten,
    StepResult,
)
from treadle.domain.plan import FIRST_INCARNATION, CycleWork, RestoreItem, SampleWork, StateTag, WorkItem
from treadle.domain.stability import recorded
from treadle.errors import Fenced, InvalidRequest, StaleTag, StoreUnavailable, TreadleError, WorkerDied
from treadle.executor import fake_model
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.codec import decode_cycle, decode_samples, encode_cycle, encode_samples
from treadle.executor.fake_model import FakeState, Floats
from treadle.executor.faults import Fault, Faults, Moment
from treadle.telemetry.logs import get_logger
from treadle.worker.encryption import encrypted
from treadle.worker.failures import MustRestore, failure_of, must_restore, restore_end_of
from treadle.worker.timings import PART_OF_PHASE, Timings
from treadle.worker.work import DecodedItem, DecodedSample

log = get_logger(__name__)

Value = TypeVar("Value")

# Facts of the bundled tiny model where clients notice them, so that its tokenizer fits.
DEFAULT_FACTS = PoolFacts(
    base_model="treadle/fake",
    revision="fake",
    architecture="FakeForCausalLM",
    vocab_size=1_280,
    max_context_length=2_048,
    num_parameters=1_280,
    dtype="float64",
    device="cpu",
    numerics_profile="numpy",
)
DEFAULT_EOS_TOKEN_IDS = frozenset({2})


class FakeExecutor:
    """One worker that lives in this process. Calls are served one at a time; blob I/O and maths run in a thread."""

    def __init__(
        self,
        blobs: BlobStore,
        *,
        facts: PoolFacts = DEFAULT_FACTS,
        eos_token_ids: frozenset[int] = DEFAULT_EOS_TOKEN_IDS,
        faults: Faults | None = None,
    ) -> None:
        self._facts = facts
        self._worker = _FakeWorker(blobs, facts, eos_token_ids, faults or Faults())
        self._turn = asyncio.Lock()
        self._ended = asyncio.Event()
        self._on_samples: SamplesCallback | None = None
        self._on_death: DeathCallback | None = None
        self._end_reason: str | None = None
        self._samples: dict[RequestId, DecodedSample] = {}
        self._sampling: asyncio.Task[None] | None = None

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        """See Executor.start."""
        assert self._on_samples is None, "an executor starts once"
        self._on_samples, self._on_death = on_samples, on_death
        return self._facts

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        """See Executor.run_cycle."""
        # Before its turn, so that a cycle on its way for an older leader ends early.
        self._worker.note_token(work.token)
        return await self._call(lambda: self._worker.run_cycle(work))

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        """See Executor.submit_samples."""
        self._check_alive()
        decoded, refused = decode_samples(samples)
        for sample in decoded:
            self._samples.setdefault(sample.request_id, sample)
        if refused:
            asyncio.get_running_loop().call_soon(self._report, refused)
        if self._samples and (self._sampling is None or self._sampling.done()):
            self._sampling = asyncio.create_task(self._sample_all(), name="fake-sampler")

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """See Executor.cancel_samples."""
        for request_id in request_ids:
            self._samples.pop(request_id, None)

    async def snapshot(
        self, targets: Sequence[tuple[StateTag, str]], *, with_open_gradient: bool = False
    ) -> dict[ModelId, SnapshotWritten]:
        """See Executor.snapshot. Cycles wait meanwhile: nobody can tell, writing a few bytes takes no time."""
        return await self._call(lambda: self._worker.snapshot(targets, with_open_gradient=with_open_gradient))

    async def evict(self, model_ids: Sequence[ModelId]) -> None:
        """See Executor.evict."""

        def evict() -> None:
            for model_id in model_ids:
                self._worker.drop(model_id)

        await self._call(evict)

    async def _call(self, work: Callable[[], Value]) -> Value:
        """Have the worker do something, in a thread and in turn. A fault that strikes ends the executor."""
        self._check_alive()
        async with self._turn:
            self._check_alive()
            try:
                value = await asyncio.to_thread(work)
            except _Struck as struck:
                if struck.fault is Fault.DEATH:
                    self.die(f"a planned death: {struck.moment}")
                await self._ended.wait()
                raise WorkerDied(f"{self._end_reason}") from struck
        self._check_alive()
        return value

    async def stop(self) -> None:
        """See Executor.stop."""
        self._end("the worker was stopped")
        if self._sampling is not None:
            await asyncio.wait([self._sampling])

    def die(self, reason: str) -> None:
        """End as a killed process does: all states are gone, what runs raises WorkerDied, on_death is called once."""
        if self._end_reason is None and self._on_death is not None:
            self._end(reason)
            self._on_death(reason)

    def _end(self, reason: str) -> None:
        self._end_reason = self._end_reason or reason
        self._ended.set()
        self._samples.clear()
        if self._sampling is not None:
            self._sampling.cancel()

    def _check_alive(self) -> None:
        assert self._on_samples is not None, "start comes first"
        if self._end_reason is not None:
            raise WorkerDied(self._end_reason)

    async def _sample_all(self) -> None:
        """Serve waiting samples, oldest first; one that is cancelled meanwhile ends without an outcome."""
        while self._samples:
            request_id, sample = next(iter(self._samples.items()))
            outcome = await asyncio.to_thread(self._worker.sample, sample)
            if self._samples.pop(request_id, None) is not None:
                self._report(encode_samples([outcome]))

    def _report(self, outcomes: Sequence[SampleOutcome]) -> None:
        if self._on_samples is not None and self._end_reason is None:
            self._on_samples(outcomes)


class _Struck(Exception):
    """A death or a hang strikes."""

    def __init__(self, fault: Fault, moment: Moment) -> None:
        super().__init__(fault, moment)
        self.fault = fault
        self.moment = moment


@dataclass(frozen=True, slots=True)
class _Part:
    """A pass that is spread over cycles: the quanta done. Its numbers are made with the last one."""

    model_id: ModelId
    quantum_stop: int


class _FakeWorker:
    """What a worker process holds. For one thread at a time, except for `sample` and `note_token`."""

    def __init__(self, blobs: BlobStore, facts: PoolFacts, eos_token_ids: frozenset[int], faults: Faults) -> None:
        self._blobs = blobs
        self._facts = facts
        self._eos_token_ids = eos_token_ids
        self._faults = faults
        # The newest leader that has spoken, and the one whose cycle ran last.
        self._newest_token = 0
        self._token = 0
        self._states: dict[ModelId, FakeState] = {}
        self._tags: dict[ModelId, StateTag] = {}
        self._skipped_passes: dict[ModelId, int] = {}
        self._parts: dict[RequestId, _Part] = {}
        # Why a run's ops cannot run in this cycle, once its creation or its restore has failed.
        self._lost: dict[ModelId, Failure] = {}

    def note_token(self, token: int) -> None:
        """A leader speaks: a cycle of an older one ends before its next op."""
        self._newest_token = max(self._newest_token, token)

    def run_cycle(self, work: CycleWork) -> CycleOutcome:
        """Run a cycle whole. Raises Fenced when a newer leader was here; then the cycle's runs are forgotten."""
        self._check_token(work)
        if work.token > self._token:
            self._token = work.token
            self._parts.clear()
        started = time.perf_counter()
        self._lost.clear()
        model_ids = {item.planned.model_id for item in work.items} | {one.model_id for one in work.restores}
        self._maybe_end(Moment.CYCLE_TAKEN, model_ids)
        outcomes: list[OpOutcome] = []
        timings = Timings()
        try:
            restores = tuple(self._restore(restore) for restore in work.restores)
            for item in decode_cycle(work).items:
                self._check_token(work)
                planned = item.item.planned
                with timings.of(PART_OF_PHASE[phase_of(planned.kind)], planned.model_id, planned.request_id):
                    outcomes.append(self._run(item))
                self._maybe_end(Moment.OP_DONE, {planned.model_id})
        except Fenced:
            for model_id in model_ids:
                self.drop(model_id)
            raise
        self._maybe_end(Moment.CYCLE_DONE, model_ids)
        return encode_cycle(
            CycleOutcome(
                token=work.token,
                cycle=work.cycle,
                outcomes=tuple(outcomes),
                compute_s=time.perf_counter() - started,
                num_forwards=int(any(item.planned.quantum_stop > 0 for item in work.items)),
                restores=restores,
                timings=tuple(timings.taken),
            )
        )

    def _check_token(self, work: CycleWork) -> None:
        if work.token < self._newest_token:
            raise Fenced(f"cycle {work.cycle} carries token {work.token}, this worker has seen {self._newest_token}")

    def _maybe_end(self, moment: Moment, model_ids: Collection[ModelId]) -> Fault | None:
        """A fault that the worker survives, if one strikes. Raises _Struck for the others."""
        fault = self._faults.strike(moment, model_ids)
        if fault in (Fault.DEATH, Fault.HANG):
            raise _Struck(fault, moment)
        return fault

    def snapshot(
        self, targets: Sequence[tuple[StateTag, str]], *, with_open_gradient: bool
    ) -> dict[ModelId, SnapshotWritten]:
        """See Executor.snapshot."""
        written: dict[ModelId, SnapshotWritten] = {}
        for tag, key in targets:
            if self._tags.get(tag.model_id) != tag or (self._is_open(tag.model_id) and not with_open_gradient):
                continue
            if self._maybe_end(Moment.SNAPSHOT_TAKEN, {tag.model_id}) is not None:
                continue
            started = time.perf_counter()
            data = fake_model.encode_state(self._states[tag.model_id])
            compute_s = time.perf_counter() - started
            try:
                num_bytes = self._blobs.write(key, data)
            except TreadleError as error:
                log.error("snapshot failed", model_id=tag.model_id, reason=error.message)
                continue
            self._maybe_end(Moment.SNAPSHOT_DURABLE, {tag.model_id})
            written[tag.model_id] = SnapshotWritten(num_bytes=num_bytes, compute_s=compute_s)
        return written

    def _is_open(self, model_id: ModelId) -> bool:
        is_partly_done = any(part.model_id == model_id for part in self._parts.values())
        return is_partly_done or self._states[model_id].num_open_passes > 0

    def drop(self, model_id: ModelId) -> None:
        """Forget a run. Idempotent."""
        for held in (self._states, self._tags, self._skipped_passes):
            held.pop(model_id, None)
        self._parts = {name: part for name, part in self._parts.items() if part.model_id != model_id}

    def sample(self, sample: DecodedSample) -> SampleOutcome:
        """The outcome of one sample; a failure is an outcome too."""
        op = sample.op
        try:
            result = fake_model.run_sample(
                self._weights(op.blob_key),
                op,
                max_context_length=self._facts.max_context_length,
                eos_token_ids=self._eos_token_ids,
            )
        except TreadleError as error:
            return SampleOutcome(sample.request_id, failure=failure_of(error), num_prompt_tokens=len(op.prompt))
        return SampleOutcome(
            request_id=sample.request_id,
            result=result,
            num_prompt_tokens=len(op.prompt),
            num_sampled_tokens=sum(len(sequence.tokens) for sequence in result.sequences),
            recorded=recorded(((s.tokens, s.logprobs) for s in result.sequences), len(op.prompt))
            if op.record_stability_info
            else (),
        )

    def _weights(self, key: BlobKey | None) -> Floats:
        """Weights to sample from: of a blob, or of the bare base model."""
        return np.zeros(self._facts.vocab_size) if key is None else self._read(key).weights

    def _read(self, key: BlobKey) -> FakeState:
        return fake_model.decode_state(self._blobs.read(key), self._facts.vocab_size)

    def _restore(self, restore: RestoreItem) -> RestoreOutcome:
        model_id = restore.model_id
        self.drop(model_id)
        fault = self._maybe_end(Moment.RESTORE_TAKEN, {model_id})
        try:
            if fault is Fault.UNREADABLE:
                raise InvalidRequest("a planned fault: the snapshot is damaged")
            if fault is Fault.FAILED:
                raise StoreUnavailable("a planned fault: the blob store does not answer")
            state = self._restored(restore)
        except TreadleError as error:
            self._lost[model_id] = must_restore(f"run {model_id} could not be restored: {error.message}")
            return RestoreOutcome(model_id, restore_end_of(error), error.message)
        self._put(state, restore.tag)
        return RestoreOutcome(model_id, RestoreEnd.DONE)

    def _restored(self, restore: RestoreItem) -> FakeState:
        if restore.blob_key is None:
            return fake_model.new_state(restore.lora, self._facts.vocab_size)
        state = self._read(restore.blob_key)
        return state if restore.with_optimizer else fake_model.weights_only(state)

    def _put(self, state: FakeState, tag: StateTag) -> None:
        self._states[tag.model_id], self._tags[tag.model_id] = state, tag
        self._skipped_passes[tag.model_id] = 0

    def _run(self, item: DecodedItem) -> OpOutcome:
        """One op: its final outcome, with its sequence number consumed, or a part that settles nothing yet."""
        planned = item.item.planned
        result: OpResult | Failure | None = self._refusal(item)
        if result is None and isinstance(item.op, PassOp) and not planned.is_last_part:
            self._parts[planned.request_id] = _Part(planned.model_id, planned.quantum_stop)
            return self._outcome(item.item, is_partial=True)
        self._parts.pop(planned.request_id, None)
        if result is None:
            result = self._guarded(item)
        if isinstance(result, Failure):
            self._note_failure(item, result)
        held = self._tags.get(planned.model_id)
        if held is not None:
            self._tags[planned.model_id] = replace(held, applied_seq=planned.seq_id)
        outcome = self._outcome(item.item, result=result)
        if isinstance(result, PassResult) and isinstance(item.op, PassOp):
            return replace(outcome, num_tokens_of_op=sum(datum.num_tokens for datum in item.op.datums))
        return outcome

    def _refusal(self, item: DecodedItem) -> Failure | None:
        """Why an op may not start. A state other than the one that it starts from is dropped, for a restore."""
        planned, starts_from = item.item.planned, item.item.starts_from
        if isinstance(item.op, Failure):
            return item.op
        if planned.model_id in self._lost:
            return self._lost[planned.model_id]
        part = self._parts.get(planned.request_id)
        if part is not None and 0 < planned.quantum_start == part.quantum_stop:
            return None
        held = self._tags.get(planned.model_id)
        if _is_same_state(held, starts_from, planned.seq_id):
            assert planned.quantum_start == 0, "a pass that this worker has not seen starts with its first part"
            return None
        self.drop(planned.model_id)
        return failure_of(
            StaleTag(f"run {planned.model_id}: op {planned.seq_id} starts from another state than is held")
        )

    def _guarded(self, item: DecodedItem) -> OpResult | Failure:
        try:
            return self._apply(item)
        except TreadleError as error:
            return failure_of(error)

    def _note_failure(self, item: DecodedItem, failure: Failure) -> None:
        model_id = item.item.planned.model_id
        if isinstance(failure, MustRestore):
            return
        if item.item.starts_from is None:
            message = f"run {model_id} does not exist: its creation failed: {failure.message}"
            self._lost[model_id] = Failure(message, failure.category)
        elif item.item.planned.kind is OpKind.FORWARD_BACKWARD and model_id in self._states:
            self._skipped_passes[model_id] += 1

    def _apply(self, item: DecodedItem) -> OpResult:
        """Run an op whole. Raises TreadleError with nothing changed."""
        op, planned = item.op, item.item.planned
        model_id = planned.model_id
        match op:
            case CreateModelOp():
                state = fake_model.new_state(op.lora, self._facts.vocab_size)
                self._put(state, StateTag(model_id, incarnation=FIRST_INCARNATION, applied_seq=planned.seq_id))
                return ModelResult(model_id)
            case LoadWeightsOp():
                return self._load(op, item.item.starts_from)
            case PassOp():
                result, self._states[model_id] = fake_model.run_pass(self._states[model_id], op)
                return result
            case OptimStepOp():
                metrics, self._states[model_id] = fake_model.run_step(self._states[model_id], op.adam)
                num_skipped = self._skipped_passes[model_id] + item.item.num_refused_passes
                self._skipped_passes[model_id] = 0
                return StepResult({**metrics, "skipped_passes": float(num_skipped)})
            case SaveWeightsOp() | SaveForSamplerOp():
                return self._save(model_id, item.item.blob_key)
            case SaveExternalOp():
                return self._export(op, item.item.blob_key)
            case UnloadModelOp():
                self.drop(model_id)
                return ModelResult(model_id)
            case Failure():
                raise AssertionError("unreadable ops are refused before")
            case _:
                assert_never(op)

    def _load(self, op: LoadWeightsOp, starts_from: StateTag | None) -> ModelResult:
        saved = self._read(op.blob_key)
        state = saved if op.with_optimizer else fake_model.weights_only(saved)
        incarnation = FIRST_INCARNATION if starts_from is None else starts_from.incarnation
        self._put(state, StateTag(op.model_id, incarnation=incarnation, applied_seq=op.seq_id))
        return ModelResult(op.model_id)

    def _save(self, model_id: ModelId, key: BlobKey | None) -> BlobResult:
        assert key is not None, "the scheduler assigns a key to every save"
        state = self._states[model_id]
        return BlobResult(key, num_bytes=self._blobs.write(key, fake_model.encode_state(state)), lora=state.lora)

    def _export(self, op: SaveExternalOp, key: BlobKey | None) -> BlobResult:
        assert key is not None, "the scheduler assigns a key to every save"
        state = self._states[op.model_id]
        files = fake_model.export_state(state, base_model=self._facts.base_model)
        num_bytes = self._blobs.write(key, pack_files(encrypted(files, op.recipients)))
        return BlobResult(key, num_bytes=num_bytes, lora=state.lora)

    def _outcome(
        self, item: WorkItem, *, result: OpResult | Failure | None = None, is_partial: bool = False
    ) -> OpOutcome:
        planned = item.planned
        failure = result if isinstance(result, Failure) else None
        return OpOutcome(
            request_id=planned.request_id,
            model_id=planned.model_id,
            seq_id=planned.seq_id,
            kind=planned.kind,
            result=None if isinstance(result, Failure) else result,
            failure=None if failure is None else Failure(failure.message, failure.category),
            is_partial=is_partial,
            tag_after=self._tags.get(planned.model_id),
            num_tokens=planned.num_tokens if failure is None else 0,
            must_restore=isinstance(failure, MustRestore),
        )


def _is_same_state(held: StateTag | None, starts_from: StateTag | None, seq_id: int) -> bool:
    """Whether an op may start (see WorkItem.starts_from)."""
    if held is None or starts_from is None:
        return held is starts_from
    return held.incarnation == starts_from.incarnation and held.applied_seq <= starts_from.applied_seq < seq_id
