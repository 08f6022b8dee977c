"""Bodies and query strings about named losses. See bodies.py. What they do not know is refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_ID_CHARS, MAX_NAMED_LOSS_BYTES, MAX_PAGE_ROWS, MAX_TENANTS_PER_LOSS
from treadle.domain.named_losses import UPLOAD, LossForm, LossStatus
from treadle.domain.policy import Scope
from treadle.wire.bodies import Body, Id, Text, _without_nul


def _is_tenant(tenant_id: str) -> str:
    """As it is. Raises ValueError for what no tenant can be called, such as a user's bare name."""
    Scope.parse(f"tenant:{tenant_id}")
    return tenant_id


_Tenant = Annotated[
    TenantId,
    StringConstraints(min_length=1, max_length=MAX_ID_CHARS),
    AfterValidator(_without_nul),
    AfterValidator(_is_tenant),
]
_Reason = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_ID_CHARS)]


class SubmitLossBody(Body):
    """A loss for an operator to review."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: Id
    """What passes will name as loss_fn: a lower-case identifier that no loss of this server has."""
    source: Id = UPLOAD
    """`upload`, `ms://OWNER/REPOSITORY/FILE` (ModelScope) or `hf://OWNER/REPOSITORY/FILE` (Hugging Face). A hub is
    asked when an operator begins the review."""
    revision: Id | None = None
    """The hash of the hub's commit."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of the file, hex. Needed for hubs; of an upload it must match when it is given."""
    content: Annotated[str, StringConstraints(max_length=MAX_NAMED_LOSS_BYTES)] | None = None
    """The file of an upload."""
    form: LossForm = "python"
    """`python`: a file that defines `loss` and `INPUTS`, traced when it is reviewed. `graph`: JSON of `inputs` and
    `graph`, as create_custom_loss takes them."""


class ApproveLossBody(Body):
    """Who may use a loss."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    tenants: Annotated[list[_Tenant], Field(min_length=1, max_length=MAX_TENANTS_PER_LOSS)] | None = None
    """These tenants and no others, its owner included only when it is named; null for all."""


class LossReasonBody(Body):
    """Why a loss is rejected or revoked."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    reason: _Reason
    """Its owner reads it, and so does whoever is refused the loss."""


class NamedLossesQuery(Body):
    """A page of the submissions, newest first."""

    model_config = ConfigDict(strict=False, extra="forbid", use_attribute_docstrings=True)

    status: Literal["pending", "approved", "rejected", "revoked"] | None = None
    """Only these."""
    limit: int = Field(default=100, ge=1, le=MAX_PAGE_ROWS)
    """Most entries of one answer."""
    before: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """The `next` of the page before."""

    def wanted_status(self) -> LossStatus | None:
        """As the store names it."""
        return None if self.status is None else LossStatus(self.status)
