"""Sessions from creation to their end."""

from __future__ import annotations

import pytest
from gateway_support import OTHER_KEY, POOL, Harness, failed, ok, refused

from treadle.domain.ids import ModelId, SessionId
from treadle.domain.states import RequestState
from treadle.testing.builders import pass_op
from treadle.wire.passes import encode_pass


async def test_a_retried_creation_gets_the_same_session(gateway: Harness) -> None:
    headers = {"X-Idempotency-Key": "stainless-python-retry-1"}
    first = ok(await gateway.post("create_session", headers=headers))
    again = ok(await gateway.post("create_session", headers=headers))
    other_tenant = ok(await gateway.post("create_session", headers=headers, key=OTHER_KEY))
    without_key = ok(await gateway.post("create_session"))

    assert again == first
    assert len({s["session_id"] for s in (first, other_tenant, without_key)}) == 3


async def test_what_the_client_says_about_itself_is_kept_as_text(gateway: Harness) -> None:
    body = {
        "tags": ["a"],
        "user_metadata": {"seed": 7, "name": "x", "nested": {"a": [1]}},
        "sdk_version": "0.38.0",
        "display_name": "my run",
        "project_id": "p1",
        "brand_new_field": 1,
    }
    session_id = ok(await gateway.post("create_session", body))["session_id"]

    shown = ok(await gateway.get(f"sessions/{session_id}"))
    assert shown["user_metadata"] == {"seed": "7", "name": "x", "nested": '{"a": [1]}'}
    assert shown["display_name"] == "my run"


async def test_heartbeats_are_recorded_and_end_with_the_session(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    gateway.clock.advance(10)
    ok(await gateway.post("session_heartbeat", {"session_id": session_id}))
    await gateway.app.state.gateway.hub.poll()

    record = await gateway.store.sessions.get(SessionId(session_id))
    assert record is not None
    assert record.last_heartbeat_at == gateway.clock.now()

    reason = {"reason": {"type": "success"}, "detail": None}
    ok(await gateway.post(f"sessions/{session_id}/finish", reason))
    refused(await gateway.post("session_heartbeat", {"session_id": session_id}), 410)


async def test_finishing_twice_is_fine(gateway: Harness) -> None:
    session_id = await gateway.new_session()

    for reason in ("errored", "success"):
        ok(await gateway.post(f"sessions/{session_id}/finish", {"reason": {"type": reason}}))


async def test_a_finished_session_takes_no_new_work(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    sampler_id = await gateway.new_sampler(session_id)
    ok(await gateway.post(f"sessions/{session_id}/finish"))

    create = {"session_id": session_id, "model_seq_id": 1, "base_model": POOL, "lora_config": {}}
    sampler = {"session_id": session_id, "sampling_session_seq_id": 1, "base_model": POOL}
    sample = {"sampling_session_id": sampler_id, "seq_id": 1}
    for path, body in [
        ("create_model", create),
        ("load_weights", {"session_id": session_id, "model_seq_id": 1, "path": "tinker://x", "optimizer": False}),
        ("unload_model", {"model_id": model_id}),
        ("create_sampling_session", sampler),
        ("asample", sample),
    ]:
        assert "finished" in refused(await gateway.post(path, body), 410), path


async def test_an_op_of_a_finished_session_fails_through_its_future(gateway: Harness) -> None:
    """A 4xx to a later chunk of a forward_backward keeps the SDK from ever sending the first (tinker 0.38)."""
    session_id = await gateway.new_session()
    model_id = ModelId(await gateway.new_model(session_id))
    earlier = ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}}))
    ok(await gateway.post(f"sessions/{session_id}/finish"))

    step = await gateway.post("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {}})
    chunk = encode_pass(pass_op(4, model_id=model_id))
    passed = await gateway.post("forward_backward", content=chunk, headers={"Content-Type": "application/x-protobuf"})

    for answer in (step, passed):
        assert "finished" in failed(await gateway.future(ok(answer)["request_id"]))
    replayed = await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
    assert ok(replayed) == earlier
    assert (await gateway.row(earlier["request_id"])).state is RequestState.QUEUED


async def test_listing_shows_own_sessions_newest_first(gateway: Harness) -> None:
    first = await gateway.new_session()
    gateway.clock.advance(1)
    second = await gateway.new_session()
    await gateway.new_session(key=OTHER_KEY)

    assert ok(await gateway.get("sessions?limit=20&offset=0&access_scope=owned"))["sessions"] == [second, first]
    assert ok(await gateway.get("sessions?limit=1&offset=1"))["sessions"] == [first]


async def test_a_session_shows_what_it_made(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    sampler_id = await gateway.new_sampler(session_id)

    shown = ok(await gateway.get(f"sessions/{session_id}"))

    assert shown["training_run_ids"] == [model_id]
    assert shown["sampler_ids"] == [sampler_id]


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=100000", "offset=-1", "offset=9999999999999999"])
async def test_a_bad_page_is_refused_by_name(gateway: Harness, query: str) -> None:
    assert query.partition("=")[0] in refused(await gateway.get(f"sessions?{query}"), 400)


async def test_unknown_and_foreign_sessions_look_alike(gateway: Harness) -> None:
    foreign = await gateway.new_session(key=OTHER_KEY)

    for session_id in ("nothing", foreign):
        refused(await gateway.get(f"sessions/{session_id}"), 404)
        refused(await gateway.post(f"sessions/{session_id}/finish"), 404)
        refused(await gateway.post("session_heartbeat", {"session_id": session_id}), 404)
        body = {"session_id": session_id, "model_seq_id": 0, "base_model": POOL, "lora_config": {}}
        refused(await gateway.post("create_model", body), 404)


async def test_a_stopping_server_takes_no_session(gateway: Harness) -> None:
    gateway.is_draining = True

    answer = await gateway.post("create_session")

    refused(answer, 503)
    assert answer.headers["retry-after"] == "1"
