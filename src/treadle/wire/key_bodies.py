"""Bodies and query strings of operators' routes about API keys. See bodies.py.

What they do not know is refused by name: a key that never ends because of a typo would be a surprise.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, StringConstraints, model_validator

from treadle.domain.keys import checked_key_name
from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.wire.bodies import Body, Id

MAX_KEY_LIFE_S = 10 * 365 * 24 * 3_600
_MAX_NAME_CHARS = 128
_MAX_CURSOR_CHARS = 64


KeyName = Annotated[str, AfterValidator(checked_key_name)]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=_MAX_NAME_CHARS)]


class NewKeyBody(Body):
    """A key that is to be made."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    user: _Name
    """Whose it is. Keys of one user are one tenant, user:NAME."""
    name: KeyName | None = None
    """What people call the key."""
    is_admin: bool = False
    """Whether it may use /admin/v1."""
    expires_in_s: Annotated[int, Field(ge=1, le=MAX_KEY_LIFE_S)] | None = None
    """Seconds after which it ends; never without it."""
    organization: _Name | None = None
    """What its tenant becomes a member of; refused when that is in another one."""


class KeyBody(Body):
    """What changes of a key; what is absent stays."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: KeyName | None = None
    """What people call it; null for nothing."""
    expires_at: Annotated[AwareDatetime, Field(strict=False)] | None = None
    """When it ends, with a zone; null for never."""

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, fields: object) -> object:
        # Not here: null is a decision.
        return fields


class KeysQuery(Body):
    """Which keys."""

    model_config = ConfigDict(strict=False, extra="forbid", use_attribute_docstrings=True)

    user: Id | None = None
    """Only of this user."""
    limit: int = Field(default=100, ge=1, le=MAX_PAGE_ROWS)
    """Most entries of one answer."""
    before: Annotated[str, StringConstraints(min_length=1, max_length=_MAX_CURSOR_CHARS)] | None = None
    """The `next` of the page before."""
