"""How answers show submitted losses: to their owners, and all of it to operators. It refuses to know who asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from treadle.domain.named_losses import ReviewState, Submission
from treadle.gateway.answers import iso_time


def submission_answer(submission: Submission) -> dict[str, Any]:
    """A submission as its owner sees it."""
    return {
        "named_loss_id": submission.named_loss_id,
        "name": submission.name,
        "source": submission.source,
        "revision": submission.revision,
        "sha256": submission.sha256,
        "form": submission.form,
        "status": submission.status.value,
        "reason": submission.reason,
        "review": None if submission.review is None else _review(submission.review),
        "submitted_at": iso_time(submission.submitted_at),
        "decided_at": None if submission.decided_at is None else iso_time(submission.decided_at),
    }


def summary_answer(submission: Submission) -> dict[str, Any]:
    """A submission as operators see it in a listing."""
    return submission_answer(submission) | {
        "tenant_id": submission.tenant_id,
        "tenants": None if submission.tenants is None else list(submission.tenants),
        "decided_by": submission.decided_by,
        "definition_sha256": submission.definition_sha256,
    }


def detail_answer(submission: Submission) -> dict[str, Any]:
    """All of a submission, for operators."""
    content, definition = submission.content, submission.definition
    return summary_answer(submission) | {
        "content": None if content is None else content.decode(errors="backslashreplace"),
        "definition": None if definition is None else orjson.loads(definition),
    }


def _review(review: Mapping[str, Any]) -> dict[str, Any]:
    ended_at = review.get("ended_at")
    return {
        "state": review["state"],
        "is_ok": review["state"] == ReviewState.PASSED,
        "reason": review.get("reason"),
        "started_at": iso_time(review["started_at"]),
        "ended_at": None if ended_at is None else iso_time(ended_at),
        "isolation": review.get("isolation", []),
        "operations": review.get("operations", {}),
        "dry_run": review.get("dry_run"),
    }
