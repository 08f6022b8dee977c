"""Answers about named losses, as models: to their owners, and to operators. See answers.py."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from treadle.wire.answers import Answer


class LossReviewAnswer(Answer):
    """What a review found."""

    state: Literal["running", "passed", "failed"]
    is_ok: bool
    """Whether it passed: an operator may approve the loss."""
    reason: str | None
    """Why it failed, with the line of the file where there is one."""
    started_at: datetime
    ended_at: datetime | None
    isolation: list[str]
    """What kept the file from the server: system calls, namespaces, limits. Empty for a graph."""
    operations: dict[str, int]
    """How often the graph calls what."""
    dry_run: dict[str, Any] | None
    """On made-up tensors: `inputs` (which kinds worked, and whether the gradient is the derivative),
    `ms_per_2048_tokens`, `peak_bytes`, `one_token`, `long_datum`."""


class SubmissionAnswer(Answer):
    """A submission, as its owner sees it."""

    named_loss_id: int
    name: str
    source: str
    revision: str | None
    sha256: str
    """Of the file."""
    form: Literal["graph", "python"]
    status: Literal["pending", "approved", "rejected", "revoked"]
    reason: str | None
    """Why it was rejected or revoked."""
    review: LossReviewAnswer | None
    submitted_at: datetime
    decided_at: datetime | None


class NamedLossSummary(SubmissionAnswer):
    """A submission, as operators see it."""

    tenant_id: str
    """Its owner."""
    tenants: list[str] | None
    """Who may use it once it is approved; null for all."""
    decided_by: str | None
    definition_sha256: str | None
    """Of the graph that runs; null before it is known."""


class NamedLossDetailAnswer(NamedLossSummary):
    """A submission with what there is to read of it."""

    content: str | None
    """The file; null until a hub's was fetched. What is not text is written as escapes."""
    definition: dict[str, Any] | None
    """The graph that runs: `name`, `inputs`, `graph`."""


class NamedLossesAnswer(Answer):
    data: list[NamedLossSummary]
    """Newest first."""
    next: str | None
    """Send it as `before`; null behind the last page."""
