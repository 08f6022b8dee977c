"""Pages of projects: how `after` says where one begins. It refuses to know whose projects they are."""

from __future__ import annotations

from treadle.gateway import keyset
from treadle.store.projects import ProjectPage, ProjectPlace


def place_of(after: str | None) -> ProjectPlace | None:
    """Behind which project the page begins. Raises InvalidRequest for what is no `next` of a page."""
    return None if after is None else ProjectPlace(*keyset.place_of(after, float, str))


def next_of(page: ProjectPage) -> str | None:
    """What asks for the page behind this one; None when there is none."""
    if page.is_last:
        return None
    last = page.projects[-1]
    return keyset.cursor_of([last.created_at, last.project_id])
