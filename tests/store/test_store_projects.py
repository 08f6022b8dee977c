"""Shared projects in the database: bounds, races, and queries that go along indexes."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from store_builders import MODEL, OTHER_TENANT, SESSION, TENANT, model, session

from treadle.domain.ids import SessionId, TenantId
from treadle.domain.ids import op_request_id as request_id_of
from treadle.domain.tenants import TenantChange
from treadle.errors import InvalidRequest, NotFound
from treadle.store import Store
from treadle.store import projects as projects_module
from treadle.store.audit import Author
from treadle.store.models import row_of
from treadle.store.projects import ProjectPlace
from treadle.store.sharing import readable_session_ids, shared_sessions
from treadle.store.tables import models

PROJECT = "prj-1"
BOSS = Author(TenantId("user:root"), "user:root (key 1)")


async def share(store: Store, project_id: str = PROJECT, *, session_id: str = SESSION) -> None:
    """A project of TENANT's with OTHER_TENANT and a session in it."""
    await store.projects.create(project_id, TENANT, name="ours")
    await put_session(store, "of the other", OTHER_TENANT)
    await store.projects.add_member(project_id, TENANT, [OTHER_TENANT])
    await put_session(store, session_id, TENANT, project_id)


async def put_session(store: Store, session_id: str, tenant: TenantId, project_id: str | None = None) -> None:
    record = await store.sessions.get(SessionId(session_id))
    if record is None:
        record = await store.sessions.create(session(session_id, tenant=tenant))
    if project_id is not None:
        await store.sessions.assign_project(record.session_id, project_id, by=tenant)


async def test_a_session_is_shared_with_those_in_its_project(store: Store) -> None:
    await share(store)
    third = TenantId("user:carol")
    assert await store.projects.shares(SESSION, reader=OTHER_TENANT)
    assert not await store.projects.shares(SESSION, reader=third)
    assert not await store.projects.shares(SessionId("of the other"), reader=TENANT)


@pytest.mark.parametrize("end", ["remove", "leave", "move", "delete", "operator", "organization"])
async def test_whatever_ends_a_sharing_moves_its_version(store: Store, end: str) -> None:
    await share(store)
    before = await store.projects.sharing_version()
    match end:
        case "remove":
            await store.projects.remove_member(PROJECT, [OTHER_TENANT], by=TENANT)
        case "leave":
            await store.projects.remove_member(PROJECT, [OTHER_TENANT], by=OTHER_TENANT)
        case "move":
            await store.sessions.assign_project(SESSION, "elsewhere", by=TENANT)
        case "delete":
            await store.projects.delete(PROJECT, owner=TENANT)
        case "operator":
            await store.projects.delete_as(BOSS, PROJECT)
        case _:
            await store.organizations.put("acme", "", author=BOSS)
            await store.tenants.change(OTHER_TENANT, TenantChange(organization="acme"), author=BOSS)
    assert not await store.projects.shares(SESSION, reader=OTHER_TENANT)
    after = await store.projects.sharing_version()
    assert after != before
    assert all(new >= old for new, old in zip(after, before, strict=True))


async def test_other_moves_leave_the_version_alone(store: Store) -> None:
    await share(store)
    before = await store.projects.sharing_version()
    await store.projects.add_member(PROJECT, TENANT, [OTHER_TENANT])
    await put_session(store, "s9", TENANT, "a name")
    await put_session(store, "s9", TENANT, PROJECT)
    await store.projects.remove_member(PROJECT, [TenantId("user:nobody")], by=TENANT)
    assert await store.projects.sharing_version() == before


async def test_there_are_not_too_many(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects_module, "MAX_PROJECTS_PER_TENANT", 2)
    monkeypatch.setattr(projects_module, "MAX_MEMBERS_PER_PROJECT", 2)
    await share(store)
    await put_session(store, "s3", TenantId("user:carol"))
    with pytest.raises(InvalidRequest, match="2 members"):
        await store.projects.add_member(PROJECT, TENANT, [TenantId("user:carol")])
    assert await store.projects.add_member(PROJECT, TENANT, [OTHER_TENANT]) == (OTHER_TENANT, False)
    await store.projects.create("prj-2", TENANT, name="b")
    with pytest.raises(InvalidRequest, match="2 projects"):
        await store.projects.create("prj-3", TENANT, name="c")
    await store.projects.create("prj-3", OTHER_TENANT, name="c")


async def test_members_added_while_a_project_ends_leave_nothing_behind(store: Store) -> None:
    tenants = [TenantId(f"user:{number}") for number in range(20)]
    for number, tenant in enumerate(tenants):
        await put_session(store, f"of {number}", tenant)
    await store.projects.create(PROJECT, TENANT, name="ours")
    results = await asyncio.gather(
        *(store.projects.add_member(PROJECT, TENANT, [tenant]) for tenant in tenants[:10]),
        store.projects.delete(PROJECT, owner=TENANT),
        *(store.projects.add_member(PROJECT, TENANT, [tenant]) for tenant in tenants[10:]),
        return_exceptions=True,
    )
    assert all(isinstance(result, NotFound) or not isinstance(result, BaseException) for result in results)
    assert await store.projects.members(PROJECT) == []
    assert await store.projects.get(PROJECT) is None


async def test_a_foreign_project_and_an_unknown_one_are_refused_alike(store: Store) -> None:
    await share(store)
    words = set()
    for name in (PROJECT, "prj-9"):
        for attempt in (
            store.projects.add_member(name, OTHER_TENANT, [OTHER_TENANT]),
            store.projects.remove_member(name, [TenantId("user:carol")], by=OTHER_TENANT),
            store.projects.delete(name, owner=OTHER_TENANT),
        ):
            with pytest.raises(NotFound) as refusal:
                await attempt
            words.add(str(refusal.value).replace(name, "NAME"))
    assert len(words) == 1
    assert len(await store.projects.members(PROJECT)) == 2


async def test_pages_begin_behind_the_one_before(store: Store) -> None:
    for number in range(5):
        await store.projects.create(f"prj-{number}", TENANT if number % 2 else OTHER_TENANT, name="x")
    seen: list[str] = []
    behind = None
    for is_last in (False, False, True):
        page = await store.projects.of_owner(None, 2, behind=behind)
        seen += [project.project_id for project in page.projects]
        behind = ProjectPlace(page.projects[-1].created_at, page.projects[-1].project_id)
        assert page.is_last == is_last
    assert seen == ["prj-4", "prj-3", "prj-2", "prj-1", "prj-0"], "of one moment, so by id"
    assert [p.project_id for p in (await store.projects.of_owner(TENANT, 9)).projects] == ["prj-3", "prj-1"]
    assert [p.project_id for p in (await store.projects.of_member(TENANT, 9)).projects] == ["prj-3", "prj-1"]


async def test_runs_of_shared_sessions_are_listed_with_ones_own(store: Store) -> None:
    await share(store)
    await store._writer.run(
        lambda conn: (
            conn.execute(
                models.insert(),
                [_row(MODEL, SESSION, TENANT), _row("of the other:train:0", "of the other", OTHER_TENANT)],
            ).rowcount
        )
    )
    own, total = await store.models.list(OTHER_TENANT, 10)
    assert ([run.model_id for run in own], total) == (["of the other:train:0"], 1)
    runs, total = await store.models.list(OTHER_TENANT, 10, with_shared=True)
    assert ({run.model_id for run in runs}, total) == ({MODEL, "of the other:train:0"}, 2)
    runs, total = await store.models.list(OTHER_TENANT, 10, with_shared=True, project_id=PROJECT)
    assert ([run.model_id for run in runs], total) == ([MODEL], 1)


async def test_questions_about_sharing_read_no_table_as_a_whole(sqlite_store: Store) -> None:
    """Which PostgreSQL does too with tables as small as a test's."""
    shared = shared_sessions().subquery()
    queries = [
        sa.select(shared.c.session_id).where(shared.c.session_id == "s", shared.c.tenant_id == "t"),
        sa.select(models.c.model_id).where(models.c.session_id.in_(readable_session_ids(TENANT))),
    ]

    def plans(conn: sa.Connection) -> list[str]:
        found = []
        for query in queries:
            text = str(query.compile(dialect=conn.dialect, compile_kwargs={"literal_binds": True}))
            found += [str(row[3]) for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
        return found

    steps = await sqlite_store._database.read(plans)
    assert [step for step in steps if step.startswith("SCAN") and "subquery" not in step.lower()] == []
    assert len(steps) > 6


def _row(model_id: str, session_id: str, tenant: TenantId) -> dict[str, object]:
    record = model(model_id, session_id=session_id, tenant=tenant)
    return row_of(record) | {"create_request_id": request_id_of(record.model_id, 0)}
