"""A gateway under test: the app over a real store, without a scheduler. Tests finish requests themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from treadle.blobs import LocalBlobs
from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, PoolName, RequestId, TenantId
from treadle.domain.keys import key_digest
from treadle.domain.ops import LoraSpec, Op, OpKind
from treadle.domain.outcome import EncodedResult, Failure, PoolFacts
from treadle.domain.records import CheckpointRecord, FinishedCycle, FinishedRequest, LeaseRecord, RequestRecord
from treadle.domain.states import Category
from treadle.gateway import GatewayDeps, GatewaySettings, PoolDirectory, PoolView, Readiness
from treadle.store import Store
from treadle.store.pool_watch import PoolWatch
from treadle.telemetry.metrics import Metrics
from treadle.testing.clock import ManualClock
from treadle.wire.payloads import decode_payload
from treadle.wire.results import PROTOBUF

POOL = PoolName("fake/base")
OTHER_POOL = PoolName("fake/other")
KEY = "tml-one"
OTHER_KEY = "tml-two"
VOCAB_SIZE = 64
MAX_CONTEXT = 128
DRAWN_SEED = 4_242
LORA = LoraSpec(rank=8, seed=1)


def facts(name: str = POOL, *, directory: Path | None = None) -> PoolFacts:
    return PoolFacts(
        base_model=name,
        revision="rev-1",
        architecture="FakeForCausalLM",
        vocab_size=VOCAB_SIZE,
        max_context_length=MAX_CONTEXT,
        num_parameters=1,
        dtype="float32",
        device="cpu",
        numerics_profile="test",
        tokenizer_dir=None if directory is None else str(directory),
    )


def open_tenant(key: str = KEY) -> TenantId:
    return TenantId(f"open:{key_digest(key)[:16]}")


@dataclass
class Harness:
    """One gateway and its neighbours. `pools` and `is_draining` may be changed while it runs."""

    store: Store
    blobs: LocalBlobs
    clock: ManualClock
    settings: GatewaySettings
    pools: list[PoolView]
    is_draining: bool = False
    readiness: Readiness = field(default_factory=lambda: Readiness(is_ready=True))
    metrics: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))
    client: httpx.AsyncClient = field(init=False)
    app: Starlette = field(init=False)

    def deps(self) -> GatewayDeps:
        async def readiness() -> Readiness:
            return self.readiness

        return GatewayDeps(
            store=self.store,
            blobs=self.blobs,
            clock=self.clock,
            pools=PoolDirectory(lambda: self.pools, PoolWatch(self.store)),
            settings=self.settings,
            readiness=readiness,
            is_draining=lambda: self.is_draining,
            draw_seed=lambda: DRAWN_SEED,
            metrics=self.metrics,
        )

    async def post(self, path: str, body: object = None, *, key: str = KEY, **options: Any) -> httpx.Response:
        # What newer SDKs accept of retrieve_future; without it, passes and samples are answered in JSON.
        headers = {"X-API-Key": key, "Accept": PROTOBUF, **options.pop("headers", {})}
        if "content" not in options:
            options["json"] = {} if body is None else body
        return await self.client.post(f"/api/v1/{path}", headers=headers, **options)

    async def get(self, path: str, *, key: str = KEY, **options: Any) -> httpx.Response:
        return await self.client.get(f"/api/v1/{path}", headers={"X-API-Key": key}, **options)

    async def new_session(self, *, key: str = KEY) -> str:
        return str(ok(await self.post("create_session", key=key))["session_id"])

    async def new_model(self, session_id: str, model_seq_id: int = 0, *, key: str = KEY, **lora: object) -> str:
        """A run whose creation was admitted and finished."""
        body = {
            "session_id": session_id,
            "model_seq_id": model_seq_id,
            "base_model": POOL,
            "lora_config": {"rank": 8, **lora},
        }
        answer = ok(await self.post("create_model", body, key=key))
        await self.finish(answer["request_id"], b"{}")
        return str(answer["model_id"])

    async def new_sampler(self, session_id: str, sampling_session_seq_id: int = 0, *, key: str = KEY) -> str:
        body = {
            "session_id": session_id,
            "sampling_session_seq_id": sampling_session_seq_id,
            "base_model": POOL,
        }
        return str(ok(await self.post("create_sampling_session", body, key=key))["sampling_session_id"])

    async def future(self, request_id: str, *, key: str = KEY) -> httpx.Response:
        return await self.post("retrieve_future", {"request_id": request_id}, key=key)

    async def row(self, request_id: str) -> RequestRecord:
        row = await self.store.requests.get(RequestId(request_id))
        assert row is not None, request_id
        return row

    async def op(self, request_id: str) -> Op:
        """The op as a worker would decode it."""
        row = await self.row(request_id)
        payload, key = await self.store.requests.payload(row.request_id)
        return decode_payload(row.kind, self.blobs.read(key) if key else payload)

    async def lease(self) -> LeaseRecord:
        lease = await self.store.leases.acquire(POOL, "test", 1e9)
        assert lease is not None
        return lease

    async def finish(self, request_id: str, body: bytes, *, content_type: str = "application/json") -> None:
        await self.commit(FinishedRequest(RequestId(request_id), result=EncodedResult(content_type, body)))

    async def fail(self, request_id: str, message: str, *, is_transient: bool = False) -> None:
        failure = Failure(message, Category.SERVER)
        await self.commit(FinishedRequest(RequestId(request_id), failure=failure, is_transient=is_transient))

    async def commit(self, finished: FinishedRequest) -> None:
        row = await self.row(finished.request_id)
        lease = await self.lease()
        if row.kind is OpKind.SAMPLE:
            await self.store.cycles.finish_samples(lease, [finished])
        else:
            await self.store.cycles.finish(lease, FinishedCycle(finished=(finished,)))

    async def publish(
        self,
        model_id: str,
        name: str,
        *,
        kind: CheckpointKind = CheckpointKind.TRAINING,
        lora: LoraSpec = LORA,
        base_model: str = POOL,
        key: str = KEY,
        public: bool = False,
        created_at: float | None = None,
    ) -> CheckpointRecord:
        """A checkpoint, as a committed save leaves it."""
        record = CheckpointRecord(
            model_id=ModelId(model_id),
            tenant_id=open_tenant(key),
            kind=kind,
            name=name,
            tinker_path=f"tinker://{model_id}/{kind.value}/{name}",
            blob_key=BlobKey(f"checkpoints/{name}"),
            size_bytes=10,
            seq_id=1,
            created_at=self.clock.now() if created_at is None else created_at,
            base_model=base_model,
            lora=lora,
            public=public,
        )
        await self.store.cycles.finish(await self.lease(), FinishedCycle(checkpoints=(record,)))
        return record


def ok(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer that must be a success."""
    assert response.status_code == 200, (response.status_code, response.text)
    body = response.json()
    assert isinstance(body, dict)
    assert "error" not in body, body
    return body


def failed(response: httpx.Response, *, category: str = "user") -> str:
    """The message of a future that must have failed."""
    assert response.status_code == 200, (response.status_code, response.text)
    body = response.json()
    assert body["category"] == category, body
    return str(body["error"])


def refused(response: httpx.Response, status: int) -> str:
    """The message of an answer that must be this error. Every error has a JSON body."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/json"
    detail = response.json()["detail"]
    assert isinstance(detail, str)
    assert detail
    return detail


def prompt(tokens: Sequence[int] = (1, 2, 3)) -> dict[str, object]:
    return {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}


def sample_body(sampling_session_id: str, seq_id: int = 1, **changes: object) -> dict[str, object]:
    return {
        "sampling_session_id": sampling_session_id,
        "seq_id": seq_id,
        "num_samples": 2,
        "prompt": prompt(),
        "sampling_params": {"max_tokens": 4},
        **changes,
    }
