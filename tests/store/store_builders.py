"""Small valid records for the store's tests: name what matters, the rest is filled in."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.domain.ids import (
    BlobKey,
    CheckpointKind,
    ModelId,
    PoolName,
    SamplingSessionId,
    SessionId,
    TenantId,
    op_request_id,
    sample_request_id,
)
from treadle.domain.ops import LoraSpec, OpKind
from treadle.domain.outcome import EncodedResult, Failure
from treadle.domain.records import (
    CheckpointRecord,
    FinishedRequest,
    LeaseRecord,
    ModelRecord,
    NewRequest,
    SamplingSessionRecord,
    SessionRecord,
    SnapshotRecord,
)
from treadle.domain.states import Category, ModelState, SessionState
from treadle.store import Store

TENANT = TenantId("user:ada")
OTHER_TENANT = TenantId("user:bob")
POOL = PoolName("treadle/tiny")
SESSION = SessionId("s1")
MODEL = ModelId("s1:train:0")
SAMPLER = SamplingSessionId("s1:sample:0")

REFUSED = Failure("rank 0 is too small", Category.USER)


def session(session_id: str = SESSION, *, tenant: TenantId = TENANT, created_at: float = 1.0) -> SessionRecord:
    return SessionRecord(
        session_id=SessionId(session_id),
        tenant_id=tenant,
        state=SessionState.ACTIVE,
        created_at=created_at,
        last_heartbeat_at=created_at,
        sdk_version="0.38",
        project_id="project",
        display_name="a name",
        user_metadata={"why": "test"},
    )


def model(
    model_id: str = MODEL, *, session_id: str = SESSION, tenant: TenantId = TENANT, created_at: float = 1.0
) -> ModelRecord:
    return ModelRecord(
        model_id=ModelId(model_id),
        session_id=SessionId(session_id),
        tenant_id=tenant,
        pool=POOL,
        base_model="treadle/tiny",
        revision="abc",
        # Larger than any column of the database: seeds are kept as JSON.
        lora=LoraSpec(rank=8, seed=2**64 - 1, train_unembed=False),
        state=ModelState.CREATING,
        next_seq_id=0,
        created_at=created_at,
        last_request_at=created_at,
        user_metadata={"colour": "blue"},
    )


def op(
    seq_id: int,
    kind: OpKind = OpKind.FORWARD_BACKWARD,
    *,
    model_id: str = MODEL,
    payload: bytes = b"payload",
    payload_key: str | None = None,
    failure: Failure | None = None,
    num_tokens: int = 32,
    pool: PoolName = POOL,
    tenant: TenantId = TENANT,
) -> NewRequest:
    return NewRequest(
        request_id=op_request_id(ModelId(model_id), seq_id),
        tenant_id=tenant,
        pool=pool,
        kind=kind,
        seq_id=seq_id,
        num_tokens=num_tokens,
        quantum_tokens=(num_tokens,),
        model_id=ModelId(model_id),
        payload=payload,
        payload_key=None if payload_key is None else BlobKey(payload_key),
        failure=failure,
    )


def creation(model_id: str = MODEL, *, failure: Failure | None = None, tenant: TenantId = TENANT) -> NewRequest:
    return op(0, OpKind.CREATE_MODEL, model_id=model_id, num_tokens=0, failure=failure, tenant=tenant)


def sampling_session(sampling_session_id: str = SAMPLER, *, base_model: str = "treadle/tiny") -> SamplingSessionRecord:
    return SamplingSessionRecord(
        sampling_session_id=SamplingSessionId(sampling_session_id),
        session_id=SESSION,
        tenant_id=TENANT,
        pool=POOL,
        base_model=base_model,
        created_at=1.0,
    )


def sample(seq_id: int, *, sampler: str = SAMPLER, failure: Failure | None = None) -> NewRequest:
    return NewRequest(
        request_id=sample_request_id(SamplingSessionId(sampler), seq_id),
        tenant_id=TENANT,
        pool=POOL,
        kind=OpKind.SAMPLE,
        seq_id=seq_id,
        num_tokens=5,
        sampling_session_id=SamplingSessionId(sampler),
        payload=b"prompt",
        failure=failure,
    )


def checkpoint(
    name: str = "0001",
    *,
    kind: CheckpointKind = CheckpointKind.TRAINING,
    blob_key: str = "blob/1",
    created_at: float = 1.0,
    seq_id: int = 1,
    expires_at: float | None = None,
) -> CheckpointRecord:
    return CheckpointRecord(
        model_id=MODEL,
        tenant_id=TENANT,
        kind=kind,
        name=name,
        tinker_path=f"tinker://{MODEL}/{kind.value}/{name}",
        blob_key=BlobKey(blob_key),
        size_bytes=10,
        seq_id=seq_id,
        created_at=created_at,
        base_model="treadle/tiny",
        lora=LoraSpec(rank=8, seed=1),
        expires_at=expires_at,
        user_metadata={"step": "1"},
    )


def snapshot(
    seq_id: int, *, model_id: str = MODEL, blob_key: str | None = "", with_optimizer: bool = True
) -> SnapshotRecord:
    """With a blob of its own unless one, or None for none, is given."""
    key = f"snapshots/{model_id}/{seq_id}" if blob_key == "" else blob_key
    return SnapshotRecord(
        model_id=ModelId(model_id),
        seq_id=seq_id,
        blob_key=None if key is None else BlobKey(key),
        with_optimizer=with_optimizer,
        num_bytes=1_000,
        numerics_profile="cpu",
    )


def done(request: NewRequest, body: bytes = b"result") -> FinishedRequest:
    return FinishedRequest(request.request_id, result=EncodedResult("application/json", body))


def failed(request: NewRequest, message: str = "NaN") -> FinishedRequest:
    return FinishedRequest(request.request_id, failure=Failure(message, Category.USER))


async def lead(store: Store, holder: str = "leader") -> LeaseRecord:
    lease = await store.leases.acquire(POOL, holder, ttl_s=60.0)
    assert lease is not None
    return lease


async def with_run(store: Store, *model_ids: str) -> None:
    """A session with runs (MODEL unless named), each one created and at the head of its line."""
    await store.sessions.create(session(), None)
    for model_id in model_ids or (MODEL,):
        await store.models.create(model(model_id), creation(model_id))


async def with_sampler(store: Store) -> None:
    await store.sessions.create(session(), None)
    await store.sampling.create(sampling_session())


async def count_queued(store: Store, tenant: TenantId | None = None) -> tuple[int, int]:
    """Queued requests and their tokens, of one tenant or of all."""
    loads = [entry.load for entry in await store.backlog.read() if tenant in (None, entry.tenant_id)]
    return sum(load.num_ops for load in loads), sum(load.num_tokens for load in loads)


async def enqueue_all(store: Store, requests: Sequence[NewRequest]) -> None:
    for request in requests:
        await store.requests.enqueue(request)
