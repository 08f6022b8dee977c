"""Bodies and query strings of operators' routes about tenants, records, queues and checkpoints. See bodies.py.

What they do not know is refused by name: an operator's mistake must not decide something else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, StringConstraints, model_validator

from treadle.domain.fairness import WeightClass
from treadle.domain.limits import MAX_ID_CHARS, MAX_PAGE_ROWS, MAX_TEXT_CHARS
from treadle.wire.bodies import Body, Id, Text

# Of an organisation, a word of a search, a reason.
ShortText = Annotated[Text, StringConstraints(max_length=MAX_ID_CHARS)]
_Class = Annotated[WeightClass, Field(strict=False)]
_MAX_CURSOR_CHARS = 4_096


class TenantBody(Body):
    """What changes of a tenant; what is absent stays. organization null: it leaves its own."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    weight_class: _Class | None = None
    """What its tokens weigh while others wait."""
    organization: ShortText | None = None
    """One that exists; null or "" for none."""
    is_suspended: bool | None = None
    """Whether everything it asks for is refused."""
    suspended_reason: ShortText | None = None
    """What it is told then."""

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, fields: object) -> object:
        # Not here: null is a decision.
        return fields


class OrganizationBody(Body):
    """An organisation as it shall be."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    description: Annotated[Text, StringConstraints(max_length=MAX_TEXT_CHARS)] = ""
    """For people."""


class CheckpointBody(Body):
    """Which checkpoint."""

    model_config = ConfigDict(extra="forbid")

    path: Id


class AdminPageQuery(Body):
    """A page of a listing."""

    model_config = ConfigDict(strict=False, extra="forbid", use_attribute_docstrings=True)

    limit: int = Field(default=100, ge=1, le=MAX_PAGE_ROWS)
    """Most entries of one answer."""
    after: Annotated[str, StringConstraints(min_length=1, max_length=_MAX_CURSOR_CHARS)] | None = None
    """The `next` of the page before."""


class TenantsQuery(AdminPageQuery):
    """Which tenants."""

    organization: Id | None = None
    """Only of this organisation."""
    q: Id | None = None
    """Only those whose id contains this text."""


class AdminCheckpointsQuery(AdminPageQuery):
    """Which checkpoints."""

    tenant: Id | None = None
    """Only of this tenant."""
    public: bool | None = None
    """Only published ones, or only others."""


class AuditEventsQuery(AdminPageQuery):
    """Which events."""

    since: AwareDatetime | None = None
    """Not before this time, which has a zone."""
    before: AwareDatetime | None = None
    """Before this time."""
    actor: Id | None = None
    """Of this tenant, whichever of its keys; or of one key: `user:ops (key 3)`."""
    subject: Id | None = None
    """About this: `tenant:user:alice`, `key:3`, `pool:NAME`."""
    event: Id | None = None
    """Of this name: `tenant.changed`."""


class UsageSumsQuery(Body):
    """What to add up."""

    model_config = ConfigDict(strict=False, extra="forbid", use_attribute_docstrings=True)

    since: AwareDatetime | None = None
    """The first hour, with a zone; seven days back without it."""
    before: AwareDatetime | None = None
    """The end of the last hour; this hour's end without it."""
    tenant: Id | None = None
    """Only of this tenant."""
    group_by: Literal["tenant", "run", "session", "project", "day", "hour"] = "tenant"
    """Runs, sessions and projects are listed with their tenant; days and hours are UTC's, over all tenants."""


class UsagePageQuery(UsageSumsQuery):
    """A page of it."""

    limit: int = Field(default=100, ge=1, le=MAX_PAGE_ROWS)
    """Most groups of one answer."""
    after: Annotated[str, StringConstraints(min_length=1, max_length=_MAX_CURSOR_CHARS)] | None = None
    """The `next` of the page before."""


class QueueQuery(Body):
    """How much of the queue."""

    model_config = ConfigDict(strict=False, extra="forbid", use_attribute_docstrings=True)

    pool: Id | None = None
    """Only this pool."""
    limit: int = Field(default=100, ge=1, le=MAX_PAGE_ROWS)
    """Most tenants of each pool, those with the most waiting tokens first."""


class SlotsQuery(QueueQuery):
    """Which slots."""

    limit: int = Field(default=1_000, ge=1, le=MAX_PAGE_ROWS)
    """Most runs of each pool, by their ids."""


def organization_of(body: TenantBody) -> str | None:
    """The organisation to set: "" for none, None to leave it as it is."""
    if "organization" not in body.model_fields_set:
        return None
    return body.organization or ""


def fields_of(body: Body) -> set[str]:
    """What was sent with a value, or as a decision for none."""
    sent: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set}
    return {name for name, value in sent.items() if value is not None or name == "organization"}
