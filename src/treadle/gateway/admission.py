"""From a request whose owner is known to a row in the queue.

The content is decoded and checked here; what cannot be honoured becomes a FAILED row, so that its sequence
number is consumed and its error comes through the future (a synchronous 4xx hangs or unsteps the SDK,
protocol 0.7 and 0.8). It refuses to know order: nothing here waits for another request.
Invariant: when `submit` returns, the row is durable, and so is the blob it names.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from treadle.blobs import BlobStore
from treadle.domain.ids import BlobKey, RequestId, blob_folder
from treadle.domain.limits import MAX_INLINE_PAYLOAD_BYTES
from treadle.domain.ops import OpKind, SampleOp
from treadle.domain.outcome import Failure
from treadle.domain.records import ModelRecord, NewRequest
from treadle.domain.states import Category
from treadle.errors import UserError
from treadle.gateway.backlog import Backlog
from treadle.store import Store
from treadle.telemetry.context import bind_context
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics
from treadle.telemetry.phases import Phase, phase
from treadle.telemetry.tracing import Span, emit, is_tracing, request_trace
from treadle.wire.payloads import encode_payload

log = get_logger(__name__)

T = TypeVar("T")

# Smaller bodies are decoded where they arrive: handing 10 KB to a thread costs more than decoding it, while
# 256 KiB would hold up everybody else on the event loop for about a millisecond.
INLINE_DECODE_BYTES = 256 * 2**10
# Decoding is bound by memory and shares the machine with the workers.
NUM_DECODE_THREADS = 2


@dataclass(frozen=True, slots=True)
class Draft:
    """A request's content once it is checked: what is stored, and how large it is to planning."""

    kind: OpKind
    payload: bytes
    num_tokens: int = 0
    quantum_tokens: tuple[int, ...] = ()


def sample_draft(op: SampleOp, *, max_context_length: int) -> Draft:
    """The content of a sample. It may cost its prompt once, and every sequence to its end; what may be drawn is its one
    quantum, by which rates are kept."""
    most = max_context_length - len(op.prompt) if op.params.max_tokens is None else op.params.max_tokens
    num_drawn = op.num_samples * most
    return Draft(
        kind=OpKind.SAMPLE,
        payload=encode_payload(op),
        num_tokens=len(op.prompt) + num_drawn,
        quantum_tokens=(num_drawn,),
    )


class Admission:
    """Makes rows. Owns the decoding threads until `close`."""

    def __init__(self, *, store: Store, blobs: BlobStore, backlog: Backlog, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._blobs = blobs
        self._backlog = backlog
        self._threads = ThreadPoolExecutor(NUM_DECODE_THREADS, thread_name_prefix="gateway-decode")

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], T], *, num_bytes: int) -> T:
        """What `work` returns; in a thread when it has many bytes to read."""
        if num_bytes <= INLINE_DECODE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def submit(self, place: NewRequest, build: Callable[[], Draft], *, num_bytes: int) -> RequestId:
        """The id of the request, once its row is durable; a replay gets the id of the first.

        place: the row without content. build: decodes and checks `num_bytes` of body; a UserError that it raises
        becomes the row's failure.
        """
        bind_context(request_id=place.request_id)
        try:
            draft = await self.run(build, num_bytes=num_bytes)
        except UserError as refusal:
            return await self.submit_refused(place, refusal)
        return await self.submit_checked(place, draft)

    async def submit_checked(self, place: NewRequest, draft: Draft) -> RequestId:
        """`submit` for content that was checked already."""
        bind_context(request_id=place.request_id)
        row = await self._filled(place, draft)
        is_new = await self._store.requests.add(row)
        phase(Phase.QUEUED, request_id=row.request_id)
        if is_new:
            self._backlog.admitted(row)
        elif row.payload_key is not None:
            # The row names the first one's blob, and nobody would ever find this one.
            await asyncio.get_running_loop().run_in_executor(self._threads, self._blobs.delete, row.payload_key)
        return row.request_id

    async def submit_refused(self, place: NewRequest, refusal: UserError) -> RequestId:
        """The id of a request that fails with `refusal` through its future."""
        bind_context(request_id=place.request_id)
        log.debug("request refused at admission", kind=place.kind.value, error=type(refusal).__name__)
        self._metrics.refused_at_admission.labels(place.pool, place.kind.value).inc()
        _trace_refused(place)
        return await self._store.requests.enqueue(refused(place, refusal))

    async def submit_model(
        self, model: ModelRecord, place: NewRequest, draft: Draft, *, max_alive: int | None = None
    ) -> RequestId:
        """The id of the request that creates `model`; run and request become durable together.

        A replay changes nothing and gets the id of the first. max_alive: its tenant's quota of runs.
        """
        bind_context(request_id=place.request_id)
        request_id = await self._store.models.create(model, await self._filled(place, draft), max_alive=max_alive)
        phase(Phase.QUEUED, request_id=request_id)
        return request_id

    async def _filled(self, place: NewRequest, draft: Draft) -> NewRequest:
        """The row with its content. A large payload is a blob, written before the row that names it."""
        row = replace(
            place,
            kind=draft.kind,
            num_tokens=draft.num_tokens,
            quantum_tokens=draft.quantum_tokens,
            payload=draft.payload,
        )
        if len(draft.payload) <= MAX_INLINE_PAYLOAD_BYTES:
            return row
        owner = row.model_id or row.sampling_session_id
        assert owner is not None, "a request belongs to a run or to a sampling session"
        key = BlobKey(f"payloads/{blob_folder(owner)}/{uuid.uuid4().hex}")
        await asyncio.get_running_loop().run_in_executor(self._threads, self._blobs.write, key, draft.payload)
        return replace(row, payload=b"", payload_key=key, payload_bytes=len(draft.payload))


def _trace_refused(place: NewRequest) -> None:
    """Of what will not run, its refusal is the whole story."""
    if is_tracing():
        now = time.time()
        about = {"treadle.request_id": place.request_id, "treadle.pool": place.pool, "treadle.kind": place.kind.value}
        root = request_trace(place.request_id)
        emit(Span(place.kind.value, root, began_at=now, ended_at=now, attributes=about, error="refused: user"))


def refused(place: NewRequest, refusal: UserError) -> NewRequest:
    """The row of a request that will not run."""
    return replace(place, failure=Failure(message=_storable(refusal.message), category=Category(refusal.category)))


def _storable(text: str) -> str:
    """`text` with what a database cannot hold written out: a refusal may quote whatever a client sent."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode("utf-8")
