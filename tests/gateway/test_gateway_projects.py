"""Shared projects: who may read what because of them, what ends that, and who decides it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from gateway_support import KEY, OTHER_KEY, Harness, failed, ok, open_tenant, refused
from gateway_surface import Estate, new_estate, serve_text
from test_gateway_openai import HELLO

from treadle.domain.ids import CheckpointKind, TenantId
from treadle.domain.tenants import TenantChange
from treadle.gateway import create_app
from treadle.gateway.sharing import SHARING_CACHE_S
from treadle.store.audit import Author

THIRD_KEY = "tml-three"
OWNER, MEMBER, STRANGER = (f"tml:{open_tenant(key)}" for key in (KEY, OTHER_KEY, THIRD_KEY))
BOSS = Author(open_tenant("tml-boss"), "boss")


async def call(gateway: Harness, method: str, path: str, body: object = None, *, key: str = KEY) -> httpx.Response:
    return await gateway.client.request(method, f"/api/v1/{path}", json=body, headers={"X-API-Key": key})


async def new_project(gateway: Harness, *members: str, key: str = KEY) -> str:
    """A shared project of `key` with the tenants of these keys in it."""
    project_id = str(ok(await gateway.post("projects", {"name": "ours"}, key=key))["project_id"])
    for member in members:
        # A tenant that never did anything here does not exist.
        await gateway.new_session(key=member)
        ok(await call(gateway, "PUT", f"projects/{project_id}/members/{open_tenant(member)}", key=key))
    return project_id


async def move(gateway: Harness, session_id: str, project_id: str, *, key: str = KEY) -> httpx.Response:
    return await call(gateway, "PUT", f"sessions/{session_id}/project", {"project_id": project_id}, key=key)


async def shared_estate(gateway: Harness, project_id: str, *, key: str = KEY) -> Estate:
    estate = await new_estate(gateway, key=key)
    ok(await move(gateway, estate.session_id, project_id, key=key))
    return estate


async def can_read(gateway: Harness, theirs: Estate, *, key: str = OTHER_KEY) -> bool:
    """Whether every way of reading somebody's things is open; fails when only some of them are."""
    scope = "access_scope=accessible"
    external = theirs.url(CheckpointKind.EXTERNAL).removeprefix("/api/v1/")
    answers = [
        await call(gateway, "GET", path, key=key)
        for path in (
            f"sessions/{theirs.session_id}?{scope}",
            f"sessions/{theirs.session_id}/trace_export",
            f"training_runs/{theirs.model_id}?{scope}",
            f"training_runs/{theirs.model_id}/checkpoints",
            f"{external}/archive",
            f"{external}/external_weights_urls",
        )
    ]
    for kind in CheckpointKind:
        answers.append(await gateway.post("weights_info", {"tinker_path": theirs.path(kind)}, key=key))
    readings = {answer.status_code in (200, 302) for answer in answers}
    listed = ok(await call(gateway, "GET", f"sessions?{scope}", key=key))["sessions"]
    readings.add(theirs.session_id in listed)
    runs = ok(await call(gateway, "GET", f"training_runs?{scope}", key=key))["training_runs"]
    readings.add(theirs.model_id in [run["training_run_id"] for run in runs])
    found = ok(await gateway.post("sessions/search", {"owner": {"type": "accessible"}}, key=key))["sessions"]
    readings.add(theirs.session_id in [session["session_id"] for session in found])
    assert len(readings) == 1, [(answer.url.path, answer.status_code) for answer in answers]
    return readings.pop()


@asynccontextmanager
async def another_gateway(gateway: Harness) -> AsyncIterator[Harness]:
    """A second one on the same database."""
    other = replace(gateway)
    other.app = create_app(gateway.deps())
    transport = httpx.ASGITransport(app=other.app)
    async with (
        other.app.router.lifespan_context(other.app),
        httpx.AsyncClient(transport=transport, base_url="http://other") as client,
    ):
        other.client = client
        yield other


async def test_members_read_what_is_in_the_project_and_nobody_else_does(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY)
    theirs = await new_estate(gateway)
    assert not await can_read(gateway, theirs)

    ok(await move(gateway, theirs.session_id, project))

    assert await can_read(gateway, theirs)
    assert not await can_read(gateway, theirs, key=THIRD_KEY)
    members = await shared_estate(gateway, project, key=OTHER_KEY)
    assert await can_read(gateway, members, key=KEY), "the owner reads what members put there"


async def test_members_start_from_shared_weights(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY)
    serve_text(gateway)
    theirs, mine = await shared_estate(gateway, project), await new_estate(gateway, key=OTHER_KEY)
    load = {"session_id": mine.session_id, "model_seq_id": 5, "path": theirs.path(), "optimizer": True}
    sampler = {"session_id": mine.session_id, "sampling_session_seq_id": 9, "model_path": theirs.path()}
    copy = {"source_path": theirs.path(), "destination_project_id": "mine"}
    text = {"model": theirs.path(CheckpointKind.SAMPLER), "messages": HELLO}

    request_id = ok(await gateway.post("load_weights", load, key=OTHER_KEY))["request_id"]
    assert (await gateway.future(request_id, key=OTHER_KEY)).status_code == 408, "it waits for a worker"
    ok(await gateway.post("create_sampling_session", sampler, key=OTHER_KEY))
    copied = ok(await gateway.post("copy_weights", copy, key=OTHER_KEY))["tinker_path"]
    ok(await gateway.post("weights_info", {"tinker_path": copied}, key=OTHER_KEY))
    counted = await gateway.client.post("/v1/messages/count_tokens", json=text, headers={"X-API-Key": OTHER_KEY})
    assert counted.status_code == 200

    stranger = await new_estate(gateway, key=THIRD_KEY)
    load |= {"session_id": stranger.session_id}
    request_id = ok(await gateway.post("load_weights", load, key=THIRD_KEY))["request_id"]
    assert "does not exist" in failed(await gateway.future(request_id, key=THIRD_KEY))
    sampler |= {"session_id": stranger.session_id}
    refused(await gateway.post("create_sampling_session", sampler, key=THIRD_KEY), 404)
    refused(await gateway.post("copy_weights", copy, key=THIRD_KEY), 404)


async def test_a_scope_of_owned_leaves_shared_things_out(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY)
    theirs = await shared_estate(gateway, project)
    refused(await gateway.get(f"sessions/{theirs.session_id}", key=OTHER_KEY), 404)
    refused(await gateway.get(f"training_runs/{theirs.model_id}", key=OTHER_KEY), 404)
    runs = ok(await gateway.get(f"training_runs?project_id={project}", key=OTHER_KEY))
    assert runs["training_runs"] == []
    assert theirs.session_id not in ok(await gateway.get("sessions", key=OTHER_KEY))["sessions"]


async def test_runs_and_sessions_are_listed_by_project_and_owner(gateway: Harness) -> None:
    project, elsewhere = await new_project(gateway, OTHER_KEY), await new_project(gateway, OTHER_KEY)
    theirs, mine = await shared_estate(gateway, project), await shared_estate(gateway, project, key=OTHER_KEY)
    other = await shared_estate(gateway, elsewhere)

    async def runs(query: str) -> set[str]:
        answer = ok(await gateway.get(f"training_runs?{query}", key=OTHER_KEY))
        assert answer["cursor"]["total_count"] == len(answer["training_runs"])
        return {run["training_run_id"] for run in answer["training_runs"]}

    async def found(**body: object) -> set[str]:
        answer = ok(await gateway.post("sessions/search", {"project_ids": [project], **body}, key=OTHER_KEY))
        return {session["session_id"] for session in answer["sessions"]}

    assert await runs(f"access_scope=accessible&project_id={project}") == {theirs.model_id, mine.model_id}
    assert await runs(f"access_scope=accessible&project_id={elsewhere}") == {other.model_id}
    assert await runs(f"project_id={project}") == {mine.model_id}
    assert await found() == {mine.session_id}
    assert await found(owner={"type": "accessible"}) == {mine.session_id, theirs.session_id}
    assert await found(owner={"type": "user", "owner_urns": [OWNER]}) == {theirs.session_id}
    assert await found(owner={"type": "user", "owner_urns": [MEMBER, "who"]}) == {mine.session_id}
    assert await found(owner={"type": "user", "owner_urns": [STRANGER]}) == set()
    summary = ok(await gateway.post("sessions/search", {"owner": {"type": "accessible"}}, key=OTHER_KEY))["sessions"]
    assert {session["owner"] for session in summary} == {OWNER, MEMBER}


async def test_pages_of_a_search_go_on_behind_a_shared_session(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY)
    expected = []
    for key in (KEY, OTHER_KEY) * 2:
        gateway.clock.advance(1)
        body = {"project_id": project}
        expected.append(ok(await gateway.post("create_session", body, key=key))["session_id"])
    seen: list[str] = []
    query: dict[str, Any] = {"owner": {"type": "accessible"}, "project_ids": [project], "limit": 1}
    for _ in expected:
        answer = ok(await gateway.post("sessions/search", query, key=OTHER_KEY))
        seen += [session["session_id"] for session in answer["sessions"]]
        query["cursor"] = answer["next_cursor"]
    assert seen == expected[::-1]
    assert query["cursor"] is None


@pytest.mark.parametrize("end", ["remove", "leave", "move", "delete", "owner moves away"])
async def test_sharing_ends_at_once_and_elsewhere_within_a_second(gateway: Harness, end: str) -> None:
    project = await new_project(gateway, OTHER_KEY)
    theirs, mine = await shared_estate(gateway, project), await shared_estate(gateway, project, key=OTHER_KEY)
    member = f"projects/{project}/members/{open_tenant(OTHER_KEY)}"
    async with another_gateway(gateway) as other:
        assert await can_read(gateway, theirs)
        assert await can_read(other, theirs)
        assert await can_read(other, mine, key=KEY)
        urls = [await signed_urls(one, theirs) for one in (gateway, other)]
        match end:
            case "remove":
                ok(await call(gateway, "DELETE", member))
            case "leave":
                ok(await call(gateway, "DELETE", member, key=OTHER_KEY))
            case "move":
                ok(await move(gateway, theirs.session_id, "private"))
            case "delete":
                ok(await call(gateway, "DELETE", f"projects/{project}"))
            case "owner moves away":
                await gateway.store.organizations.put("acme", "", author=BOSS)
                await gateway.store.tenants.change(open_tenant(KEY), TenantChange(organization="acme"), author=BOSS)
                gateway.clock.advance(SHARING_CACHE_S)
        assert not await can_read(gateway, theirs)
        gateway.clock.advance(SHARING_CACHE_S)
        assert not await can_read(other, theirs)
        assert await can_read(other, mine, key=KEY) == (end == "move"), "what a former member has there is its own"
        for one, (trace, file) in zip((gateway, other), urls, strict=True):
            refused(await one.client.get(trace), 403)
            refused(await one.client.get(file), 403)
    assert await can_read(gateway, mine, key=OTHER_KEY)


async def signed_urls(gateway: Harness, theirs: Estate, *, key: str = OTHER_KEY) -> tuple[str, str]:
    """URLs of a trace and a file, given to a member; they work."""
    trace = ok(await gateway.get(f"sessions/{theirs.session_id}/trace_export", key=key))["url"]
    path = theirs.url(CheckpointKind.EXTERNAL).removeprefix("/api/v1/")
    [file] = ok(await gateway.get(f"{path}/external_weights_urls", key=key))["urls"].values()
    for url in (trace, file):
        assert (await gateway.client.get(url)).status_code == 200
    return trace, file


async def test_what_was_read_before_may_still_be_written_nowhere(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY)
    theirs = await shared_estate(gateway, project)
    assert await can_read(gateway, theirs)
    for method, path, body in (
        ("POST", "optim_step", {"model_id": theirs.model_id, "seq_id": 7}),
        ("POST", "get_info", {"model_id": theirs.model_id}),
        ("POST", "unload_model", {"model_id": theirs.model_id}),
        ("POST", "retrieve_future", {"request_id": theirs.sample_id}),
        ("POST", f"sessions/{theirs.session_id}/finish", {"reason": {"type": "success"}}),
        ("POST", "session_heartbeat", {"session_id": theirs.session_id}),
        ("PUT", f"sessions/{theirs.session_id}/project", {"project_id": "mine"}),
        ("POST", f"{theirs.url().removeprefix('/api/v1/')}/publish", None),
        ("DELETE", theirs.url().removeprefix("/api/v1/"), None),
        ("GET", f"samplers/{theirs.sampler_id}", None),
    ):
        answer = await call(gateway, method, path, body, key=OTHER_KEY)
        assert answer.status_code == 404, (path, answer.text)


async def test_ids_of_projects_are_no_names(gateway: Harness) -> None:
    """A project of others, one that is gone and one that never was are refused alike, wherever one may be named."""
    project, gone = await new_project(gateway, OTHER_KEY), await new_project(gateway)
    ok(await call(gateway, "DELETE", f"projects/{gone}"))
    estate = await new_estate(gateway, key=THIRD_KEY)
    refusals = set()
    for name in (project, gone, "prj-never", "prj-"):
        copy = {"source_path": estate.path(), "destination_project_id": name}
        for answer in (
            await gateway.post("create_session", {"project_id": name}, key=THIRD_KEY),
            await move(gateway, estate.session_id, name, key=THIRD_KEY),
            await gateway.post("copy_weights", copy, key=THIRD_KEY),
        ):
            refusals.add(refused(answer, 403).replace(repr(name), "NAME"))
        for method, path in (("GET", ""), ("DELETE", ""), ("PUT", "/members/x"), ("DELETE", "/members/x")):
            # Without a name the path is another one.
            if name != "prj-":
                answer = await call(gateway, method, f"projects/{name}{path}", key=THIRD_KEY)
                refusals.add(refused(answer, 404).replace(repr(name), "NAME"))
    assert len(refusals) == 2, refusals
    ok(await gateway.post("create_session", {"project_id": "project"}, key=THIRD_KEY))


async def test_copies_go_into_a_project_that_the_caller_takes_part_in(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY)
    mine = await new_estate(gateway, key=OTHER_KEY)
    copy = {"source_path": mine.path(), "destination_project_id": project}
    path = ok(await gateway.post("copy_weights", copy, key=OTHER_KEY))["tinker_path"]
    assert ok(await gateway.post("weights_info", {"tinker_path": path}, key=KEY))["is_lora"]
    refused(await gateway.post("weights_info", {"tinker_path": mine.path()}, key=KEY), 404)


async def test_a_name_of_ones_own_shares_nothing(gateway: Harness) -> None:
    theirs, mine = await new_estate(gateway), await new_estate(gateway, key=OTHER_KEY)
    for estate, key in ((theirs, KEY), (mine, OTHER_KEY)):
        ok(await move(gateway, estate.session_id, "the same", key=key))
    assert not await can_read(gateway, theirs)


async def test_only_the_owner_changes_a_project(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY, THIRD_KEY)
    for method, path in (
        ("DELETE", f"projects/{project}"),
        ("PUT", f"projects/{project}/members/{open_tenant(THIRD_KEY)}"),
        ("DELETE", f"projects/{project}/members/{open_tenant(THIRD_KEY)}"),
        ("DELETE", f"projects/{project}/members/{open_tenant(KEY)}"),
    ):
        message = refused(await call(gateway, method, path, key=OTHER_KEY), 403)
        assert "only its owner" in message
    assert "delete it" in refused(await call(gateway, "DELETE", f"projects/{project}/members/{open_tenant(KEY)}"), 400)
    described = ok(await gateway.get(f"projects/{project}", key=OTHER_KEY))
    assert {member["user"] for member in described["members"]} == {OWNER, MEMBER, STRANGER}
    assert (described["owner"], described["is_owner"], described["num_members"]) == (OWNER, False, 3)


async def test_members_are_named_as_people_name_users(gateway: Harness) -> None:
    project = await new_project(gateway)
    await gateway.store.tenants.change(TenantId("user:ada"), TenantChange(), author=BOSS)
    for name, changed in (("ada", True), ("user:ada", False), ("tml:user:ada", False)):
        answer = ok(await call(gateway, "PUT", f"projects/{project}/members/{name}"))
        assert (answer["user"], answer["is_member"], answer["changed"]) == ("tml:user:ada", True, changed)
    for changed in (True, False):
        answer = ok(await call(gateway, "DELETE", f"projects/{project}/members/ada"))
        assert (answer["is_member"], answer["changed"]) == (False, changed)
    assert "does not exist" in refused(await call(gateway, "PUT", f"projects/{project}/members/nobody"), 404)
    await gateway.store.tenants.change(TenantId("ms:lin"), TenantChange(), author=BOSS)
    assert ok(await call(gateway, "PUT", f"projects/{project}/members/lin"))["user"] == "tml:ms:lin"
    await gateway.store.tenants.change(TenantId("ms:ada"), TenantChange(), author=BOSS)
    several = refused(await call(gateway, "PUT", f"projects/{project}/members/ada"), 400)
    assert "user:ada" in several
    assert "ms:ada" in several


async def test_organizations_keep_to_themselves(gateway: Harness) -> None:
    project = await new_project(gateway)
    for key in (OTHER_KEY, THIRD_KEY):
        await gateway.new_session(key=key)
    await gateway.store.organizations.put("acme", "", author=BOSS)

    async def join(key: str, organization: str | None) -> None:
        await gateway.store.tenants.change(open_tenant(key), TenantChange(organization=organization or ""), author=BOSS)

    async def add(key: str) -> httpx.Response:
        return await call(gateway, "PUT", f"projects/{project}/members/{open_tenant(key)}")

    await join(OTHER_KEY, "acme")
    foreign = refused(await add(OTHER_KEY), 404).replace(open_tenant(OTHER_KEY), "X")
    assert foreign == refused(await add("tml-four"), 404).replace(open_tenant("tml-four"), "X"), "nobody is probed"
    await join(KEY, "acme")
    refused(await add(THIRD_KEY), 404)
    gateway.clock.advance(1)
    ok(await add(OTHER_KEY))
    theirs = await shared_estate(gateway, project)
    assert await can_read(gateway, theirs)
    await join(OTHER_KEY, None)
    gateway.clock.advance(SHARING_CACHE_S)
    assert not await can_read(gateway, theirs)
    members = ok(await gateway.get(f"projects/{project}"))["members"]
    assert [member["is_effective"] for member in members] == [True, False]
    refused(await gateway.get(f"projects/{project}", key=OTHER_KEY), 404)
    refused(await gateway.post("create_session", {"project_id": project}, key=OTHER_KEY), 403)


async def test_what_happens_to_a_project_is_in_its_owners_log(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY, THIRD_KEY)
    ok(await call(gateway, "DELETE", f"projects/{project}/members/{open_tenant(OTHER_KEY)}", key=OTHER_KEY))
    ok(await call(gateway, "DELETE", f"projects/{project}/members/{open_tenant(THIRD_KEY)}"))
    ok(await call(gateway, "DELETE", f"projects/{project}"))

    entries = ok(await gateway.get("audit?event_type=projects"))["entries"]

    assert [(entry["event"], entry["event_details"]) for entry in entries] == [
        ("project_create", {"project_id": project, "name": "ours"}),
        ("project_member_add", {"project_id": project, "member": open_tenant(OTHER_KEY)}),
        ("project_member_add", {"project_id": project, "member": open_tenant(THIRD_KEY)}),
        (
            "project_member_remove",
            {"project_id": project, "member": open_tenant(OTHER_KEY), "by": open_tenant(OTHER_KEY)},
        ),
        ("project_member_remove", {"project_id": project, "member": open_tenant(THIRD_KEY), "by": open_tenant(KEY)}),
        ("project_delete", {"project_id": project}),
    ]
    assert ok(await gateway.get("audit?event_type=projects", key=OTHER_KEY))["entries"] == []


async def test_projects_are_listed_to_those_in_them_page_by_page(gateway: Harness) -> None:
    projects = [await new_project(gateway) for _ in range(5)]
    theirs = await new_project(gateway, KEY, key=OTHER_KEY)
    gateway.clock.advance(1)
    newest = await new_project(gateway)
    seen: list[str] = []
    after = ""
    for _ in range(4):
        page = ok(await gateway.get(f"projects?limit=2{after}"))
        seen += [project["project_id"] for project in page["projects"]]
        after = f"&after={page['next']}"
        assert "members" not in page["projects"][0]
    assert seen[0] == newest
    assert sorted(seen) == sorted([*projects, theirs, newest])
    assert page["next"] is None
    assert [p["project_id"] for p in ok(await gateway.get("projects", key=OTHER_KEY))["projects"]] == [theirs]
    for bad in ("x", "1.0", "nan:prj-1", ":", "1:"):
        assert "next" in refused(await gateway.get(f"projects?after={bad}"), 400)


async def test_a_name_is_needed(gateway: Harness) -> None:
    for body in ({}, {"name": ""}, {"name": " "}, {"name": "x" * 600}, {"name": 1}, {"name": "a\0b"}):
        assert "name" in refused(await gateway.post("projects", body), 400)


async def test_what_is_ones_own_costs_no_question_about_sharing(
    gateway: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate = await shared_estate(gateway, await new_project(gateway, OTHER_KEY))

    async def nobody_asks(*args: object, **options: object) -> bool:
        raise AssertionError("asked about sharing")

    for question in ("shares", "takes_part", "sharing_version"):
        monkeypatch.setattr(gateway.store.projects, question, nobody_asks)
    assert await can_read(gateway, estate, key=KEY)
    ok(await gateway.post("optim_step", {"model_id": estate.model_id, "seq_id": 2}))


async def test_members_reading_again_costs_one_question_a_second(
    gateway: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate = await shared_estate(gateway, await new_project(gateway, OTHER_KEY))
    questions = []
    ask = gateway.store.projects.shares

    async def counted(*args: Any, **options: Any) -> bool:
        questions.append(args)
        return await ask(*args, **options)

    monkeypatch.setattr(gateway.store.projects, "shares", counted)
    for _ in range(5):
        ok(await gateway.post("weights_info", {"tinker_path": estate.path()}, key=OTHER_KEY))
    assert len(questions) == 1


async def test_a_reading_on_its_way_while_the_sharing_ends_is_not_believed(
    gateway: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = await new_project(gateway, OTHER_KEY)
    first, second = await shared_estate(gateway, project), await shared_estate(gateway, project)
    assert await can_read(gateway, first)
    gateway.clock.advance(SHARING_CACHE_S)
    assert await can_read(gateway, first), "under a number from now on"
    ask = gateway.store.projects.shares

    async def slow(*args: Any, **options: Any) -> bool:
        found = await ask(*args, **options)
        monkeypatch.setattr(gateway.store.projects, "shares", ask)
        # On another gateway; this one looks at the number before the answer is there.
        await gateway.store.projects.remove_member(project, [open_tenant(OTHER_KEY)], by=open_tenant(KEY))
        gateway.clock.advance(SHARING_CACHE_S)
        refused(await gateway.post("weights_info", {"tinker_path": first.path()}, key=OTHER_KEY), 404)
        return found

    monkeypatch.setattr(gateway.store.projects, "shares", slow)
    ok(await gateway.post("weights_info", {"tinker_path": second.path()}, key=OTHER_KEY))
    assert not await can_read(gateway, second)
    gateway.clock.advance(SHARING_CACHE_S)
    assert not await can_read(gateway, second)


async def test_usage_by_project_stays_its_users(gateway: Harness) -> None:
    project = await new_project(gateway, OTHER_KEY)
    await shared_estate(gateway, project)
    await shared_estate(gateway, project, key=OTHER_KEY)
    for key, urn in ((KEY, OWNER), (OTHER_KEY, MEMBER)):
        [row] = ok(await gateway.get(f"billing/usage/checkpoints/current?project_id={project}", key=key))["data"]
        assert (row["project_id"], row["org_user_urn"], row["checkpoint_count"]) == (project, urn, 3)
