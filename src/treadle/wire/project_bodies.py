"""Bodies and query strings about shared projects. See bodies.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from treadle.domain.limits import MAX_ID_CHARS, MAX_PAGE_ROWS
from treadle.wire.bodies import Body, Id, Text


def _with_words(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


class CreateProjectBody(Body):
    """POST projects. The name is for people: several projects may have the same one."""

    name: Annotated[Text, StringConstraints(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(_with_words)]


class ProjectsQuery(Body):
    """A page of projects, newest first."""

    model_config = ConfigDict(strict=False, use_attribute_docstrings=True)

    limit: int = Field(default=100, ge=1, le=MAX_PAGE_ROWS)
    """Most entries of one answer."""
    after: Id | None = None
    """`next` of the page before."""


class AdminProjectsQuery(ProjectsQuery):
    """A page of the projects of all tenants."""

    tenant: Id | None = None
    """Only those that this tenant owns."""
