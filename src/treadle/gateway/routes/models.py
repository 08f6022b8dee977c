"""Training runs: create, create from a checkpoint, load, describe, unload."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import CheckpointKind, PoolName, SessionId, training_model_id
from treadle.domain.limits import MAX_SEQ_ID_LEAD
from treadle.domain.ops import CreateModelOp, LoadWeightsOp, LoraSpec, OpKind
from treadle.domain.records import CheckpointRecord, ModelRecord, NewRequest, SessionRecord
from treadle.domain.states import ModelState
from treadle.errors import InvalidRequest, ServerError, UnreadableBody, UserError
from treadle.gateway.admission import Draft, refused
from treadle.gateway.answers import json_response
from treadle.gateway.auth import Principal
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.checkpoints import check_fits, holder_of_token, readable_checkpoint
from treadle.gateway.context import Gateway, gateway_of, is_local_client, loaded_facts
from treadle.gateway.deps import PoolView
from treadle.gateway.intake import (
    Submission,
    admit_training_op,
    answer_op,
    check_lead,
    checked_pool,
    future_of,
    op_place,
)
from treadle.gateway.routing import Resource
from treadle.wire.answers import ErrorAnswer, FutureAnswer, GetInfoAnswer
from treadle.wire.bodies import (
    CreateModelBody,
    GetInfoBody,
    LoadWeightsBody,
    OpHead,
    UnloadModelBody,
    parse_body,
    read_op_head,
)
from treadle.wire.ops import create_model_op, load_weights_op, unload_model_op
from treadle.wire.payloads import encode_payload

router = Resource("/api/v1")

# A run whose creation was refused before a pool or a shape was known; its row says why.
NO_POOL = PoolName("")
NO_LORA = LoraSpec(rank=0, seed=0, train_attn=False, train_mlp=False, train_unembed=False)
LOADABLE = (CheckpointKind.TRAINING,)
MAX_UNLOAD_ATTEMPTS = 8


@router.post("/create_model", body=CreateModelBody, answer=FutureAnswer, others={410: ErrorAnswer})
async def create_model(request: Request) -> Response:
    """A fresh run `{session}:train:{n}`; its row and the request that creates it are one transaction."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    raw = await read_body(request, limit_bytes=MAX_JSON_BYTES)
    session_id, model_seq_id = _run_address(read_op_head(raw))
    session = await gateway.access.active_session(principal, session_id)
    record = _new_run(gateway, session, model_seq_id)
    place = op_place(record, OpKind.CREATE_MODEL, 0)
    try:
        body = parse_body(CreateModelBody, raw)
        await gateway.losses.check_metadata(principal.tenant_id, body.user_metadata)
        pool = gateway.pool_for_new(body.base_model)
        op = create_model_op(
            body,
            base_model=pool.name,
            max_rank=gateway.settings.max_lora_rank,
            draw_seed=gateway.deps.draw_seed,
        )
        gateway.quotas.check_rank(principal.tenant_id, op.lora.rank)
    except UserError as refusal:
        return await _answer_refused_run(gateway, record, place, refusal)
    return await _answer_run(gateway, record, place, pool, op, body)


@router.post("/load_weights", body=LoadWeightsBody, answer=FutureAnswer, others={410: ErrorAnswer})
async def load_weights(request: Request) -> Response:
    """A checkpoint into a run (model_id, seq_id), or as the start of a new one (session_id, model_seq_id)."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    raw = await read_body(request, limit_bytes=MAX_JSON_BYTES)
    head = read_op_head(raw)
    if head.model_id is not None:
        if head.seq_id is None or head.session_id is not None:
            raise UnreadableBody("load_weights takes model_id and seq_id, or session_id and model_seq_id, not both")
        place = await admit_training_op(gateway, principal, raw, OpKind.LOAD_WEIGHTS, _load_into_run)
        return await answer_op(request, place)
    session_id, model_seq_id = _run_address(head)
    session = await gateway.access.active_session(principal, session_id)
    record = _new_run(gateway, session, model_seq_id)
    place = op_place(record, OpKind.LOAD_WEIGHTS, 0)
    try:
        body = parse_body(LoadWeightsBody, raw)
        await gateway.losses.check_metadata(principal.tenant_id, body.user_metadata)
        checkpoint = await _loadable(gateway, principal, body)
        pool = gateway.pool_for_new(checkpoint.base_model)
        if body.base_model is not None and gateway.pool_for(body.base_model) != pool:
            raise InvalidRequest(f"{body.path} belongs to base model {pool.name}, not to {body.base_model!r}")
        op = _load_op(body, checkpoint)
        gateway.quotas.check_rank(principal.tenant_id, op.lora.rank)
    except UserError as refusal:
        return await _answer_refused_run(gateway, record, place, refusal)
    return await _answer_run(gateway, record, place, pool, op, body)


@router.post("/get_info", body=GetInfoBody, answer=GetInfoAnswer)
async def get_info(request: Request) -> Response:
    """What a run is made of. The tokenizer is a directory for a client on this machine, else the base model's name."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(GetInfoBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    model = await gateway.access.model(principal, body.model_id)
    if model.state is ModelState.FAILED:
        raise InvalidRequest(f"model {model.model_id} was never created: {model.state_message}")
    pool = gateway.deps.pools.by_name(model.pool)
    facts = None if pool is None else pool.facts
    tokenizer_id = model.base_model
    if facts is not None and facts.tokenizer_dir is not None and is_local_client(gateway, request):
        tokenizer_id = facts.tokenizer_dir
    return json_response(
        {
            "type": "get_info",
            "model_id": model.model_id,
            "model_name": model.base_model,
            "is_lora": True,
            "lora_rank": model.lora.rank,
            "model_data": {
                "arch": None if facts is None else facts.architecture,
                "model_name": model.base_model,
                "tokenizer_id": tokenizer_id,
            },
        }
    )


@router.post("/unload_model", body=UnloadModelBody, answer=FutureAnswer, others={410: ErrorAnswer})
async def unload_model(request: Request) -> Response:
    """The end of a run. SDKs send no seq_id with it, so without one it goes behind everything queued."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    raw = await read_body(request, limit_bytes=MAX_JSON_BYTES)
    body = parse_body(UnloadModelBody, raw)
    model = await gateway.access.model(principal, body.model_id)
    await gateway.access.active_session(principal, model.session_id)
    for _ in range(MAX_UNLOAD_ATTEMPTS):
        seq_id = body.seq_id or await _next_free_seq_id(gateway, model)

        def draft(seq_id: int = seq_id) -> Draft:
            check_lead(model, seq_id)
            checked_pool(gateway, model)
            return Draft(OpKind.UNLOAD_MODEL, encode_payload(unload_model_op(body, seq_id=seq_id)))

        place = op_place(model, OpKind.UNLOAD_MODEL, seq_id)
        request_id = await gateway.admission.submit(place, draft, num_bytes=len(raw))
        row = await gateway.store.requests.get(request_id)
        assert row is not None, "an admitted request has a row"
        if body.seq_id is not None or row.kind is OpKind.UNLOAD_MODEL:
            return future_of(request_id, model_id=model.model_id)
    raise ServerError(f"model {model.model_id} gets new requests too quickly to be unloaded; stop its client first")


async def _load_into_run(submission: Submission) -> LoadWeightsOp:
    body = parse_body(LoadWeightsBody, submission.raw)
    checkpoint = await _loadable(submission.gateway, submission.principal, body)
    check_fits(checkpoint, submission.model)
    return _load_op(body, checkpoint)


async def _loadable(gateway: Gateway, principal: Principal, body: LoadWeightsBody) -> CheckpointRecord:
    reader = await holder_of_token(gateway.auth, body.weights_access_token, shown_by=principal)
    return await readable_checkpoint(gateway.access, principal, body.path, kinds=LOADABLE, on_behalf_of=reader)


def _load_op(body: LoadWeightsBody, checkpoint: CheckpointRecord) -> LoadWeightsOp:
    # Under the path as this server writes it, which its answer repeats.
    body = body.model_copy(update={"path": checkpoint.tinker_path})
    return load_weights_op(body, blob_key=checkpoint.blob_key, lora=checkpoint.lora)


def _run_address(head: OpHead) -> tuple[SessionId, int]:
    if head.session_id is None or head.model_seq_id is None:
        missing = "session_id" if head.session_id is None else "model_seq_id"
        raise UnreadableBody(f"{missing} is missing")
    return head.session_id, head.model_seq_id


def _new_run(gateway: Gateway, session: SessionRecord, model_seq_id: int) -> ModelRecord:
    """The run's row as far as its address tells; pool and shape follow."""
    now = gateway.deps.clock.now()
    return ModelRecord(
        model_id=training_model_id(session.session_id, model_seq_id),
        session_id=session.session_id,
        tenant_id=session.tenant_id,
        pool=NO_POOL,
        base_model="",
        revision="",
        lora=NO_LORA,
        state=ModelState.CREATING,
        # Op 0 is the creation itself, and it is in the line like any other.
        next_seq_id=0,
        created_at=now,
        last_request_at=now,
    )


async def _answer_run(
    gateway: Gateway,
    record: ModelRecord,
    place: NewRequest,
    pool: PoolView,
    op: CreateModelOp | LoadWeightsOp,
    body: CreateModelBody | LoadWeightsBody,
) -> Response:
    # The revision is part of the run's row, so a run cannot be admitted before its base model is known.
    revision = loaded_facts(pool).revision
    run = replace(
        record,
        pool=pool.name,
        base_model=pool.name,
        revision=revision,
        lora=op.lora,
        user_metadata=body.user_metadata,
    )
    draft = Draft(place.kind, encode_payload(op))
    max_alive = gateway.quotas.max_models(run.tenant_id)
    request_id = await gateway.admission.submit_model(run, replace(place, pool=pool.name), draft, max_alive=max_alive)
    return future_of(request_id, model_id=run.model_id)


async def _answer_refused_run(gateway: Gateway, record: ModelRecord, place: NewRequest, refusal: UserError) -> Response:
    request_id = await gateway.store.models.create(record, refused(place, refusal))
    return future_of(request_id, model_id=record.model_id)


async def _next_free_seq_id(gateway: Gateway, model: ModelRecord) -> int:
    # Whatever lies further ahead was refused for that, and will never be reached.
    last_seq_id = model.next_seq_id + MAX_SEQ_ID_LEAD
    known = await gateway.store.requests.known_seq_ids(model.model_id, model.next_seq_id, last_seq_id)
    return max(known, default=model.next_seq_id - 1) + 1
