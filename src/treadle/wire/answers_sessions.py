"""Answers about sessions and runs as models. See answers.py."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from treadle.wire.answers import Answer


class CreateSessionAnswer(Answer):
    session_id: str
    warning_message: str | None = None
    """For the client's log."""


class HeartbeatAnswer(Answer):
    type: Literal["session_heartbeat"]


class SessionsAnswer(Answer):
    sessions: list[str]


class SessionAnswer(Answer):
    """What a session made, and what its client said of it."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str]
    display_name: str | None
    project_id: str
    tags: list[str]


class ActiveStatus(Answer):
    type: Literal["active"]


class FinishReasonAnswer(Answer):
    type: Literal["success", "errored", "interrupted"]


class FinishedStatus(Answer):
    type: Literal["client_finished"]
    reason: FinishReasonAnswer
    detail: str | None


class SessionSummary(Answer):
    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    status: Annotated[ActiveStatus | FinishedStatus, Field(discriminator="type")] | None
    """null: its client has been silent for long, and may come back."""
    checkpoints_count: int
    checkpoint_storage_bytes: int
    display_name: str | None
    user_metadata: dict[str, str]


class SearchCursorAnswer(Answer):
    last_created_at: datetime
    last_session_id: str


class SearchAnswer(Answer):
    """A page, newest first."""

    sessions: list[SessionSummary]
    next_cursor: SearchCursorAnswer | None
    """Send it with the same filters; null behind the last page."""


class TraceExportAnswer(Answer):
    status: Literal["ready"]
    url: str
    """Works without a key, for an hour."""


class CheckpointAnswer(Answer):
    checkpoint_id: str
    """Two segments, `weights/0001`."""
    checkpoint_type: Literal["training", "sampler", "external"]
    time: datetime
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, str]
    expires_at: datetime | None


class TrainingRunAnswer(Answer):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    lora_rank: int
    corrupted: bool
    """Its state is gone for good."""
    last_request_time: datetime
    last_checkpoint: CheckpointAnswer | None
    last_sampler_checkpoint: CheckpointAnswer | None
    user_metadata: dict[str, str]


class CursorAnswer(Answer):
    offset: int
    limit: int
    total_count: int


class TrainingRunsAnswer(Answer):
    training_runs: list[TrainingRunAnswer]
    cursor: CursorAnswer


class CheckpointsAnswer(Answer):
    checkpoints: list[CheckpointAnswer]
    cursor: CursorAnswer | None = None
    """Absent where everything is listed."""
