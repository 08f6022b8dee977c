"""Query strings of listings, as the OpenAPI document describes them. gateway/paging.py reads them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from treadle.domain.limits import MAX_PAGE_ROWS


class Query(BaseModel):
    """The parameters of one listing."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class LimitQuery(Query):
    """The newest entries of a listing."""

    limit: int = Field(default=20, ge=1, le=MAX_PAGE_ROWS)
    """Most entries of the answer."""


class PageQuery(Query):
    """A slice of a listing."""

    limit: int = Field(default=20, ge=1, le=MAX_PAGE_ROWS)
    """Most entries of one answer."""
    offset: int = Field(default=0, ge=0, le=2**31 - 1)
    """Entries to leave out."""


class CheckpointsQuery(PageQuery):
    """A slice of the checkpoints."""

    limit: int = Field(default=100, ge=1, le=MAX_PAGE_ROWS)
    """Most entries of one answer."""
