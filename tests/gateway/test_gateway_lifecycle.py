"""What a client sees of rows and weights that were swept, of an expired session, and of a store that is away."""

from __future__ import annotations

import asyncio

import pytest
from gateway_support import OTHER_KEY, Harness, failed, ok, refused, sample_body

from treadle.domain.ids import RequestId, SessionId
from treadle.domain.states import SessionState
from treadle.errors import StoreUnavailable
from treadle.gateway.access import SESSION_CACHE_S


async def forget(gateway: Harness, request_id: str) -> None:
    """Finish and sweep a request."""
    await gateway.finish(request_id, b"{}")
    await gateway.store.requests.acknowledge([RequestId(request_id)])
    gateway.clock.advance(1)
    await gateway.store.retention.forget_requests(finished_before=gateway.clock.now())
    assert await gateway.store.requests.get(RequestId(request_id)) is None


async def test_swept_sample_is_expired_and_an_unknown_one_is_not_there(gateway: Harness) -> None:
    sampler_id = await gateway.new_sampler(await gateway.new_session())
    request_id = ok(await gateway.post("asample", sample_body(sampler_id)))["request_id"]
    await forget(gateway, request_id)
    # 410 makes the SDK send the sample again (protocol 3.1).
    assert "no longer kept" in refused(await gateway.future(request_id), 410)
    refused(await gateway.future(request_id, key=OTHER_KEY), 404)
    refused(await gateway.future("nobody:sample:0:1"), 404)


async def test_weights_that_were_dropped_are_a_user_error_through_the_future(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    sampler_id = await gateway.new_sampler(session_id)
    ok(await gateway.post("asample", sample_body(sampler_id)))
    await gateway.finish(f"{sampler_id}:1", b"bytes")
    await gateway.store.sessions.finish(SessionId(session_id), "success")
    gateway.clock.advance(1)
    count, _ = await gateway.store.retention.drop_versions(
        keep=1, unused_since=0.0, finished_before=gateway.clock.now()
    )
    assert count == 1
    gateway.clock.advance(SESSION_CACHE_S)
    # Its session is over too, which is said first; a gateway that believes otherwise must still not sample.
    refused(await gateway.post("asample", sample_body(sampler_id, 2)), 410)


async def test_dropped_weights_are_noticed_behind_the_cache(gateway: Harness) -> None:
    sampler_id = await gateway.new_sampler(await gateway.new_session())
    ok(await gateway.post("asample", sample_body(sampler_id)))
    await gateway.finish(f"{sampler_id}:1", b"bytes")
    await gateway.store.retention._writer.run(
        lambda conn: conn.exec_driver_sql("UPDATE sampling_sessions SET is_dropped = true").rowcount
    )
    gateway.clock.advance(SESSION_CACHE_S)
    answer = ok(await gateway.post("asample", sample_body(sampler_id, 2)))
    assert len(answer["sample_sequence_ids"]) == 2, "as many as were asked for"
    assert "no longer kept" in failed(await gateway.future(answer["request_id"]))


async def test_expired_session_takes_heartbeats_and_work(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    gateway.clock.advance(3600)
    assert await gateway.store.retention.expire_sessions(silent_since=gateway.clock.now()) == 1
    ok(await gateway.post("session_heartbeat", {"session_id": session_id}))
    ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}}))
    # A heartbeat reaches the store with the next poll of the hub.
    await gateway.app.state.gateway.hub.poll()
    await gateway.store.retention.revive_sessions(silent_since=gateway.clock.now())
    session = await gateway.store.sessions.get(SessionId(session_id))
    assert session is not None
    assert session.state is SessionState.ACTIVE


async def test_retrieval_is_held_while_the_store_is_away(gateway: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK asks again at once after a 5xx, for ever: to answer quickly would be a busy loop."""
    model_id = await gateway.new_model(await gateway.new_session())

    async def away(_request_id: RequestId) -> None:
        raise StoreUnavailable("the database does not answer")

    monkeypatch.setattr(gateway.store.requests, "future", away)
    started_at = asyncio.get_running_loop().time()
    refused(await gateway.future(f"{model_id}:0"), 503)
    assert asyncio.get_running_loop().time() - started_at >= 0.1
