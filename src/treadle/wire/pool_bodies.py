"""Bodies and query strings of operators' routes about pools and runs. See bodies.py.

What they do not know is refused by name: an operator's mistake must not decide something else.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints

from treadle.domain.limits import MAX_ID_CHARS, MAX_WORKERS_PER_POOL
from treadle.domain.states import ModelState
from treadle.wire.admin_bodies import AdminPageQuery
from treadle.wire.bodies import Body, Id, Text


class AddPoolBody(Body):
    """A base model to serve from now on."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    pool: Id
    """The name that clients ask for."""
    source: Id | None = None
    """A hub name, an absolute path of a directory on the servers, or `treadle/tiny`. Absent: what it was served from
    before it was removed."""
    revision: Id | None = None
    """A branch, tag or commit of a hub model."""


class PoolBody(Body):
    """Which pool, and why."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    pool: Id
    """Its name."""
    reason: Annotated[Text, StringConstraints(max_length=MAX_ID_CHARS)] = ""
    """What users who wait or are refused are told."""


class ScalePoolBody(Body):
    """How many workers a pool should have."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    pool: Id
    """Its name."""
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS_PER_POOL)] | None = None
    """Workers that train. Absent or null: as the servers' settings say."""
    samplers: Annotated[int, Field(ge=0, le=MAX_WORKERS_PER_POOL)] | None = None
    """Workers that only sample; with 0 those that train do that too. Absent or null: as the servers' settings say."""


class AdminRunsQuery(AdminPageQuery):
    """Which runs."""

    tenant: Id | None = None
    """Only of this tenant."""
    pool: Id | None = None
    """Only of this pool."""
    state: Annotated[ModelState, Field(strict=False)] | None = None
    """Only in this state."""
