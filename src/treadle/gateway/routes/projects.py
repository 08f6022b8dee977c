"""Shared projects: their members read each other's sessions, runs and checkpoints in them.

A project's owner says who is a member; a member may leave. To everybody else a project does not exist. What sharing
allows is decided in access.py. Invariant: an end of sharing that goes through here counts at once on this gateway, and
within SHARING_CACHE_S on others.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import TenantId, new_project_id
from treadle.errors import Forbidden, NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.auth import Principal, urn_of
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.project_pages import next_of, place_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.gateway.user_names import tenants_named
from treadle.store.projects import MemberRecord, ProjectRecord
from treadle.wire.answers import EmptyAnswer, ErrorAnswer
from treadle.wire.answers_projects import MemberAnswer, ProjectAnswer, ProjectsAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.project_bodies import CreateProjectBody, ProjectsQuery

router = Resource("/api/v1")

_MEMBER = "/projects/{project_id}/members/{user_or_tenant}"


@router.post("/projects", body=CreateProjectBody, answer=ProjectAnswer)
async def create_project(request: Request) -> Response:
    """A new project of the caller's with nobody else in it. Sessions are put into it by its project_id."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(CreateProjectBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    project = await gateway.store.projects.create(new_project_id(), principal.tenant_id, name=body.name)
    return await _answer(gateway, principal, project)


@router.get("/projects", query=ProjectsQuery, answer=ProjectsAnswer)
async def list_projects(request: Request) -> Response:
    """The shared projects that the caller takes part in, its own and others', newest first."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    query = query_of(request, ProjectsQuery)
    page = await gateway.store.projects.of_member(principal.tenant_id, query.limit, behind=place_of(query.after))
    projects = [_summary(project, principal) for project in page.projects]
    return json_response({"projects": projects, "next": next_of(page)})


@router.get("/projects/{project_id}", answer=ProjectAnswer)
async def get_project(request: Request, project_id: str) -> Response:
    """A project that the caller takes part in, and who else does."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    return await _answer(gateway, principal, await _project(gateway, principal, project_id))


@router.delete("/projects/{project_id}", answer=EmptyAnswer, others={403: ErrorAnswer})
async def delete_project(request: Request, project_id: str) -> Response:
    """End a project of the caller's, and with it the sharing. Its sessions stay, under their owners."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    project = await _own_project(gateway, principal, project_id)
    await gateway.store.projects.delete(project.project_id, owner=principal.tenant_id)
    gateway.access.sharing_changed()
    return json_response({})


@router.put(_MEMBER, answer=MemberAnswer, others={403: ErrorAnswer})
async def add_member(request: Request, project_id: str, user_or_tenant: str) -> Response:
    """Let a user into a project of the caller's: `alice`, `user:alice`, or as answers name owners. Idempotent.

    Users of another organization, or of one where the owner has none, do not exist here.
    """
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    project = await _own_project(gateway, principal, project_id)
    named = tenants_named(user_or_tenant)
    member, is_new = await gateway.store.projects.add_member(project.project_id, principal.tenant_id, named)
    return _membership(project, member, is_member=True, changed=is_new)


@router.delete(_MEMBER, answer=MemberAnswer, others={403: ErrorAnswer})
async def remove_member(request: Request, project_id: str, user_or_tenant: str) -> Response:
    """End a membership: the owner anybody's, a member its own. What was shared with it, and what it shared, ends."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    project = await _project(gateway, principal, project_id)
    named = tenants_named(user_or_tenant)
    if principal.tenant_id not in (*named, project.tenant_id):
        raise _not_owner(project)
    member, removed = await gateway.store.projects.remove_member(project.project_id, named, by=principal.tenant_id)
    gateway.access.sharing_changed()
    return _membership(project, member, is_member=False, changed=removed)


async def _project(gateway: Gateway, principal: Principal, project_id: str) -> ProjectRecord:
    """A project that the caller takes part in. Raises NotFound."""
    project = await gateway.store.projects.get(project_id)
    if project is None or not await gateway.store.projects.takes_part(principal.tenant_id, project_id):
        raise NotFound(f"project {project_id[:200]!r} does not exist")
    return project


async def _own_project(gateway: Gateway, principal: Principal, project_id: str) -> ProjectRecord:
    """One of the caller's own. Raises NotFound, and Forbidden for another that it takes part in."""
    project = await _project(gateway, principal, project_id)
    if project.tenant_id != principal.tenant_id:
        raise _not_owner(project)
    return project


def _not_owner(project: ProjectRecord) -> Forbidden:
    return Forbidden(f"project {project.project_id} is {urn_of(project.tenant_id)}'s: only its owner changes it")


async def _answer(gateway: Gateway, principal: Principal, project: ProjectRecord) -> Response:
    members = await gateway.store.projects.members(project.project_id)
    return json_response(_summary(project, principal) | {"members": [_member(member) for member in members]})


def _summary(project: ProjectRecord, principal: Principal) -> dict[str, object]:
    return {
        "project_id": project.project_id,
        "name": project.name,
        "owner": urn_of(project.tenant_id),
        "is_owner": project.tenant_id == principal.tenant_id,
        "created_at": iso_time(project.created_at),
        "num_members": project.num_members,
    }


def _member(member: MemberRecord) -> dict[str, object]:
    return {
        "user": urn_of(member.tenant_id),
        "added_at": iso_time(member.added_at),
        "is_effective": member.is_effective,
    }


def _membership(project: ProjectRecord, member: TenantId, *, is_member: bool, changed: bool) -> Response:
    body = {"project_id": project.project_id, "user": urn_of(member), "is_member": is_member, "changed": changed}
    return json_response(body)
