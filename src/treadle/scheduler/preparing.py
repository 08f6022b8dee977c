"""From a plan to the work a worker gets: payloads, state tags, blob keys, restores, and refusals that need the store.

Refused here, before anything runs: a save whose name exists, and every op of a run whose state is gone.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from treadle.blobs import BlobStore
from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, RequestId, TinkerPath
from treadle.domain.ops import OpKind, SampleOp, SaveForSamplerOp, SaveWeightsOp, TrainingOp
from treadle.domain.outcome import Failure
from treadle.domain.plan import FIRST_INCARNATION, CyclePlan, PlannedOp, RestoreItem, StateTag, WorkItem
from treadle.domain.states import Category
from treadle.scheduler.runs import Run
from treadle.store import Store
from treadle.wire.payloads import decode_payload

NAMED_KINDS = frozenset({OpKind.SAVE_WEIGHTS, OpKind.SAVE_FOR_SAMPLER, OpKind.LOAD_WEIGHTS})
SAVE_KINDS = frozenset({OpKind.SAVE_WEIGHTS, OpKind.SAVE_FOR_SAMPLER})


@dataclass(slots=True)
class Prepared:
    """What goes to the worker, what was refused on the way, the ops whose names finishing needs, and large payloads."""

    items: list[WorkItem] = field(default_factory=list)
    restores: dict[ModelId, RestoreItem] = field(default_factory=dict)
    refused: list[tuple[PlannedOp, Failure]] = field(default_factory=list)
    named_ops: dict[RequestId, TrainingOp] = field(default_factory=dict)
    payload_keys: dict[RequestId, BlobKey] = field(default_factory=dict)


async def prepare(plan: CyclePlan, runs: Mapping[ModelId, Run], store: Store, blobs: BlobStore) -> Prepared:
    """Everything the plan's ops need. Each run of the plan is in `runs` and can run."""
    prepared = Prepared()
    payloads = await _payloads(plan, store, blobs, prepared)
    names_taken: set[str] = set()
    for planned in plan.ops:
        payload = payloads[planned.request_id]
        if planned.kind in NAMED_KINDS:
            op = decode_payload(planned.kind, payload)
            assert not isinstance(op, SampleOp), "samples are never planned into a cycle"
            prepared.named_ops[planned.request_id] = op
            failure = await _refused_name(op, store, names_taken)
            if failure is not None:
                prepared.refused.append((planned, failure))
                continue
        prepared.items.append(_work_item(planned, payload, runs[planned.model_id], prepared))
    return prepared


async def _payloads(plan: CyclePlan, store: Store, blobs: BlobStore, prepared: Prepared) -> dict[RequestId, bytes]:
    """Each op's payload, from its row or from the blob that its row names."""
    rows = await store.requests.payloads([op.request_id for op in plan.ops])
    payloads = {}
    for request_id, (inline, key) in rows.items():
        if key is None:
            payloads[request_id] = inline
        else:
            payloads[request_id] = await asyncio.to_thread(blobs.read, key)
            prepared.payload_keys[request_id] = key
    return payloads


async def _refused_name(op: TrainingOp, store: Store, names_taken: set[str]) -> Failure | None:
    """Why a save may not take its name, if it may not."""
    if isinstance(op, SaveWeightsOp):
        path, overwrite = TinkerPath(op.model_id, CheckpointKind.TRAINING, op.name), op.overwrite
    elif isinstance(op, SaveForSamplerOp) and op.name is not None:
        path, overwrite = TinkerPath(op.model_id, CheckpointKind.SAMPLER, op.name), False
    else:
        return None
    taken = str(path) in names_taken or await store.checkpoints.find(str(path)) is not None
    names_taken.add(str(path))
    if not taken or overwrite:
        return None
    return Failure(
        message=f"checkpoint {path} exists; save under another name" + (" or with overwrite" if op.name else ""),
        category=Category.USER,
    )


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
