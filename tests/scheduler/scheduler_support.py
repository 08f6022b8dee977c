"""A pool with a real store and a fake worker, driven through its public face: rows in, committed futures out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry

from treadle.blobs import BlobStore, open_blobs
from treadle.domain.ids import (
    BlobKey,
    ModelId,
    PoolName,
    RequestId,
    SamplingSessionId,
    SessionId,
    TenantId,
    op_request_id,
    sample_request_id,
)
from treadle.domain.limits import MAX_INLINE_PAYLOAD_BYTES
from treadle.domain.ops import CreateModelOp, LoadWeightsOp, LoraSpec, OpKind, PassOp, SampleOp, TrainingOp, kind_of
from treadle.domain.outcome import Failure
from treadle.domain.policy import Policies
from treadle.domain.quanta import cut_quanta, quantum_tokens
from treadle.domain.records import FutureRecord, ModelRecord, NewRequest, SamplingSessionRecord, SessionRecord
from treadle.domain.roles import Role, Scale
from treadle.domain.states import Category, ModelState, RequestState, SessionState
from treadle.executor.fake import FakeExecutor
from treadle.executor.faults import Faults
from treadle.scheduler.clock_settings import CycleSettings
from treadle.scheduler.cycle_loop import CycleLoop
from treadle.scheduler.pool import PoolRunner
from treadle.store import Store
from treadle.telemetry.metrics import Metrics
from treadle.testing.clock import ManualClock
from treadle.wire.payloads import encode_payload

POOL = PoolName("treadle/fake")
SESSION = SessionId("session")
TENANT = TenantId("tenant")
# A sampling session on the bare base model; the builders' default.
SAMPLER = SamplingSessionId("session:sample:0")
# Nothing here takes this long; a test that waits so long has failed.
PATIENCE_S = 20.0
SETTINGS = CycleSettings(
    gather_window_s=0.005, target_cycle_s=0.5, budget_tokens=8192, cap_fraction=0.5, gap_wait_s=30.0
)


class Cluster:
    """A store, blobs and one pool runner whose workers are fakes; `executors` holds every worker it has had."""

    def __init__(self, store: Store, blobs: BlobStore, clock: ManualClock) -> None:
        self.store = store
        self.blobs = blobs
        self.clock = clock
        self.executors: list[FakeExecutor] = []
        # What goes wrong in any of them, what makes the next ones, and how the clock of the next runner beats.
        self.faults = Faults()
        self.new_worker: Callable[[BlobStore], FakeExecutor] = lambda blobs: FakeExecutor(blobs, faults=self.faults)
        self.settings = SETTINGS
        # How many workers the next runner has.
        self.scale = Scale()
        # What operators decided, as every runner knows it.
        self.policies = Policies()
        self.runner = self._new_runner()
        self._task: asyncio.Task[None] | None = None
        store.events.on_enqueued(lambda _pool, kind: self.runner.wake(kind))

    @staticmethod
    async def open(folder: Path) -> Cluster:
        """An empty store with one session in it; the pool is not started."""
        clock = ManualClock()
        store = await Store.open(f"sqlite:///{folder / 'test.db'}", clock=clock.now)
        now = clock.now()
        await store.sessions.create(SessionRecord(SESSION, TENANT, SessionState.ACTIVE, now, now), None)
        await store.sampling.create(SamplingSessionRecord(SAMPLER, SESSION, TENANT, POOL, POOL, now))
        return Cluster(store, open_blobs(str(folder / "blobs")), clock)

    def _new_runner(self) -> PoolRunner:
        return PoolRunner(
            pool=POOL,
            store=self.store,
            blobs=self.blobs,
            make_executor=self._make_executor,
            settings=self.settings,
            holder="test",
            lease_ttl_s=1000.0,
            metrics=Metrics(CollectorRegistry()),
            clock=self.clock.now,
            policies=lambda: self.policies,
            scale=self.scale,
        )

    def _make_executor(self, _index: int, _role: Role) -> FakeExecutor:
        executor = self.new_worker(self.blobs)
        self.executors.append(executor)
        return executor

    @property
    def worker(self) -> FakeExecutor:
        """The newest worker."""
        return self.executors[-1]

    def loops(self) -> list[CycleLoop]:
        """Those of the workers that train, while the pool is led."""
        crew = self.runner._crew
        return [] if crew is None else crew._loops()

    def start(self) -> None:
        """Lead the pool with a fresh runner, as a restarted server does."""
        self.runner = self._new_runner()
        self._task = asyncio.create_task(self.runner.run())

    async def drain(self) -> None:
        """Stop as SIGTERM does."""
        assert self._task is not None
        self.runner.drain()
        async with asyncio.timeout(PATIENCE_S):
            await self._task

    async def crash(self) -> None:
        """Stop as SIGKILL does: nothing is finished, nothing is persisted."""
        assert self._task is not None
        if self.executors:
            self.worker.die("killed with its server")
        self._task.cancel()
        await asyncio.wait([self._task])

    async def close(self) -> None:
        if self._task is not None and not self._task.done():
            await self.crash()
        await self.store.close()

    async def create(self, model_id: ModelId, *, rank: int = 8, refused: Failure | None = None) -> RequestId:
        """Queue a create_model, as the gateway does."""
        op = CreateModelOp(model_id, base_model=POOL, lora=LoraSpec(rank=rank, seed=7))
        record = ModelRecord(
            model_id=model_id,
            session_id=SESSION,
            tenant_id=TENANT,
            pool=POOL,
            base_model=POOL,
            revision="fake",
            lora=op.lora,
            state=ModelState.FAILED if refused else ModelState.CREATING,
            next_seq_id=0,
            created_at=self.clock.now(),
            last_request_at=self.clock.now(),
        )
        return await self.store.models.create(record, replace(_request(op), failure=refused))

    async def load(self, op: LoadWeightsOp) -> RequestId:
        """Queue a load that creates its run."""
        record = ModelRecord(
            model_id=op.model_id,
            session_id=SESSION,
            tenant_id=TENANT,
            pool=POOL,
            base_model=POOL,
            revision="fake",
            lora=op.lora,
            state=ModelState.CREATING,
            next_seq_id=0,
            created_at=self.clock.now(),
            last_request_at=self.clock.now(),
        )
        return await self.store.models.create(
            record, replace(_request(op), seq_id=0, request_id=op_request_id(op.model_id, 0))
        )

    async def submit(self, *ops: TrainingOp) -> list[RequestId]:
        """Queue ops in the given order; those that are too large for a row through a blob."""
        request_ids = []
        for op in ops:
            request = _request(op)
            if len(request.payload) > MAX_INLINE_PAYLOAD_BYTES:
                request_id, _key = await self.submit_large(op)
            else:
                request_id = await self.store.requests.enqueue(request)
            request_ids.append(request_id)
        return request_ids

    async def submit_large(self, op: TrainingOp | SampleOp) -> tuple[RequestId, BlobKey]:
        """Queue an op whose payload is a blob, as the gateway does with more than 64 KiB."""
        request = _sample_request(op) if isinstance(op, SampleOp) else _request(op)
        key = BlobKey(f"payloads/{request.request_id.replace(':', '_')}/{uuid.uuid4().hex}")
        self.blobs.write(key, request.payload)
        return await self.store.requests.enqueue(replace(request, payload=b"", payload_key=key)), key

    async def restart(self) -> None:
        """Crash and start again: every state that is not in a blob is gone."""
        await self.crash()
        self.start()

    async def refuse(self, model_id: ModelId, seq_id: int) -> RequestId:
        """A pass that admission refused: a FAILED row."""
        failure = Failure("loss_fn 'hinge' is not known", Category.USER)
        request = NewRequest(
            request_id=op_request_id(model_id, seq_id),
            tenant_id=TENANT,
            pool=POOL,
            kind=OpKind.FORWARD_BACKWARD,
            seq_id=seq_id,
            num_tokens=0,
            model_id=model_id,
            failure=failure,
        )
        return await self.store.requests.enqueue(request)

    async def submit_sample(self, op: SampleOp) -> RequestId:
        return await self.store.requests.enqueue(_sample_request(op))

    async def future(self, request_id: RequestId) -> FutureRecord:
        """The final state of a request, as soon as it is committed."""
        changed = asyncio.Event()
        unsubscribe = self.store.events.on_finished(lambda _ids: changed.set())
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    changed.clear()
                    record = await self.store.requests.future(request_id)
                    assert record is not None, f"{request_id} has no row"
                    if record.state is not RequestState.QUEUED:
                        return record
                    await changed.wait()
        finally:
            unsubscribe()

    async def result(self, request_id: RequestId) -> bytes:
        """The bytes of a request that succeeds."""
        record = await self.future(request_id)
        assert record.failure is None, record.failure
        assert record.result is not None
        return record.result.body

    async def failure(self, request_id: RequestId) -> Failure:
        """Why a request failed."""
        record = await self.future(request_id)
        assert record.failure is not None, f"{request_id} succeeded"
        return record.failure

    async def run(self, *ops: TrainingOp) -> list[bytes]:
        """Queue ops that all succeed; their results."""
        return [await self.result(request_id) for request_id in await self.submit(*ops)]

    async def model(self, model_id: ModelId) -> ModelRecord:
        record = await self.store.models.get(model_id)
        assert record is not None
        return record


def _sample_request(op: SampleOp) -> NewRequest:
    return NewRequest(
        request_id=sample_request_id(op.sampling_session_id, op.seq_id),
        tenant_id=TENANT,
        pool=POOL,
        kind=OpKind.SAMPLE,
        seq_id=op.seq_id,
        num_tokens=len(op.prompt),
        sampling_session_id=op.sampling_session_id,
        payload=encode_payload(op),
    )


def _request(op: TrainingOp) -> NewRequest:
    sizes: tuple[int, ...] = ()
    if isinstance(op, PassOp):
        lengths = [datum.num_tokens for datum in op.datums]
        sizes = quantum_tokens(lengths, cut_quanta(lengths))
    seq_id = 0 if isinstance(op, CreateModelOp) else op.seq_id
    return NewRequest(
        request_id=op_request_id(op.model_id, seq_id),
        tenant_id=TENANT,
        pool=POOL,
        kind=kind_of(op),
        seq_id=seq_id,
        num_tokens=sum(sizes),
        quantum_tokens=sizes,
        model_id=op.model_id,
        payload=encode_payload(op),
    )
