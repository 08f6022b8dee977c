"""Answers that hand out results, as models. See answers.py."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from treadle.domain.states import QueueState
from treadle.wire.answers import Answer


class CompletionAnswer(Answer):
    """One sample that is over; retrieve_future has its result or its error."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None
    """Bytes of the result."""


class CompletionsAnswer(Answer):
    """What was finished behind the cursor."""

    completions: list[CompletionAnswer]
    cursor: int
    """What the next request sends as prev_cursor."""


class QueuedAnswer(Answer):
    """There is no result yet."""

    queue_state: QueueState
    queue_state_reason: str | None = None
    """For people."""


class ResultAnswer(Answer):
    """A result, whose fields depend on what was asked for; or why there will be none.

    Passes and samples are protobuf for clients that accept it.
    """

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    error: str | None = None
    """Only of a request that failed, which is final."""
    category: Literal["user", "server", "unknown"] | None = None
    """Only of a request that failed: who has to act."""
    status: Literal["complete_metadata"] | None = None
    """Only when the client allowed it: the result is large, and this is its size."""
    response_payload_size: int | None = None
    """Bytes of the result."""
