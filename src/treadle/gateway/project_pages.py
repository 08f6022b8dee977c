"""Pages of projects: how `after` says where one begins. It refuses to know whose projects they are."""

from __future__ import annotations

from treadle.errors import InvalidRequest
from treadle.store.projects import ProjectPage, ProjectPlace


def place_of(after: str | None) -> ProjectPlace | None:
    """Behind which project the page begins. Raises InvalidRequest for what is no `next` of a page."""
    if after is None:
        return None
    created_at, separator, project_id = after.partition(":")
    try:
        place = ProjectPlace(float(created_at), project_id)
    except ValueError:
        separator = ""
    if not separator or not project_id or place.created_at != place.created_at:
        raise InvalidRequest(f"after={after[:80]!r} is not the `next` of a page")
    return place


def next_of(page: ProjectPage) -> str | None:
    """What asks for the page behind this one; None when there is none."""
    if page.is_last:
        return None
    # The text of a float says exactly which one it is.
    return f"{page.projects[-1].created_at!r}:{page.projects[-1].project_id}"
