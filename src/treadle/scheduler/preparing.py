"""From a plan to the work a worker gets: payloads, state tags, blob keys, restores, and refusals that need the store.

Refused here, before anything runs: a save whose name exists, an op whose payload is gone, and a pass whose named loss
was revoked since it was admitted; a replay computes with it all the same, as it did. Whatever is wrong with
one op ends that op or holds its run up, and leaves the others alone: a plan that could not be prepared would come again
for ever, and with it everybody's ops. It knows replayed ops only by their numbers; they become ordinary work.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.blobs import BlobStore
from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, RequestId, TinkerPath
from treadle.domain.ops import OpKind, PassOp, SampleOp, SaveExternalOp, SaveForSamplerOp, SaveWeightsOp, TrainingOp
from treadle.domain.outcome import Failure
from treadle.domain.plan import FIRST_INCARNATION, CyclePlan, PlannedOp, RestoreItem, StateTag, WorkItem
from treadle.domain.states import Category
from treadle.errors import NotFound, TreadleError
from treadle.executor.base import Executor
from treadle.scheduler.runs import Run
from treadle.scheduler.save_quotas import SaveGate
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.wire.passes import has_named_loss, named_loss_sha256
from treadle.wire.payloads import decode_payload

log = get_logger(__name__)

SAVE_KINDS = frozenset({OpKind.SAVE_WEIGHTS, OpKind.SAVE_FOR_SAMPLER, OpKind.SAVE_EXTERNAL})
NAMED_KINDS = SAVE_KINDS | {OpKind.LOAD_WEIGHTS}
PASS_KINDS = frozenset({OpKind.FORWARD_BACKWARD, OpKind.FORWARD})


@dataclass(frozen=True, slots=True)
class Unread:
    """A payload that is not there. is_gone: for good; else it may be another time."""

    reason: str
    is_gone: bool


@dataclass(slots=True)
class Prepared:
    """What goes to the worker, what was refused on the way, and the ops whose names finishing needs.

    postponed: why nothing more of a run is in this cycle: an op of it could not be read now. broken_logs: why a run
    cannot be replayed: an op of it is gone. half_done: runs of which a pass was refused when the worker had begun it;
    the worker must forget them, and nothing more of them is in this cycle.
    """

    items: list[WorkItem] = field(default_factory=list)
    restores: dict[ModelId, RestoreItem] = field(default_factory=dict)
    refused: list[tuple[PlannedOp, Failure]] = field(default_factory=list)
    named_ops: dict[RequestId, TrainingOp] = field(default_factory=dict)
    postponed: dict[ModelId, str] = field(default_factory=dict)
    broken_logs: dict[ModelId, str] = field(default_factory=dict)
    half_done: set[ModelId] = field(default_factory=set)

    def is_out(self, model_id: ModelId) -> bool:
        """Nothing more of this run is in the cycle."""
        return model_id in self.postponed or model_id in self.broken_logs or model_id in self.half_done


async def prepare(
    plan: CyclePlan,
    runs: Mapping[ModelId, Run],
    store: Store,
    blobs: BlobStore,
    *,
    revoked_losses: Collection[str] = (),
    saves: SaveGate | None = None,
) -> Prepared:
    """Everything the plan's ops need. Each run of the plan is in `runs` and can run.

    revoked_losses: SHA-256 of definitions of named losses that no longer run. saves: who has room for more checkpoints;
    None: everybody.
    """
    prepared = Prepared()
    payloads = await read_payloads([op.request_id for op in plan.ops], store, blobs)
    names_taken: set[str] = set()
    for planned in plan.ops:
        run = runs[planned.model_id]
        if prepared.is_out(planned.model_id):
            continue
        payload = payloads[planned.request_id]
        if isinstance(payload, Unread):
            _set_aside(planned, payload, run, prepared)
            continue
        if revoked_losses and planned.kind in PASS_KINDS and not run.is_replayed(planned.seq_id):
            failure = await _revoked(planned, payload, revoked_losses, store)
            if failure is not None:
                _refuse_pass(planned, failure, run, prepared)
                continue
        if planned.kind in NAMED_KINDS:
            failure = await _refused_name(planned, payload, store, names_taken, prepared)
            if failure is None and saves is not None:
                failure = await saves.refusal(run.record, prepared.named_ops[planned.request_id])
            if failure is not None:
                prepared.refused.append((planned, failure))
                continue
        prepared.items.append(_work_item(planned, payload, run, prepared))
    return prepared


def _set_aside(planned: PlannedOp, unread: Unread, run: Run, prepared: Prepared) -> None:
    """An op without its payload fails if that is gone for good, and waits else; a replay cannot do without it."""
    if not unread.is_gone:
        prepared.postponed[planned.model_id] = unread.reason
    elif run.is_replayed(planned.seq_id):
        prepared.broken_logs[planned.model_id] = f"request {planned.seq_id} of its log is gone"
    else:
        message = f"the stored content of request {planned.request_id} could not be read; send it again"
        _refuse_pass(planned, Failure(message, Category.SERVER), run, prepared)


def _refuse_pass(planned: PlannedOp, failure: Failure, run: Run, prepared: Prepared) -> None:
    """End a pass, or another op that has no name, without running it; the next step tells of it."""
    prepared.refused.append((planned, failure))
    if planned.kind is OpKind.FORWARD_BACKWARD:
        run.refused_passes.add(planned.seq_id)
    if run.num_quanta_done(planned.request_id):
        prepared.half_done.add(planned.model_id)


async def _revoked(planned: PlannedOp, payload: bytes, revoked_losses: Collection[str], store: Store) -> Failure | None:
    """Why a pass does not run any more, if its named loss was revoked."""
    sha256 = named_loss_sha256(payload)
    if sha256 is None or sha256 not in revoked_losses or not has_named_loss(payload):
        return None
    reason = await store.named_losses.revocation_of(sha256)
    if reason is None:
        # It was approved a moment ago, which is not known here yet.
        return None
    try:
        op = decode_payload(planned.kind, payload)
    except TreadleError as error:
        # Its graph was one that another version of this server ran.
        return Failure(error.message, Category(error.category))
    assert isinstance(op, PassOp)
    assert op.loss.custom is not None
    message = f"loss {op.loss.custom.name!r} was revoked before this pass ran: {reason or 'ask the operators why'}"
    return Failure(f"{message}; GET /api/v1/losses lists those that are enabled", Category.USER)


async def read_payloads(
    request_ids: Sequence[RequestId], store: Store, blobs: BlobStore
) -> dict[RequestId, bytes | Unread]:
    """Each request's payload, from its row or from the blob that its row names, or why it cannot be had."""
    payloads: dict[RequestId, bytes | Unread] = {}
    for request_id, (inline, key) in (await store.requests.payloads(request_ids)).items():
        payload = inline if key is None else await asyncio.to_thread(_read, blobs, key)
        # No op is encoded as nothing.
        payloads[request_id] = payload or Unread("no payload is kept", is_gone=True)
        if isinstance(unread := payloads[request_id], Unread):
            tell = log.error if unread.is_gone else log.warning
            tell("payload not read", request_id=request_id, reason=unread.reason)
    return payloads


def _read(blobs: BlobStore, key: BlobKey) -> bytes | Unread:
    try:
        return blobs.read(key)
    except NotFound as error:
        return Unread(error.message, is_gone=True)
    except TreadleError as error:
        return Unread(error.message, is_gone=False)


async def drop_half_done(executor: Executor, prepared: Prepared, runs: Mapping[ModelId, Run]) -> None:
    """Have the worker forget what it did of passes that were refused half-way; their runs are restored."""
    if prepared.half_done:
        for model_id in prepared.half_done:
            runs[model_id].drop_state()
        await executor.evict(sorted(prepared.half_done))


async def drop_blobs(blobs: BlobStore, keys: Sequence[BlobKey]) -> None:
    """Delete what nobody will read again. One that stays is only a file too many."""
    if keys:
        await asyncio.to_thread(_delete_all, blobs, keys)


def _delete_all(blobs: BlobStore, keys: Sequence[BlobKey]) -> None:
    for key in keys:
        try:
            blobs.delete(key)
        except TreadleError as error:
            log.warning("blob not deleted", key=key, reason=error.message)


async def _refused_name(
    planned: PlannedOp, payload: bytes, store: Store, names_taken: set[str], prepared: Prepared
) -> Failure | None:
    """Why a save may not take its name, if it may not. What finishing needs of the op is noted."""
    try:
        op = decode_payload(planned.kind, payload)
    except TreadleError as error:
        return Failure(error.message, Category(error.category))
    assert not isinstance(op, SampleOp), "samples are never planned into a cycle"
    prepared.named_ops[planned.request_id] = op
    match op:
        case SaveWeightsOp():
            name = str(TinkerPath(op.model_id, CheckpointKind.TRAINING, op.name))
            is_taken = name in names_taken or await store.checkpoints.exists(name)
            message = f"checkpoint {name} exists; save under another name or with overwrite"
        case SaveForSamplerOp(name=str(short_name)):
            name = str(TinkerPath(op.model_id, CheckpointKind.SAMPLER, short_name))
            is_taken = name in names_taken or await store.checkpoints.exists(name)
            message = f"checkpoint {name} exists; save under another name"
        case SaveExternalOp():
            name = str(TinkerPath(op.model_id, CheckpointKind.EXTERNAL, op.name))
            is_taken = name in names_taken or await store.checkpoints.exists(name)
            message = f"checkpoint {name} exists; save under another name"
        case SaveForSamplerOp(sampling_session_id=session_id) if session_id is not None:
            # Admission checks this too, but cannot see a save that is still queued.
            name = session_id
            is_taken = name in names_taken or await store.sampling.get(session_id) is not None
            message = f"sampling session {name} exists and keeps its weights; use a new sampling_session_seq_id"
        case _:
            return None
    names_taken.add(name)
    is_overwriting = isinstance(op, SaveWeightsOp) and op.overwrite
    return Failure(message, Category.USER) if is_taken and not is_overwriting else None


def _work_item(planned: PlannedOp, payload: bytes, run: Run, prepared: Prepared) -> WorkItem:
    is_step = planned.kind is OpKind.OPTIM_STEP
    return WorkItem(
        planned=planned,
        payload=payload,
        starts_from=_starting_tag(planned, run, prepared),
        blob_key=new_blob_key(run.record.model_id) if planned.kind in SAVE_KINDS else None,
        num_refused_passes=run.num_refused_before(planned.seq_id) if is_step else 0,
    )


def _starting_tag(planned: PlannedOp, run: Run, prepared: Prepared) -> StateTag | None:
    """The tag an op starts from: every number before it is consumed, so only the incarnation is in question."""
    model_id = planned.model_id
    if run.tag is not None:
        incarnation = run.tag.incarnation
    elif model_id in prepared.restores:
        incarnation = prepared.restores[model_id].tag.incarnation
    elif planned.seq_id == 0:
        return None
    elif any(item.planned.model_id == model_id for item in prepared.items):
        # Its create is in this very cycle.
        incarnation = FIRST_INCARNATION
    else:
        item = run.restore_item()
        prepared.restores[model_id] = item
        incarnation = item.tag.incarnation
    return StateTag(model_id, incarnation=incarnation, applied_seq=planned.seq_id - 1)


def new_blob_key(model_id: ModelId) -> BlobKey:
    """A key never used before. Colons of the id are kept out of file names."""
    return BlobKey(f"states/{model_id.replace(':', '_')}/{uuid.uuid4().hex}.safetensors")
