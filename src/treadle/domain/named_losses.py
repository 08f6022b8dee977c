"""Losses that users submitted under a name, and what became of them. Nouns; store/named_losses.py has the rules.

A submission is never changed by its owner: another try is another submission. Its form is what was sent; what runs is
always a graph, the definition, which is found by the SHA-256 of its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from treadle.domain.custom_loss import CUSTOM
from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_NAMED_LOSS_BYTES
from treadle.domain.losses import LOSSES
from treadle.errors import InvalidRequest

LossForm = Literal["graph", "python"]
UPLOAD = "upload"

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class LossStatus(StrEnum):
    """Where a submission stands. Only an approved one is ever used."""

    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"
    REVOKED = "revoked"


class ReviewState(StrEnum):
    """What a review came to; stored in it as "state"."""

    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class NewSubmission:
    """What a user submits. sha256: of the file, hex. content: the file; None until a hub's was fetched.

    definition: the graph of a submission that is one, canonical JSON.
    """

    name: str
    tenant_id: TenantId
    source: str
    revision: str | None
    sha256: str
    form: LossForm
    content: bytes | None
    definition: bytes | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """A submission as it is kept. tenants: who may use it once it is approved; None for all.

    review: JSON, for people; its "state" is a ReviewState. None before there was one. content and definition are None
    in listings. Times are seconds since the epoch.
    """

    named_loss_id: int
    name: str
    tenant_id: TenantId
    source: str
    revision: str | None
    sha256: str
    form: LossForm
    status: LossStatus
    submitted_at: float
    definition_sha256: str | None = None
    tenants: tuple[TenantId, ...] | None = None
    review: Mapping[str, Any] | None = None
    reason: str | None = None
    decided_at: float | None = None
    decided_by: str | None = None
    content: bytes | None = None
    definition: bytes | None = None

    @property
    def subject(self) -> str:
        """As the audit log names it."""
        return subject_of(self.named_loss_id)

    @property
    def is_reviewable(self) -> bool:
        """Whether its one review is still to come."""
        return self.status is LossStatus.PENDING and self.review is None


@dataclass(frozen=True, slots=True)
class NamedLoss:
    """An approved loss: what a pass with loss_fn=`name` computes. tenants: who may use it; None for all."""

    named_loss_id: int
    name: str
    tenant_id: TenantId
    tenants: tuple[TenantId, ...] | None
    definition_sha256: str
    definition: bytes

    def is_for(self, tenant_id: TenantId) -> bool:
        """Whether this tenant may use it."""
        return self.tenants is None or tenant_id in self.tenants


@dataclass(frozen=True, slots=True)
class ReviewResult:
    """How a review ended. report: JSON, for people, with the state in it.

    content: the file, when it was fetched. definition: the graph that it became.
    """

    report: Mapping[str, Any]
    content: bytes | None = None
    definition: bytes | None = None


def subject_of(named_loss_id: int) -> str:
    """A submission as the audit log names it."""
    return f"loss:{named_loss_id}"


def is_name(text: str) -> bool:
    """Whether a loss could be called so."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Raise InvalidRequest unless a loss may have this name."""
    if not is_name(name):
        raise InvalidRequest(f"name {name[:80]!r} is not a lower-case identifier of up to 64 characters")
    if name == CUSTOM or name in LOSSES:
        raise InvalidRequest(f"name {name!r} is taken: it is a loss of this server")


def check_size(num_bytes: int) -> None:
    """Raise InvalidRequest for a file that is larger than a loss may be."""
    if num_bytes > MAX_NAMED_LOSS_BYTES:
        raise InvalidRequest(f"the file has {num_bytes} bytes; allowed are {MAX_NAMED_LOSS_BYTES}")
