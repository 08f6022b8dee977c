"""Shared projects as operators see and end them; and with real keys, whose users are named by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from gateway_support import Harness, ok, refused

from treadle.domain.keys import key_digest
from treadle.gateway import GatewaySettings

ADMIN, ALICE, BOB = "tml-admin", "tml-alice", "tml-bob"


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.1, auth_methods=("keys",))


@pytest.fixture
async def gateway(gateway: Harness) -> Harness:
    """One that knows an operator and two users."""
    for user, key in (("root", ADMIN), ("alice", ALICE), ("bob", BOB)):
        await gateway.store.keys.add(user, key_digest(key), is_admin=key == ADMIN)
    return gateway


async def call(gateway: Harness, method: str, path: str, body: object = None, *, key: str = ADMIN) -> httpx.Response:
    return await gateway.client.request(method, path, json=body, headers={"X-API-Key": key})


async def new_project(gateway: Harness, name: str = "ours", *, key: str = ALICE) -> str:
    return str(ok(await gateway.post("projects", {"name": name}, key=key))["project_id"])


async def test_operators_list_the_projects_of_all(gateway: Harness) -> None:
    ids = []
    for number, key in enumerate((ALICE, BOB, ALICE)):
        gateway.clock.advance(1)
        ids.append(await new_project(gateway, f"p{number}", key=key))
    ok(await call(gateway, "PUT", f"/api/v1/projects/{ids[0]}/members/bob", key=ALICE))

    seen: list[dict[str, Any]] = []
    after = ""
    for _ in range(2):
        page = ok(await call(gateway, "GET", f"/admin/v1/projects?limit=2{after}"))
        seen += page["projects"]
        after = f"&after={page['next']}"

    assert page["next"] is None
    assert [(p["project_id"], p["name"], p["tenant_id"], p["num_members"]) for p in seen] == [
        (ids[2], "p2", "user:alice", 1),
        (ids[1], "p1", "user:bob", 1),
        (ids[0], "p0", "user:alice", 2),
    ]
    own = ok(await call(gateway, "GET", "/admin/v1/projects?tenant=user:bob"))["projects"]
    assert [project["project_id"] for project in own] == [ids[1]]
    described = ok(await call(gateway, "GET", f"/admin/v1/projects/{ids[0]}"))
    assert {member["tenant_id"] for member in described["members"]} == {"user:alice", "user:bob"}


async def test_an_operators_end_of_a_project_is_in_both_logs(gateway: Harness) -> None:
    project = await new_project(gateway)
    ok(await call(gateway, "PUT", f"/api/v1/projects/{project}/members/bob", key=ALICE))
    session = ok(await gateway.post("create_session", {"project_id": project}, key=ALICE))["session_id"]
    path = f"/api/v1/sessions/{session}?access_scope=accessible"
    ok(await call(gateway, "GET", path, key=BOB))

    ok(await call(gateway, "DELETE", f"/admin/v1/projects/{project}"))

    refused(await call(gateway, "GET", path, key=BOB), 404)
    ok(await call(gateway, "GET", path, key=ALICE))
    entries = ok(await gateway.get("audit?event_type=projects", key=ALICE))["entries"]
    assert (entries[-1]["event"], entries[-1]["event_details"]["by"]) == ("project_delete", "an operator")
    [entry] = ok(await call(gateway, "GET", f"/admin/v1/audit?subject=project:{project}"))["events"]
    assert entry["event"] == "project.deleted"
    assert entry["actor"].startswith("user:root")
    before = {"owner": "user:alice", "name": "ours", "members": ["user:alice", "user:bob"]}
    assert entry["details"] == {"before": before, "after": None}
    refused(await call(gateway, "DELETE", f"/admin/v1/projects/{project}"), 404)
    refused(await call(gateway, "GET", f"/admin/v1/projects/{project}"), 404)


async def test_a_user_without_a_key_is_nobody(gateway: Harness) -> None:
    project = await new_project(gateway)
    refused(await call(gateway, "PUT", f"/api/v1/projects/{project}/members/carol", key=ALICE), 404)
    ok(await call(gateway, "PUT", f"/api/v1/projects/{project}/members/tml:user:bob", key=ALICE))
