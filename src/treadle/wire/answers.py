"""Answers that are JSON, as models: what the OpenAPI document says of them, and what tests hold real answers against.

Handlers write plain dicts, because nothing is validated on the way out; these classes refuse nothing at run time.
Source of the fields: tinker SDK 0.38, its response types.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """One JSON answer."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class ErrorAnswer(Answer):
    """What every refusal looks like, whatever was asked for."""

    detail: str
    """What was wrong: the value that was sent, and the limit or the fix."""
    category: Literal["user", "server"]
    """Who has to act."""
    error_id: str | None = None
    """Of an unexpected error: what to look for in the server's log."""


class FutureAnswer(Answer):
    """A request that was accepted; its result comes from retrieve_future."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None
    """One id per sequence of a sample."""


class StatusAnswer(Answer):
    status: str


class EmptyAnswer(Answer):
    """An empty object."""


class GetInfoAnswer(Answer):
    """What a training run is made of."""

    type: Literal["get_info"]
    model_id: str
    model_name: str
    is_lora: bool
    lora_rank: int
    model_data: ModelData
    optimizer_config: dict[str, Any] | None = None


class ModelData(Answer):
    arch: str | None
    model_name: str
    tokenizer_id: str
    """A hub name, or a directory for clients on the server's machine."""


class LoadAnswer(Answer):
    """Requests that wait."""

    num_ops: int
    num_tokens: int
    num_bytes: int


class TenantLoadAnswer(Answer):
    """What the caller has waiting in all pools."""

    training: LoadAnswer
    sampling: LoadAnswer | None = None
    max_queued_tokens: int | None = None
    max_queued_bytes: int | None = None


class PoolLoadAnswer(LoadAnswer):
    """A pool's line, summed over tenants."""

    name: str
    is_ready: bool
    cycle: int | None
    """Number of the newest cycle."""
    num_tenants: int
    oldest_s: Annotated[float, Field(ge=0)]
    """Seconds that the oldest request of the line has waited."""


class RequestAnswer(Answer):
    """One request of the caller."""

    request_id: str
    kind: str
    state: Literal["queued", "done", "failed"]
    training_run_id: str | None
    seq_id: int
    num_tokens: int
    num_bytes: int
    created_at: datetime
    queued_s: float | None = None
    is_running: bool | None = None
    queue_state: str | None = None
    reason: str | None = None
    ahead: LoadAnswer | None = None
    waiting_for_seq_id: int | None = None
    tenant: TenantLoadAnswer | None = None
    pool: PoolLoadAnswer | None = None


class OpTimingAnswer(Answer):
    """Where the time of one op went."""

    seq_id: int
    kind: str
    finished_at: datetime
    num_tokens: int
    queued_s: float
    run_s: float
    cycle: int


class RunTimingAnswer(Answer):
    """Recent ops of a run, newest first, and what waits now."""

    training_run_id: str
    state: str
    next_seq_id: int
    recent: list[OpTimingAnswer]
    tenant: TenantLoadAnswer
    pool: PoolLoadAnswer
