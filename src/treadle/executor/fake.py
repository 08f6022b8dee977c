"""An executor without a process and without torch: everything a client or a scheduler can see, in numpy.

It is for developers of clients, who want a server that starts at once and answers sensibly, and for tests of what
is above the seam. It keeps all of the seam's rules (state tags, fencing, whole ops, parts, exactly one outcome) and
passes the same contract as the real executors; only its model is a toy (see fake_model.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

import numpy as np

from treadle.blobs import BlobStore
from treadle.domain.ids import BlobKey, ModelId, RequestId
from treadle.domain.ops import (
    CreateModelOp,
    LoadWeightsOp,
    OpKind,
    OptimStepOp,
    PassOp,
    SaveForSamplerOp,
    SaveWeightsOp,
    UnloadModelOp,
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
    SampleOutcome,
    StepResult,
)
from treadle.domain.plan import FIRST_INCARNATION, CycleWork, RestoreItem, SampleWork, StateTag, WorkItem
from treadle.errors import Fenced, StaleTag, TreadleError, WorkerDied
from treadle.executor import fake_model
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.codec import decode_cycle, decode_samples, encode_cycle, encode_samples
from treadle.executor.fake_model import FakeState, Floats
from treadle.worker.failures import failure_of
from treadle.worker.work import DecodedItem, DecodedSample

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
    ) -> None:
        self._facts = facts
        self._worker = _FakeWorker(blobs, facts, eos_token_ids)
        self._turn = asyncio.Lock()
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
        self._check_alive()
        async with self._turn:
            outcome = await asyncio.to_thread(self._worker.run_cycle, work)
        self._check_alive()
        return outcome

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

    async def snapshot(self, targets: Sequence[tuple[StateTag, str]]) -> dict[ModelId, int]:
        """See Executor.snapshot."""
        self._check_alive()
        async with self._turn:
            return await asyncio.to_thread(self._worker.snapshot, targets)

    async def evict(self, model_ids: Sequence[ModelId]) -> None:
        """See Executor.evict."""
        self._check_alive()
        async with self._turn:
            for model_id in model_ids:
                self._worker.drop(model_id)

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


class _FakeWorker:
    """What a worker process holds. For one thread at a time, except for `sample`, which only reads blobs."""

    def __init__(self, blobs: BlobStore, facts: PoolFacts, eos_token_ids: frozenset[int]) -> None:
        self._blobs = blobs
        self._facts = facts
        self._eos_token_ids = eos_token_ids
        self._token = 0
        self._states: dict[ModelId, FakeState] = {}
        self._tags: dict[ModelId, StateTag] = {}
        self._skipped_passes: dict[ModelId, int] = {}
        # Quanta done of passes that are spread over cycles. The numbers are made with the last one.
        self._parts: dict[RequestId, int] = {}
        # Why a run's ops cannot run in this cycle, once its creation or its restore has failed.
        self._lost: dict[ModelId, Failure] = {}

    def run_cycle(self, work: CycleWork) -> CycleOutcome:
        """Run a cycle whole. Raises Fenced, with nothing done, when a newer leader was here."""
        if work.token < self._token:
            raise Fenced(f"cycle {work.cycle} carries token {work.token}, this worker has seen {self._token}")
        if work.token > self._token:
            self._token = work.token
            self._parts.clear()
        started = time.perf_counter()
        self._lost.clear()
        for restore in work.restores:
            self._restore(restore)
        outcomes = tuple(self._run(item) for item in decode_cycle(work).items)
        return encode_cycle(
            CycleOutcome(
                token=work.token,
                cycle=work.cycle,
                outcomes=outcomes,
                compute_s=time.perf_counter() - started,
                num_forwards=int(any(item.planned.quantum_stop > 0 for item in work.items)),
            )
        )

    def snapshot(self, targets: Sequence[tuple[StateTag, str]]) -> dict[ModelId, int]:
        """Write whole states, open gradient included; bytes per run. Other tags than the ones held are left out."""
        held = [(tag.model_id, key) for tag, key in targets if self._tags.get(tag.model_id) == tag]
        return {
            model_id: self._blobs.write(key, fake_model.encode_state(self._states[model_id])) for model_id, key in held
        }

    def drop(self, model_id: ModelId) -> None:
        """Forget a run. Idempotent."""
        for held in (self._states, self._tags, self._skipped_passes):
            held.pop(model_id, None)

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
        )

    def _weights(self, key: BlobKey | None) -> Floats:
        """Weights to sample from: of a blob, or of the bare base model."""
        return np.zeros(self._facts.vocab_size) if key is None else self._read(key).weights

    def _read(self, key: BlobKey) -> FakeState:
        return fake_model.decode_state(self._blobs.read(key), self._facts.vocab_size)

    def _restore(self, restore: RestoreItem) -> None:
        self.drop(restore.model_id)
        try:
            fresh = fake_model.new_state(restore.lora, self._facts.vocab_size)
            state = fresh if restore.blob_key is None else self._read(restore.blob_key)
        except TreadleError as error:
            self._lost[restore.model_id] = failure_of(error)
            return
        self._put(state, restore.tag)

    def _put(self, state: FakeState, tag: StateTag) -> None:
        self._states[tag.model_id], self._tags[tag.model_id] = state, tag
        self._skipped_passes[tag.model_id] = 0

    def _run(self, item: DecodedItem) -> OpOutcome:
        """One op: its final outcome, with its sequence number consumed, or a part that settles nothing yet."""
        planned = item.item.planned
        result: OpResult | Failure | None = self._refusal(item)
        if result is None and isinstance(item.op, PassOp) and not planned.is_last_part:
            self._parts[planned.request_id] = planned.quantum_stop
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
        """Why an op may not start. A state other than the one the leader means is dropped, for a restore."""
        planned, starts_from = item.item.planned, item.item.starts_from
        if isinstance(item.op, Failure):
            return item.op
        if planned.model_id in self._lost:
            return self._lost[planned.model_id]
        if planned.quantum_start > 0 and self._parts.get(planned.request_id) == planned.quantum_start:
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
            failure=failure,
            is_partial=is_partial,
            tag_after=self._tags.get(planned.model_id),
            num_tokens=planned.num_tokens if failure is None else 0,
        )


def _is_same_state(held: StateTag | None, starts_from: StateTag | None, seq_id: int) -> bool:
    """Whether an op may start (see WorkItem.starts_from)."""
    if held is None or starts_from is None:
        return held is starts_from
    return held.incarnation == starts_from.incarnation and held.applied_seq <= starts_from.applied_seq < seq_id
