"""The smallest possible scheduler: it drives an executor by hand and reads what comes back.

For contracts and for experiments at the seam. It keeps tags as the real scheduler does, and nothing else: no store,
no order, no recovery. Invariant: an op's place in a cycle is the place in which it was given.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.domain.ids import BlobKey, ModelId, RequestId, TenantId, op_request_id
from treadle.domain.ops import (
    CreateModelOp,
    LoadWeightsOp,
    LoraSpec,
    PassOp,
    SampleOp,
    SaveExternalOp,
    SaveForSamplerOp,
    SaveWeightsOp,
    TrainingOp,
    kind_of,
)
from treadle.domain.outcome import CycleOutcome, OpOutcome, PoolFacts, SampleOutcome
from treadle.domain.plan import FIRST_INCARNATION, CycleWork, PlannedOp, RestoreItem, SampleWork, StateTag, WorkItem
from treadle.domain.quanta import cut_quanta, quantum_tokens
from treadle.executor.base import Executor
from treadle.wire import treadle_pb2 as pb
from treadle.wire.payloads import encode_payload

Floats = NDArray[np.float32]

# Longer than any worker needs for one small call; a test that waits for so long has failed.
PATIENCE_S = 60.0


class Driver:
    """Runs ops on an executor, made by `started`. `token` is the leader's: raise it to be a newer one."""

    facts: PoolFacts

    def __init__(self, executor: Executor, *, token: int = 1) -> None:
        self.executor = executor
        self.token = token
        self.tags: dict[ModelId, StateTag | None] = {}
        self.sample_outcomes: list[SampleOutcome] = []
        self.deaths: list[str] = []
        self._sampled = asyncio.Event()
        self._cycles = itertools.count(1)

    def new_model_id(self) -> ModelId:
        """A run id that nobody has used."""
        return ModelId(f"{uuid.uuid4().hex}:train:0")

    def new_key(self) -> BlobKey:
        """A blob key that nobody has used."""
        return BlobKey(f"contract/{uuid.uuid4().hex}")

    async def run(self, *ops: TrainingOp, restores: Sequence[RestoreItem] = ()) -> list[OpOutcome]:
        """One cycle of whole ops."""
        return list((await self.run_cycle(*ops, restores=restores)).outcomes)

    async def run_cycle(self, *ops: TrainingOp, restores: Sequence[RestoreItem] = ()) -> CycleOutcome:
        """One cycle of whole ops, restores first: the ops start from what those make."""
        for restore in restores:
            self.tags[restore.model_id] = restore.tag
        return await self.run_items([self.item(op) for op in ops], restores=restores)

    async def run_items(
        self, items: Sequence[WorkItem], *, restores: Sequence[RestoreItem] = (), predicted_s: float = 0.0
    ) -> CycleOutcome:
        """One cycle of items made by `item`."""
        for model_id in {item.planned.model_id for item in items}:
            seq_ids = [item.planned.seq_id for item in items if item.planned.model_id == model_id]
            assert seq_ids == sorted(set(seq_ids)), "a plan keeps each model's order"
        work = CycleWork(self.token, next(self._cycles), tuple(items), tuple(restores), predicted_s)
        async with asyncio.timeout(PATIENCE_S):
            outcome = await self.executor.run_cycle(work)
        for op_outcome in outcome.outcomes:
            self.tags[op_outcome.model_id] = op_outcome.tag_after
        return outcome

    async def snapshot(self, tag: StateTag, *, with_open_gradient: bool = False) -> BlobKey | None:
        """Write the run's state at this tag; the key of its file, or None when it was left out."""
        key = self.new_key()
        async with asyncio.timeout(PATIENCE_S):
            written = await self.executor.snapshot([(tag, key)], with_open_gradient=with_open_gradient)
        assert written.keys() <= {tag.model_id}
        return key if written else None

    def item(self, op: TrainingOp, *, quanta: tuple[int, int] | None = None, tag: StateTag | None = None) -> WorkItem:
        """The work item of an op, or of the quanta [start, stop) of a pass; `tag` replaces the one it should have."""
        seq_id = 0 if isinstance(op, CreateModelOp) else op.seq_id
        sizes: tuple[int, ...] = ()
        if isinstance(op, PassOp):
            lengths = [datum.num_tokens for datum in op.datums]
            sizes = quantum_tokens(lengths, cut_quanta(lengths))
        start, stop = quanta or (0, len(sizes))
        return WorkItem(
            planned=PlannedOp(
                request_id=op_request_id(op.model_id, seq_id),
                model_id=op.model_id,
                seq_id=seq_id,
                kind=kind_of(op),
                quantum_start=start,
                quantum_stop=stop,
                num_tokens=sum(sizes[start:stop]),
                is_last_part=stop == len(sizes),
            ),
            payload=encode_payload(op),
            starts_from=tag or self._starting_tag(op, seq_id),
            blob_key=self.new_key() if isinstance(op, SaveWeightsOp | SaveForSamplerOp | SaveExternalOp) else None,
        )

    def _starting_tag(self, op: TrainingOp, seq_id: int) -> StateTag | None:
        if isinstance(op, CreateModelOp) or (isinstance(op, LoadWeightsOp) and op.creates_model):
            return None
        held = self.tags.get(op.model_id)
        incarnation = FIRST_INCARNATION if held is None else held.incarnation
        return StateTag(op.model_id, incarnation=incarnation, applied_seq=seq_id - 1)

    def restore_item(
        self, tag: StateTag, lora: LoraSpec, blob_key: BlobKey | None, *, with_optimizer: bool = True
    ) -> RestoreItem:
        """Rebuild the run that `tag` names, as its next incarnation."""
        next_tag = StateTag(tag.model_id, incarnation=tag.incarnation + 1, applied_seq=tag.applied_seq)
        return RestoreItem(tag.model_id, lora, blob_key, tag=next_tag, with_optimizer=with_optimizer)

    async def sample(self, *ops: SampleOp, prefix: str = "") -> list[SampleOutcome]:
        """Submit samples together and wait for all of them; outcomes in the order of `ops`."""
        request_ids = self.submit(*ops, prefix=prefix or uuid.uuid4().hex)
        await self.wait_for_samples(request_ids)
        by_id = {outcome.request_id: outcome for outcome in self.sample_outcomes}
        return [by_id[request_id] for request_id in request_ids]

    def submit(self, *ops: SampleOp, prefix: str) -> list[RequestId]:
        """Submit samples without waiting; their request ids."""
        works = [
            SampleWork(
                request_id=RequestId(f"{prefix}:{index}"),
                tenant_id=TenantId("tenant"),
                payload=encode_payload(op),
            )
            for index, op in enumerate(ops)
        ]
        self.executor.submit_samples(works)
        return [work.request_id for work in works]

    async def wait_for_samples(self, request_ids: Sequence[RequestId]) -> None:
        """Return when each of the requests has an outcome."""
        async with asyncio.timeout(PATIENCE_S):
            while not set(request_ids) <= {outcome.request_id for outcome in self.sample_outcomes}:
                self._sampled.clear()
                await self._sampled.wait()

    def take_samples(self, outcomes: Sequence[SampleOutcome]) -> None:
        """The executor's on_samples."""
        self.sample_outcomes += outcomes
        self._sampled.set()


@asynccontextmanager
async def started(executor: Executor) -> AsyncIterator[Driver]:
    """A driver of `executor`, which is started now and stopped at the end."""
    driver = Driver(executor)
    driver.facts = await executor.start(on_samples=driver.take_samples, on_death=driver.deaths.append)
    try:
        yield driver
    finally:
        await executor.stop()


def pass_logprobs(outcome: OpOutcome) -> list[Floats]:
    """Logprobs of every datum of a finished pass, read from the bytes that its client would get."""
    assert outcome.encoded is not None, f"{outcome.request_id} has no result: {outcome.failure}"
    message = pb.PassOutput.FromString(outcome.encoded.body)
    arrays: list[Floats] = []
    for record in message.records:
        tensor = record.fields["logprobs"]
        offsets = np.frombuffer(tensor.offsets, "<i8")
        for start, stop in itertools.pairwise(offsets.tolist()):
            arrays.append(np.frombuffer(tensor.data[start:stop], "<f4").reshape(-1, *tensor.trailing_shape))
    # Single-column targets have no trailing shape; reshape(-1) leaves them [T].
    return arrays


def pass_loss(outcome: OpOutcome) -> float:
    """The loss:sum that a client would get."""
    assert outcome.encoded is not None, f"{outcome.request_id} has no result: {outcome.failure}"
    return pb.PassOutput.FromString(outcome.encoded.body).metrics["loss:sum"]


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A sample as its client would see it. prompt_logprobs: float32 [P], or None when not asked for."""

    sequences: tuple[tuple[list[int], Floats], ...]
    prompt_logprobs: Floats | None
    topk_token_ids: NDArray[np.int32] | None


def read_sample(outcome: SampleOutcome) -> ReadSample:
    """A finished sample, read from the bytes that its client would get."""
    assert outcome.encoded is not None, f"{outcome.request_id} has no result: {outcome.failure}"
    message = pb.SampleOutput.FromString(outcome.encoded.body)
    topk = message.topk_prompt_logprobs
    return ReadSample(
        sequences=tuple(
            (np.frombuffer(sequence.tokens, "<i4").tolist(), np.frombuffer(sequence.logprobs, "<f4"))
            for sequence in message.sequences
        ),
        prompt_logprobs=np.frombuffer(message.prompt_logprobs, "<f4") if message.HasField("prompt_logprobs") else None,
        topk_token_ids=np.frombuffer(topk.token_ids, "<i4").reshape(topk.length, topk.k)
        if message.HasField("topk_prompt_logprobs")
        else None,
    )
