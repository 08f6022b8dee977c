"""Sessions as their owner finds, moves and looks at them later."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from gateway_support import KEY, OTHER_KEY, Harness, ok, open_tenant, refused, sample_body

from treadle.domain.ids import DEFAULT_PROJECT
from treadle.domain.limits import SIGNED_URL_LIFE_S
from treadle.gateway import GatewaySettings

OWN_URN = f"tml:{open_tenant(KEY)}"


async def new_session(gateway: Harness, *, key: str = KEY, **body: object) -> str:
    """One second after the one before."""
    gateway.clock.advance(1)
    return str(ok(await gateway.post("create_session", body, key=key))["session_id"])


async def search(gateway: Harness, *, key: str = KEY, **body: object) -> dict[str, Any]:
    return ok(await gateway.post("sessions/search", body, key=key))


async def found(gateway: Harness, **body: object) -> list[str]:
    return [session["session_id"] for session in (await search(gateway, **body))["sessions"]]


async def put(gateway: Harness, path: str, body: object, *, key: str = KEY) -> httpx.Response:
    return await gateway.client.put(f"/api/v1/{path}", json=body, headers={"X-API-Key": key})


async def test_a_summary_says_what_is_known_of_a_session(gateway: Harness) -> None:
    session_id = await new_session(gateway, display_name="my run", user_metadata={"seed": 7}, project_id="p")
    model_id = await gateway.new_model(session_id)
    await gateway.publish(model_id, "a")
    await gateway.publish(model_id, "b")

    [summary] = (await search(gateway))["sessions"]

    assert summary == {
        "session_id": session_id,
        "created_at": "2023-11-14T22:13:21+00:00",
        "owner": OWN_URN,
        "project_id": "p",
        "status": {"type": "active"},
        "checkpoints_count": 2,
        "checkpoint_storage_bytes": 20,
        "display_name": "my run",
        "user_metadata": {"seed": "7"},
    }


async def test_a_status_says_how_a_session_ended(gateway: Harness) -> None:
    ended = await new_session(gateway)
    detail = {"reason": {"type": "errored"}, "detail": "boom"}
    ok(await gateway.post(f"sessions/{ended}/finish", detail))
    ok(await gateway.post(f"sessions/{ended}/finish", {"reason": {"type": "success"}, "detail": None}))
    silent = await new_session(gateway)
    gateway.clock.advance(1_000)
    await gateway.store.retention.expire_sessions(silent_since=gateway.clock.now())
    alive = await new_session(gateway)

    statuses = {s["session_id"]: s["status"] for s in (await search(gateway))["sessions"]}

    assert statuses == {
        alive: {"type": "active"},
        silent: None,
        ended: {"type": "client_finished", "reason": {"type": "errored"}, "detail": "boom"},
    }


async def test_filters_narrow_the_search(gateway: Harness) -> None:
    first = await new_session(gateway, display_name="Nightly run", user_metadata={"team": "red"}, project_id="p")
    second = await new_session(gateway, display_name="adhoc", user_metadata={"team": "blue"})
    ok(await gateway.post(f"sessions/{second}/finish", {"reason": {"type": "success"}}))

    for filters, expected in [
        ({"display_name": "nightly"}, [first]),
        ({"session_id": second}, [second]),
        ({"session_id": second, "display_name": "nightly"}, [second, first]),
        ({"user_metadata": {"team": "red"}}, [first]),
        ({"project_ids": ["p"]}, [first]),
        ({"project_ids": [DEFAULT_PROJECT]}, [second]),
        ({"project_ids": []}, []),
        ({"statuses": [{"type": "active"}]}, [first]),
        ({"statuses": [{"type": "client_finished", "reasons": ["success"]}]}, [second]),
        ({"statuses": [{"type": "client_finished", "reasons": ["errored"]}]}, []),
        ({"statuses": [{"type": "client_finished"}, {"type": "active"}]}, [second, first]),
        ({"statuses": [{"type": "cancelled"}, {"type": "failed"}]}, []),
        ({"owner": {"type": "accessible"}}, [second, first]),
        ({"owner": {"type": "user", "owner_urns": ["tml:user:x", OWN_URN]}}, [second, first]),
        ({"owner": {"type": "user", "owner_urns": ["tml:user:x"]}}, []),
    ]:
        assert await found(gateway, **filters) == expected, filters


async def test_pages_follow_each_other(gateway: Harness) -> None:
    ids = [await new_session(gateway) for _ in range(5)]

    seen: list[str] = []
    cursor = None
    for _ in range(3):
        page = await search(gateway, limit=2, **({} if cursor is None else {"cursor": cursor}))
        seen += [session["session_id"] for session in page["sessions"]]
        cursor = page["next_cursor"]
        await new_session(gateway)  # what comes meanwhile moves nothing

    assert seen == ids[::-1]
    assert cursor is None


@pytest.mark.parametrize(
    "body",
    [
        {"limit": 0},
        {"limit": 201},
        {"limit": "5"},
        {"display_name": ""},
        {"statuses": []},
        {"statuses": [{"type": "lost"}]},
        {"statuses": [{"type": "client_finished", "reasons": []}]},
        {"owner": {"type": "everybody"}},
        {"owner": {"type": "user"}},
        {"owner": {"type": "user", "owner_urns": []}},
        {"cursor": {"last_session_id": "x"}},
        {"cursor": {"last_created_at": "yesterday", "last_session_id": "x"}},
        {"cursor": {"last_created_at": "2026-01-01T00:00:00", "last_session_id": "x"}},
        {"user_metadata": {"a": "nul \0"}},
        {"project_ids": ["p\0"]},
    ],
)
async def test_a_bad_search_is_refused_by_name(gateway: Harness, body: dict[str, object]) -> None:
    assert next(iter(body)) in refused(await gateway.post("sessions/search", body), 400)


async def test_strangers_find_nothing_and_learn_nothing(gateway: Harness) -> None:
    session_id = await new_session(gateway, display_name="secret", project_id="p")

    for filters in ({}, {"session_id": session_id}, {"owner": {"type": "user", "owner_urns": [OWN_URN]}}):
        assert (await search(gateway, key=OTHER_KEY, **filters))["sessions"] == [], filters
    for project_id in ("p", "nothing"):
        answer = await gateway.post("sessions/search", {"project_ids": [project_id]}, key=OTHER_KEY)
        assert refused(answer, 404) == f"project {project_id!r} does not exist: no session of yours is in it"


async def test_a_moved_session_takes_its_runs_along(gateway: Harness) -> None:
    session_id = await new_session(gateway)
    model_id = await gateway.new_model(session_id)

    ok(await put(gateway, f"sessions/{session_id}/project", {"project_id": "p"}))

    assert ok(await gateway.get(f"sessions/{session_id}"))["project_id"] == "p"
    runs = ok(await gateway.get("training_runs?project_id=p"))["training_runs"]
    assert [run["training_run_id"] for run in runs] == [model_id]
    assert ok(await gateway.get(f"training_runs?project_id={DEFAULT_PROJECT}"))["training_runs"] == []
    # Somebody else's project of that name is another one.
    assert ok(await gateway.get("training_runs?project_id=p", key=OTHER_KEY))["training_runs"] == []


async def test_a_session_is_moved_by_its_owner_to_a_named_project(gateway: Harness) -> None:
    session_id = await new_session(gateway)

    assert "project_id" in refused(await put(gateway, f"sessions/{session_id}/project", {}), 400)
    refused(await put(gateway, f"sessions/{session_id}/project", {"project_id": ""}), 400)
    refused(await put(gateway, f"sessions/{session_id}/project", {"project_id": "p"}, key=OTHER_KEY), 404)
    refused(await put(gateway, "sessions/nothing/project", {"project_id": "p"}), 404)
    assert ok(await gateway.get(f"sessions/{session_id}"))["project_id"] == DEFAULT_PROJECT


async def test_tags_are_kept(gateway: Harness) -> None:
    session_id = await new_session(gateway, tags=["a", "b"])

    assert ok(await gateway.get(f"sessions/{session_id}"))["tags"] == ["a", "b"]


@pytest.mark.parametrize("path", ["sessions", "sessions/{session}", "training_runs", "training_runs/{model}"])
async def test_both_scopes_mean_the_callers_own(gateway: Harness, path: str) -> None:
    session_id = await new_session(gateway)
    path = path.format(session=session_id, model=await gateway.new_model(session_id))

    owned, accessible, plain = [
        ok(await gateway.get(path + query)) for query in ("?access_scope=owned", "?access_scope=accessible", "")
    ]

    assert owned == accessible == plain
    assert "access_scope" in refused(await gateway.get(f"{path}?access_scope=all"), 400)


async def test_a_trace_is_fetched_without_a_key_for_an_hour(gateway: Harness) -> None:
    session_id = await new_session(gateway)
    await gateway.new_model(session_id)
    sampler_id = await gateway.new_sampler(session_id)
    ok(await gateway.post("asample", sample_body(sampler_id)))

    export = ok(await gateway.get(f"sessions/{session_id}/trace_export"))

    assert export["status"] == "ready"
    assert export["url"].startswith("http://gateway/api/v1/traces/")
    trace = ok(await gateway.client.get(export["url"]))
    assert trace["otherData"]["session_id"] == session_id
    names = {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert names == {"create_model 0", "sample 1"}
    gateway.clock.advance(SIGNED_URL_LIFE_S + 1)
    refused(await gateway.client.get(export["url"]), 403)


async def test_urls_of_traces_cannot_be_made_up(gateway: Harness) -> None:
    session_id = await new_session(gateway)
    login = ok(await gateway.post("auth/token"))["jwt"]
    url = ok(await gateway.get(f"sessions/{session_id}/trace_export"))["url"]

    for token in ("x", login, url.rpartition("/")[2][:-2]):
        assert refused(await gateway.client.get(f"/api/v1/traces/{token}"), 403) == (
            "this URL is not valid, or not any more"
        )
    refused(await gateway.get(f"sessions/{session_id}/trace_export", key=OTHER_KEY), 404)


class TestBelowAPrefix:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=True, root_path="/twinkle")

    async def test_the_url_of_a_trace_has_the_prefix(self, gateway: Harness) -> None:
        headers = {"X-API-Key": KEY}
        created = await gateway.client.post("/twinkle/api/v1/create_session", json={}, headers=headers)
        path = f"/twinkle/api/v1/sessions/{created.json()['session_id']}/trace_export"
        url = ok(await gateway.client.get(path, headers=headers))["url"]
        assert url.startswith("http://gateway/twinkle/api/v1/traces/")
        assert json.loads((await gateway.client.get(url)).content)["traceEvents"]
