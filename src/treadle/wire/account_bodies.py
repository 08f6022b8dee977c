"""Bodies and query strings about sessions, runs and accounts. See bodies.py.

Numbers and times of a query string are texts, so these models read them leniently where bodies are strict.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, StringConstraints, model_validator

from treadle.domain.limits import MAX_PAGE_ROWS, MAX_TEXT_CHARS
from treadle.wire.bodies import Body, Id, Metadata, SessionIdField, Text

_MAX_OWNERS = 10
_MAX_SEARCHED_PROJECTS = 100
_MAX_FOUND_SESSIONS = 200
# Of a status: each of them once.
_MAX_REASONS = 3
# Each filter is a condition of one statement, and databases limit how many those may be (SQLite: 1,000 deep).
_MAX_FILTERS = 32
# Also from text, which is how JSON and query strings have times.
_Time = Annotated[AwareDatetime, Field(strict=False)]


def _few_words(text: str) -> str:
    if len(text.split()) > _MAX_FILTERS:
        raise ValueError(f"has over {_MAX_FILTERS} words")
    return text


class AssignProjectBody(Body):
    """PUT sessions/{id}/project."""

    project_id: Id


class SearchOwner(Body):
    """Whose sessions: one's own, also those that shared projects let one read, or of these those of some users."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[Id] | None = Field(default=None, min_length=1, max_length=_MAX_OWNERS)

    @model_validator(mode="after")
    def _users_are_named(self) -> Self:
        if self.type == "user" and self.owner_urns is None:
            raise ValueError("of type 'user' needs owner_urns")
        return self


class SearchedStatus(Body):
    """Sessions of this server are never cancelled nor failed by the server; to look for those finds none."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = Field(
        default=None, min_length=1, max_length=_MAX_REASONS
    )


class SearchCursor(Body):
    """The next_cursor of the page before."""

    last_created_at: _Time
    last_session_id: SessionIdField


class SearchSessionsBody(Body):
    """sessions/search. All filters must fit, but that a session_id or a display_name is enough."""

    session_id: SessionIdField | None = None
    project_ids: list[Id] | None = Field(default=None, max_length=_MAX_SEARCHED_PROJECTS)
    user_metadata: Annotated[Metadata, Field(max_length=_MAX_FILTERS)] = Field(default_factory=dict)
    display_name: (
        Annotated[Text, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS), AfterValidator(_few_words)] | None
    ) = None
    owner: SearchOwner = SearchOwner()
    statuses: list[SearchedStatus] | None = Field(default=None, min_length=1, max_length=_MAX_FILTERS)
    limit: Annotated[int, Field(ge=1, le=_MAX_FOUND_SESSIONS)] = 50
    cursor: SearchCursor | None = None


class ScopeQuery(Body):
    """A question that may be about more than the caller's own."""

    model_config = ConfigDict(strict=False, use_attribute_docstrings=True)

    access_scope: Literal["owned", "accessible"] = "owned"
    """`owned`: the caller's own; `accessible`: also what shared projects let the caller read."""

    @property
    def with_shared(self) -> bool:
        return self.access_scope == "accessible"


class ScopedPageQuery(ScopeQuery):
    """A page of such a listing."""

    limit: int = Field(default=20, ge=1, le=MAX_PAGE_ROWS)
    """Most entries of one answer."""
    offset: int = Field(default=0, ge=0, le=2**31 - 1)
    """Entries to leave out."""


class RunsQuery(ScopedPageQuery):
    """A page of the listing of runs."""

    project_id: Id | None = None
    """Only runs of sessions in this project."""


class AuditQuery(Body):
    """One day of the audit log."""

    model_config = ConfigDict(strict=False, use_attribute_docstrings=True)

    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all"
    day: date | None = None
    """A day of UTC; today without it."""


class UsageQuery(Body):
    """A window of whole hours."""

    model_config = ConfigDict(strict=False, use_attribute_docstrings=True)

    starting_on: AwareDatetime
    """The first hour, with a zone. Not in the future."""
    ending_before: AwareDatetime
    """The end of the last hour, 14 days later at most."""


class StorageQuery(Body):
    """What checkpoints take."""

    model_config = ConfigDict(strict=False, use_attribute_docstrings=True)

    project_id: Id | None = None
    """Only of this project."""
