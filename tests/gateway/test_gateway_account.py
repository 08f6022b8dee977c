"""Usage, storage and the audit log of a tenant."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from gateway_support import KEY, OTHER_KEY, POOL, Harness, ok, open_tenant, refused, sample_body

from treadle.domain.ids import DEFAULT_PROJECT, CheckpointKind, RequestId
from treadle.domain.outcome import EncodedResult
from treadle.domain.records import FinishedRequest
from treadle.domain.usage import HOUR_S, SampleUsage, hour_of
from treadle.testing.builders import pass_op
from treadle.wire.answers_account import ApiKeyAnswer, AuditAnswer, AuthTokenAnswer, StorageAnswer, UsageAnswer
from treadle.wire.answers_service import CapabilitiesAnswer, ClientConfigAnswer, DynamicConfigAnswer
from treadle.wire.answers_sessions import (
    CheckpointsAnswer,
    CreateSessionAnswer,
    SearchAnswer,
    SessionAnswer,
    SessionsAnswer,
    TraceExportAnswer,
    TrainingRunAnswer,
    TrainingRunsAnswer,
)
from treadle.wire.passes import encode_pass

URN = f"tml:{open_tenant()}"


def hour(gateway: Harness, offset: int = 0) -> str:
    return datetime.fromtimestamp(hour_of(gateway.clock.now()) + offset * HOUR_S, tz=UTC).isoformat()


def window(gateway: Harness, first: int = 0, stop: int = 1) -> dict[str, str]:
    return {"starting_on": hour(gateway, first), "ending_before": hour(gateway, stop)}


async def use_something(gateway: Harness, *, key: str = KEY) -> str:
    """A session with one pass of known size and one sample; its id."""
    body = {"user_metadata": {"team": "red"}, "project_id": "p"}
    session_id = str(ok(await gateway.post("create_session", body, key=key))["session_id"])
    model_id = await gateway.new_model(session_id, key=key)
    op = replace(pass_op(1, model_id=model_id), forward_only=False)
    protobuf = {"Content-Type": "application/x-protobuf"}
    passed = ok(await gateway.post("forward_backward", content=encode_pass(op), headers=protobuf, key=key))
    await gateway.finish(passed["request_id"], b"done")
    sampler_id = await gateway.new_sampler(session_id, key=key)
    sampled = ok(await gateway.post("asample", sample_body(sampler_id), key=key))
    usage = SampleUsage(num_prompt_tokens=30, num_sampled_tokens=5, num_cached_tokens=10)
    result = EncodedResult("application/x-protobuf", b"")
    await gateway.commit(FinishedRequest(RequestId(sampled["request_id"]), result=result, usage=usage))
    return session_id


async def test_usage_names_sessions_models_and_amounts(gateway: Harness) -> None:
    session_id = await use_something(gateway)
    num_tokens = (await gateway.row(f"{session_id}:train:0:1")).num_tokens

    answer = ok(await gateway.get("billing/usage/events", params=window(gateway)))

    infos = [event["event_info"] for event in answer["data"]]
    assert sorted(infos, key=str) == sorted(
        [
            {"type": "training", "token_count": num_tokens},
            {"type": "sampling_prefill", "cached": False, "token_count": 20},
            {"type": "sampling_prefill", "cached": True, "token_count": 10},
            {"type": "sampling_sample", "token_count": 5},
        ],
        key=str,
    )
    amounts = [info["token_count"] for info in infos]
    assert amounts == sorted(amounts, reverse=True)
    for event in answer["data"]:
        assert event | {"event_info": None} == {
            "bucket_start": hour(gateway),
            "bucket_end": hour(gateway, 1),
            "base_model": POOL,
            "user_id": URN,
            "user_name": open_tenant(),
            "session_id": session_id,
            "project_id": "p",
            "estimated_cost_usd": None,
            "effective_rate_usd_per_million_tokens": None,
            "effective_rate_usd_per_gigabyte_month": None,
            "event_info": None,
        }
    assert answer["sessions"] == {session_id: {"user_metadata": {"team": "red"}}}


async def test_storage_is_billed_for_hours_that_are_over(gateway: Harness) -> None:
    model_id = await gateway.new_model(await gateway.new_session())
    begin = hour_of(gateway.clock.now()) + HOUR_S
    await gateway.publish(model_id, "a", created_at=begin)
    gateway.clock.advance(2 * HOUR_S)
    await gateway.store.usage.accrue_storage(begin)

    [event] = ok(await gateway.get("billing/usage/events", params=window(gateway, -1, 0)))["data"]

    assert event["event_info"] == {"type": "storage", "free": False, "gigabyte_hours": 10 / 1e9}


async def test_tenants_see_their_own_usage(gateway: Harness) -> None:
    await use_something(gateway)

    answer = ok(await gateway.get("billing/usage/events", params=window(gateway), key=OTHER_KEY))

    assert answer == {"data": [], "sessions": {}, "cost_data_through": None}


async def test_other_hours_are_not_in_the_window(gateway: Harness) -> None:
    await use_something(gateway)
    gateway.clock.advance(HOUR_S)

    assert ok(await gateway.get("billing/usage/events", params=window(gateway)))["data"] == []
    assert len(ok(await gateway.get("billing/usage/events", params=window(gateway, -1, 0)))["data"]) == 4


async def test_a_bad_window_is_refused_by_name(gateway: Harness) -> None:
    now = datetime.fromtimestamp(hour_of(gateway.clock.now()), tz=UTC)
    late = now + timedelta(hours=1)
    for since, before, word in [
        (now, now, "ending_before"),
        (now, now - timedelta(hours=1), "ending_before"),
        (now, now + timedelta(days=14, hours=1), "ending_before"),
        (now + timedelta(minutes=1), late, "starting_on"),
        (now, late + timedelta(seconds=1), "ending_before"),
        (late, late + timedelta(hours=1), "starting_on"),
        (now.replace(tzinfo=None), late, "starting_on"),
    ]:
        params = {"starting_on": since.isoformat(), "ending_before": before.isoformat()}
        assert word in refused(await gateway.get("billing/usage/events", params=params), 400)
    for params in ({}, {"starting_on": "x", "ending_before": "y"}, {"starting_on": now.isoformat()}):
        refused(await gateway.get("billing/usage/events", params=params), 400)
    whole = {"starting_on": now.isoformat(), "ending_before": (now + timedelta(days=14)).isoformat()}
    ok(await gateway.get("billing/usage/events", params=whole))


async def test_storage_now_by_project(gateway: Harness) -> None:
    in_project = ok(await gateway.post("create_session", {"project_id": "p"}))["session_id"]
    await gateway.publish(await gateway.new_model(in_project), "a")
    model_id = await gateway.new_model(await gateway.new_session())
    await gateway.publish(model_id, "a")
    await gateway.publish(model_id, "a", kind=CheckpointKind.SAMPLER)

    answer = ok(await gateway.get("billing/usage/checkpoints/current"))

    sizes = [(row["project_id"], row["checkpoint_count"], row["size_bytes"]) for row in answer["data"]]
    assert sizes == [(DEFAULT_PROJECT, 2, 20), ("p", 1, 10)]
    assert {row["org_user_urn"] for row in answer["data"]} == {URN}
    assert [row["size_gigabytes"] for row in answer["data"]] == [20 / 1e9, 10 / 1e9]
    [row] = ok(await gateway.get("billing/usage/checkpoints/current?project_id=p"))["data"]
    assert row["project_id"] == "p"
    assert ok(await gateway.get("billing/usage/checkpoints/current", key=OTHER_KEY))["data"] == []


async def test_what_was_done_to_a_project_is_in_the_audit_log(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    body, headers = {"project_id": "p"}, {"X-API-Key": KEY}
    moved_at = datetime.fromtimestamp(gateway.clock.now(), tz=UTC)
    ok(await gateway.client.put(f"/api/v1/sessions/{session_id}/project", json=body, headers=headers))

    [entry] = ok(await gateway.get("audit"))["entries"]

    assert entry == {
        "timestamp": moved_at.isoformat(),
        "event": "project_session_assigned",
        "event_details": {"session_id": session_id, "project_id": "p", "previous_project_id": None},
        "model_id": None,
        "tinker_path": None,
        "purpose": None,
    }
    day = moved_at.date()
    for query, count in [
        ("?event_type=all", 1),
        ("?event_type=projects", 1),
        ("?event_type=checkpoints", 0),
        ("?event_type=teams", 0),
        (f"?day={day}", 1),
        (f"?day={day - timedelta(days=1)}", 0),
        (f"?event_type=projects&day={day + timedelta(days=1)}", 0),
    ]:
        assert len(ok(await gateway.get(f"audit{query}"))["entries"]) == count, query
    assert ok(await gateway.get("audit", key=OTHER_KEY))["entries"] == []
    gateway.clock.advance(24 * HOUR_S)
    assert ok(await gateway.get("audit"))["entries"] == []


@pytest.mark.parametrize("query", ["event_type=gossip", "day=yesterday", "day=2026-13-01"])
async def test_a_bad_question_to_the_audit_log_is_refused_by_name(gateway: Harness, query: str) -> None:
    assert query.partition("=")[0] in refused(await gateway.get(f"audit?{query}"), 400)


async def test_answers_are_as_the_document_says(gateway: Harness) -> None:
    """Nothing is validated on the way out, so this is where the two would part."""
    session_id = await use_something(gateway)
    await gateway.publish(f"{session_id}:train:0", "a")
    ok(await gateway.post(f"sessions/{session_id}/finish", {"reason": {"type": "errored"}, "detail": "boom"}))
    body, headers = {"project_id": "q"}, {"X-API-Key": KEY}
    ok(await gateway.client.put(f"/api/v1/sessions/{session_id}/project", json=body, headers=headers))
    for model, answer in [
        (AuthTokenAnswer, await gateway.post("auth/token")),
        (ApiKeyAnswer, await gateway.get("auth/apikey/me")),
        (AuditAnswer, await gateway.get("audit")),
        (UsageAnswer, await gateway.get("billing/usage/events", params=window(gateway))),
        (StorageAnswer, await gateway.get("billing/usage/checkpoints/current")),
        (ClientConfigAnswer, await gateway.post("client/config", {"sdk_version": "0.38.0"})),
        (DynamicConfigAnswer, await gateway.post("client/dynamic_config")),
        (CapabilitiesAnswer, await gateway.get("get_server_capabilities")),
        (CreateSessionAnswer, await gateway.post("create_session", {"sdk_version": "0.38.0"})),
        (SessionsAnswer, await gateway.get("sessions")),
        (SessionAnswer, await gateway.get(f"sessions/{session_id}")),
        (SearchAnswer, await gateway.post("sessions/search", {"limit": 1})),
        (TraceExportAnswer, await gateway.get(f"sessions/{session_id}/trace_export")),
        (TrainingRunsAnswer, await gateway.get("training_runs")),
        (TrainingRunAnswer, await gateway.get(f"training_runs/{session_id}:train:0")),
        (CheckpointsAnswer, await gateway.get("checkpoints")),
        (CheckpointsAnswer, await gateway.get(f"training_runs/{session_id}:train:0/checkpoints")),
    ]:
        fields = ok(answer)
        read = model.model_validate(fields)
        assert set(fields) <= set(type(read).model_fields), model
