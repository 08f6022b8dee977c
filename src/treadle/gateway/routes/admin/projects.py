"""Shared projects of all tenants."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import TenantId
from treadle.errors import NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.context import gateway_of
from treadle.gateway.project_pages import next_of, place_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.store.projects import ProjectRecord
from treadle.wire.answers import EmptyAnswer, ErrorAnswer
from treadle.wire.answers_admin_projects import AdminProjectAnswer, AdminProjectsAnswer
from treadle.wire.project_bodies import AdminProjectsQuery

router = Resource("/admin/v1")


@router.get("/projects", query=AdminProjectsQuery, answer=AdminProjectsAnswer, others={403: ErrorAnswer})
async def list_projects(request: Request) -> Response:
    """Shared projects, newest first: all, or those of one owner."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, AdminProjectsQuery)
    owner = None if query.tenant is None else TenantId(query.tenant)
    page = await gateway.store.projects.of_owner(owner, query.limit, behind=place_of(query.after))
    projects = [_summary(project) for project in page.projects]
    return json_response({"projects": projects, "next": next_of(page)})


@router.get("/projects/{project_id}", answer=AdminProjectAnswer, others={403: ErrorAnswer})
async def get_project(request: Request, project_id: str) -> Response:
    """One project and its members."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    project = await gateway.store.projects.get(project_id)
    if project is None:
        raise NotFound(f"project {project_id[:200]!r} does not exist")
    members = [
        {
            "tenant_id": member.tenant_id,
            "added_at": iso_time(member.added_at),
            "is_effective": member.is_effective,
        }
        for member in await gateway.store.projects.members(project_id)
    ]
    return json_response(_summary(project) | {"members": members})


@router.delete("/projects/{project_id}", answer=EmptyAnswer, others={403: ErrorAnswer})
async def delete_project(request: Request, project_id: str) -> Response:
    """End a project, and with it the sharing. Its sessions stay, under their owners; its owner's log says so."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    await gateway.store.projects.delete_as(Author(principal.tenant_id, principal.actor), project_id)
    gateway.access.sharing_changed()
    return json_response({})


def _summary(project: ProjectRecord) -> dict[str, object]:
    return {
        "project_id": project.project_id,
        "name": project.name,
        "tenant_id": project.tenant_id,
        "created_at": iso_time(project.created_at),
        "num_members": project.num_members,
    }
