"""The search for sessions: every filter, the pages, and what each session's checkpoints take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from store_builders import MODEL, OTHER_TENANT, SESSION, TENANT, checkpoint, creation, lead, model, session

from treadle.domain.ids import DEFAULT_PROJECT, SessionId, TenantId
from treadle.domain.records import FinishedCycle, SessionRecord
from treadle.domain.states import SessionState
from treadle.store import Store
from treadle.store.session_search import Place, SessionQuery
from treadle.testing.clock import ManualClock


async def add(
    store: Store, session_id: str, *, tenant: TenantId = TENANT, created_at: float = 1.0, **facts: Any
) -> None:
    await store.sessions.create(replace(session(session_id, tenant=tenant, created_at=created_at), **facts))


async def found(store: Store, tenant: TenantId = TENANT, *, limit: int = 200, **filters: Any) -> list[str]:
    query = SessionQuery(tenant_id=tenant, limit=limit, **filters)
    return [entry.record.session_id for entry in await store.session_search.find(query)]


async def test_a_tenant_finds_its_own_newest_first(store: Store) -> None:
    await add(store, "a", created_at=1.0)
    await add(store, "b", created_at=3.0)
    await add(store, "c", created_at=3.0)
    await add(store, "d", created_at=2.0)
    await add(store, "foreign", tenant=OTHER_TENANT)

    assert await found(store) == ["c", "b", "d", "a"]
    assert await found(store, OTHER_TENANT) == ["foreign"]
    assert await found(store, session_id=SessionId("foreign")) == []


async def test_pages_join_without_a_gap_whatever_the_clock_resolves(store: Store) -> None:
    """Times a fraction of a microsecond apart, which a cursor cannot tell from each other."""
    times = [1_700_000_000.0 + step * 2.4e-7 for step in range(9)]
    for index, created_at in enumerate(times):
        await add(store, f"s{index}", created_at=created_at)
    whole = await found(store)

    pages: list[str] = []
    behind: Place | None = None
    while page := await found(store, limit=2, behind=behind):
        pages += page
        last = await store.sessions.get(SessionId(page[-1]))
        assert last is not None
        behind = Place(created_at=round(last.created_at, 6), session_id=last.session_id)

    assert pages == whole == [f"s{index}" for index in reversed(range(9))]


async def test_a_page_behind_a_session_that_is_not_there_goes_by_its_time(store: Store) -> None:
    for index in range(3):
        await add(store, f"s{index}", created_at=float(index))
    await add(store, "foreign", tenant=OTHER_TENANT, created_at=0.0)

    assert await found(store, behind=Place(1.5, SessionId("gone"))) == ["s1", "s0"]
    assert await found(store, behind=Place(1.5, SessionId("foreign"))) == ["s1", "s0"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("night", ["a", "b"]),
        ("NIGHTLY", ["a"]),
        ("run night", ["a", "b"]),
        ("50%", ["c"]),
        ("a_b", []),
        ("   ", ["d", "c", "b", "a"]),
    ],
)
async def test_names_match_word_by_word(store: Store, name: str, expected: list[str]) -> None:
    await add(store, "a", created_at=1.0, display_name="Nightly run 7")
    await add(store, "b", created_at=2.0, display_name="run at night")
    await add(store, "c", created_at=3.0, display_name="50% axb")
    await add(store, "d", created_at=4.0, display_name="500 x")
    await add(store, "e", created_at=5.0, display_name=None)

    assert sorted(await found(store, display_name=name)) == sorted(expected if name.strip() else "abcde")


async def test_an_id_or_a_name_is_enough(store: Store) -> None:
    await add(store, "a", display_name="x")
    await add(store, "b", display_name="y")
    await add(store, "c", display_name="z")

    assert sorted(await found(store, session_id=SessionId("a"), display_name="y")) == ["a", "b"]


METADATA: Mapping[str, str] = {"team": "red", 'a"b': "1", "$.team": "path", "x.y": "dots", "[0]": "index", "ä": "ö"}


@pytest.mark.parametrize("pair", METADATA.items())
async def test_metadata_matches_exactly_whatever_its_names_hold(store: Store, pair: tuple[str, str]) -> None:
    await add(store, "a", user_metadata=METADATA)
    await add(store, "b", user_metadata={"team": "blue"})
    name, value = pair

    assert await found(store, user_metadata={name: value}) == ["a"]
    assert await found(store, user_metadata={name: value + "!"}) == []
    assert await found(store, user_metadata={name: value, "team": "red"}) == ["a"]
    assert await found(store, user_metadata={name: value, "absent": ""}) == []


async def test_projects_and_the_one_of_those_that_are_in_none(store: Store) -> None:
    await add(store, "a", project_id="p")
    await add(store, "b", project_id=None)
    await add(store, "c", project_id="q")
    await add(store, "d", project_id="r", tenant=OTHER_TENANT)

    assert await found(store, project_ids=["p"]) == ["a"]
    assert sorted(await found(store, project_ids=["q", DEFAULT_PROJECT])) == ["b", "c"]
    assert await found(store, project_ids=[]) == []
    assert await store.session_search.projects_among(TENANT, ["p", "r", DEFAULT_PROJECT, "x"]) == {"p", DEFAULT_PROJECT}


async def test_states_and_the_reasons_of_finished_ones(store: Store, clock: ManualClock) -> None:
    for session_id in "abcd":
        await add(store, session_id, created_at=clock.now())
    await store.sessions.finish(SessionId("b"), "success")
    await store.sessions.finish(SessionId("c"), "errored", "boom")
    clock.advance(100)
    await store.sessions.touch([SessionId("a")])
    await store.retention.expire_sessions(silent_since=clock.now() - 1)

    finished, active = SessionState.FINISHED, SessionState.ACTIVE
    assert await found(store, states=[(active, None)]) == ["a"]
    assert sorted(await found(store, states=[(finished, None)])) == ["b", "c"]
    assert await found(store, states=[(finished, "errored")]) == ["c"]
    assert sorted(await found(store, states=[(active, None), (finished, "success")])) == ["a", "b"]
    assert await found(store, states=[]) == []
    assert sorted(await found(store)) == ["a", "b", "c", "d"]


async def test_a_session_shows_its_live_checkpoints(store: Store, clock: ManualClock) -> None:
    await add(store, SESSION, created_at=2.0)
    await add(store, "empty", created_at=1.0)
    await store.models.create(model(), creation())
    live, expired = checkpoint("a"), checkpoint("b", expires_at=clock.now())
    other = replace(checkpoint("c"), size_bytes=7)
    await store.cycles.finish(await lead(store), FinishedCycle(checkpoints=(live, expired, other)))

    entries = await store.session_search.find(SessionQuery(tenant_id=TENANT, limit=10))

    assert [(entry.num_checkpoints, entry.checkpoint_bytes) for entry in entries] == [(2, 17), (0, 0)]
    assert MODEL.startswith(entries[0].record.session_id)


async def test_what_a_client_said_of_a_session_is_kept(store: Store, clock: ManualClock) -> None:
    record: SessionRecord = replace(session(), tags=("nightly", "a b"))
    await store.sessions.create(record)

    assert await store.sessions.get(SESSION) == record
    assert await store.sessions.finish(SESSION, "errored", "boom")
    assert not await store.sessions.finish(SESSION, "success")
    assert await store.sessions.get(SESSION) == replace(
        record, state=SessionState.FINISHED, finish_reason="errored", finish_detail="boom"
    )


async def test_moving_a_session_is_noted_once(store: Store, clock: ManualClock) -> None:
    await add(store, "a", project_id=None)

    assert await store.sessions.assign_project(SessionId("a"), "p", by=TENANT)
    assert not await store.sessions.assign_project(SessionId("a"), "p", by=TENANT)
    clock.advance(10)
    assert await store.sessions.assign_project(SessionId("a"), "q", by=TENANT)

    moved = await store.sessions.get(SessionId("a"))
    assert moved is not None
    assert moved.project_id == "q"
    events = await store.audit.read(TENANT, since=0, before=clock.now() + 1) or []
    assert [event.event for event in events] == ["project_session_assigned"] * 2
    assert [dict(event.details) for event in events] == [
        {"session_id": "a", "project_id": "p", "previous_project_id": None},
        {"session_id": "a", "project_id": "q", "previous_project_id": "p"},
    ]
    assert await store.audit.read(OTHER_TENANT, since=0, before=clock.now() + 1) == []
    assert await store.audit.read(TENANT, since=0, before=clock.now()) == events[:1]
    assert await store.audit.read(TENANT, since=0, before=clock.now() + 1, event_type="checkpoints") == []
