"""Runs and checkpoints as the SDK's REST client and the `tinker` command list them. Runs outlive their session."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import CheckpointKind, ModelId
from treadle.domain.records import CheckpointRecord, ModelRecord
from treadle.domain.states import ModelState
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.checkpoints import readable_checkpoint
from treadle.gateway.context import gateway_of
from treadle.gateway.paging import page_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.gateway.sdk_versions import EXTERNAL_SINCE, version_of
from treadle.store import Store
from treadle.wire.account_bodies import RunsQuery, ScopeQuery
from treadle.wire.answers_checkpoints import WeightsInfoAnswer
from treadle.wire.answers_sessions import CheckpointsAnswer, TrainingRunAnswer, TrainingRunsAnswer
from treadle.wire.bodies import WeightsInfoBody, parse_body
from treadle.wire.queries import CheckpointsQuery

router = Resource("/api/v1")

CHECKPOINT_TYPES = {
    CheckpointKind.TRAINING: "training",
    CheckpointKind.SAMPLER: "sampler",
    CheckpointKind.EXTERNAL: "external",
}
# Runs whose state is gone for good; `corrupted` is the one word the API has for that.
UNUSABLE = (ModelState.FAILED, ModelState.LOST)


@router.get("/training_runs", query=RunsQuery, answer=TrainingRunsAnswer)
async def list_training_runs(request: Request) -> Response:
    """The caller's runs, newest first: all, or those of sessions in one project.

    Of `accessible` ones also those of others that shared projects let the caller read.
    """
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    page = page_of(request, default_limit=20)
    query = query_of(request, RunsQuery)
    models, total = await gateway.store.models.list(
        principal.tenant_id,
        page.limit,
        page.offset,
        project_id=query.project_id,
        with_shared=query.with_shared,
    )
    return json_response({"training_runs": await _run_bodies(gateway.store, models), "cursor": page.cursor(total)})


@router.get("/training_runs/{model_id}", query=ScopeQuery, answer=TrainingRunAnswer)
async def get_training_run(request: Request, model_id: str) -> Response:
    """One run of the caller's; if `accessible` is enough, or one that a shared project lets it read."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    query = query_of(request, ScopeQuery)
    model = await gateway.access.model(principal, ModelId(model_id), with_shared=query.with_shared)
    [run] = await _run_bodies(gateway.store, [model])
    return json_response(run)


@router.get("/training_runs/{model_id}/checkpoints", answer=CheckpointsAnswer)
async def list_run_checkpoints(request: Request, model_id: str) -> Response:
    """All checkpoints of one run that the caller may read, newest first."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    model = await gateway.access.model(principal, ModelId(model_id), with_shared=True)
    kinds = _listed_kinds(request)
    records = [record for record in await gateway.store.checkpoints.of_model(model.model_id) if record.kind in kinds]
    return json_response({"checkpoints": [_checkpoint_body(record) for record in records]})


@router.get("/checkpoints", query=CheckpointsQuery, answer=CheckpointsAnswer)
async def list_checkpoints(request: Request) -> Response:
    """The caller's checkpoints of all runs, newest first."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    page = page_of(request, default_limit=100)
    records, total = await gateway.store.checkpoints.list(
        principal.tenant_id, page.limit, page.offset, kinds=_listed_kinds(request)
    )
    checkpoints = [_checkpoint_body(record) for record in records]
    return json_response({"checkpoints": checkpoints, "cursor": page.cursor(total)})


@router.post("/weights_info", body=WeightsInfoBody, answer=WeightsInfoAnswer)
async def weights_info(request: Request) -> Response:
    """What a run made from this checkpoint would be: enough to create a client for it."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(WeightsInfoBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    record = await readable_checkpoint(gateway.access, principal, body.tinker_path, kinds=tuple(CheckpointKind))
    return json_response(
        {
            "base_model": record.base_model,
            "is_lora": True,
            "lora_rank": record.lora.rank,
            "train_attn": record.lora.train_attn,
            "train_mlp": record.lora.train_mlp,
            "train_unembed": record.lora.train_unembed,
            # The only one that there is.
            "optimizer_config": {"type": "adamw"},
        }
    )


def _listed_kinds(request: Request) -> tuple[CheckpointKind, ...]:
    """What the caller's SDK can read in a list."""
    if version_of(request) >= EXTERNAL_SINCE:
        return tuple(CheckpointKind)
    return tuple(kind for kind in CheckpointKind if kind is not CheckpointKind.EXTERNAL)


async def _run_bodies(store: Store, models: Sequence[ModelRecord]) -> list[dict[str, object]]:
    newest = await store.checkpoints.newest([model.model_id for model in models])
    return [
        _run_body(
            model,
            newest.get((model.model_id, CheckpointKind.TRAINING)),
            newest.get((model.model_id, CheckpointKind.SAMPLER)),
        )
        for model in models
    ]


def _run_body(
    model: ModelRecord, newest_training: CheckpointRecord | None, newest_sampler: CheckpointRecord | None
) -> dict[str, object]:
    return {
        "training_run_id": model.model_id,
        "base_model": model.base_model,
        "model_owner": model.tenant_id,
        "is_lora": True,
        "lora_rank": model.lora.rank,
        "corrupted": model.state in UNUSABLE,
        "last_request_time": iso_time(model.last_request_at),
        "last_checkpoint": None if newest_training is None else _checkpoint_body(newest_training),
        "last_sampler_checkpoint": None if newest_sampler is None else _checkpoint_body(newest_sampler),
        "user_metadata": model.user_metadata,
    }


def _checkpoint_body(record: CheckpointRecord) -> dict[str, object]:
    return {
        # Two segments, "weights/0001": the SDK puts it into URLs as it is.
        "checkpoint_id": f"{record.kind.value}/{record.name}",
        "checkpoint_type": CHECKPOINT_TYPES[record.kind],
        "time": iso_time(record.created_at),
        "tinker_path": record.tinker_path,
        "size_bytes": record.size_bytes,
        "public": record.public,
        "user_metadata": record.user_metadata,
        "expires_at": None if record.expires_at is None else iso_time(record.expires_at),
    }
