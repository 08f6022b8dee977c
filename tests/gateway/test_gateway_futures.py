"""Retrieval: one future, and the poller of a sampling session."""

from __future__ import annotations

import asyncio
import time

import pytest
from gateway_support import OTHER_KEY, POOL, Harness, ok, refused, sample_body

from treadle.domain.ids import RequestId, SamplingSessionId
from treadle.domain.outcome import EncodedResult
from treadle.domain.records import FinishedRequest
from treadle.gateway import GatewaySettings, PoolView
from treadle.gateway.context import Gateway
from treadle.gateway.futures import DRAIN_HOLD_S, TICK_S

# Long enough that a test which relied on the end of a hold would run into its own time limit.
LONG_HOLD = GatewaySettings(is_loopback=True, hold_s=40)
PROTOBUF = "application/x-protobuf"


@pytest.fixture
async def request_id(gateway: Harness) -> str:
    model_id = await gateway.new_model(await gateway.new_session())
    step = {"model_id": model_id, "seq_id": 1, "adam_params": {}}
    return str(ok(await gateway.post("optim_step", step))["request_id"])


@pytest.fixture
async def sampler_id(gateway: Harness) -> str:
    return await gateway.new_sampler(await gateway.new_session())


def hub_of(gateway: Harness) -> Gateway:
    part = gateway.app.state.gateway
    assert isinstance(part, Gateway)
    return part


async def held(gateway: Harness, num_waiters: int = 1) -> None:
    """Return once so many calls are being held."""
    async with asyncio.timeout(10):
        while hub_of(gateway).hub.num_waiters < num_waiters:  # noqa: ASYNC110 (no event says that a call waits)
            await asyncio.sleep(0)


async def sample(gateway: Harness, sampler_id: str, seq_id: int) -> str:
    return str(ok(await gateway.post("asample", sample_body(sampler_id, seq_id)))["request_id"])


def poll_body(sampler_id: str, **fields: object) -> dict[str, object]:
    target = {"type": "sampling_session", "sampling_session_id": sampler_id, "cloned_sampler_id": 0}
    return {"target": target, "prev_cursor": 0, "retrieved_request_ids": [], **fields}


async def test_results_go_out_verbatim_and_again(gateway: Harness, request_id: str) -> None:
    await gateway.finish(request_id, b"\x00\x01bytes", content_type=PROTOBUF)

    for _ in range(3):
        answer = await gateway.future(request_id)
        assert answer.status_code == 200
        assert answer.content == b"\x00\x01bytes"
        assert answer.headers["content-type"] == PROTOBUF


async def test_an_unfinished_future_is_408_with_the_state_on_top(gateway: Harness, request_id: str) -> None:
    answer = await gateway.future(request_id)

    assert answer.status_code == 408
    assert answer.json() == {
        "queue_state": "active",
        "queue_state_reason": "0 of this run's requests (0 tokens) are ahead; 0 other tenants have work in the pool",
    }


async def test_a_future_of_a_pool_that_is_not_ready_says_why(gateway: Harness, request_id: str) -> None:
    gateway.pools[0] = PoolView(POOL, is_ready=False, reason="its worker ended and is started again")

    body = (await gateway.future(request_id)).json()

    assert body["queue_state"] == "paused_capacity"
    assert "started again" in body["queue_state_reason"]


async def test_failures_are_answers_with_category(gateway: Harness, request_id: str) -> None:
    await gateway.fail(request_id, "the worker ended")

    answer = await gateway.future(request_id)

    assert answer.status_code == 200
    assert answer.json() == {"error": "the worker ended", "category": "server"}


async def test_unknown_and_foreign_futures_look_alike(gateway: Harness, request_id: str) -> None:
    await gateway.finish(request_id, b"{}")

    unknown = refused(await gateway.future("nothing"), 404)
    foreign = refused(await gateway.future(request_id, key=OTHER_KEY), 404)

    assert foreign.replace(request_id, "nothing") == unknown
    # A stranger's look changes nothing for the owner.
    assert (await gateway.future(request_id)).status_code == 200


async def test_a_transient_failure_of_a_sample_asks_for_it_again(gateway: Harness, sampler_id: str) -> None:
    request_id = await sample(gateway, sampler_id, 1)
    await gateway.fail(request_id, "the sampler was restarted", is_transient=True)

    assert "restarted" in refused(await gateway.future(request_id), 410)


async def test_a_result_that_is_no_longer_kept_is_410(gateway: Harness, sampler_id: str) -> None:
    request_id = await sample(gateway, sampler_id, 1)
    await gateway.finish(request_id, b"x")
    await gateway.store.requests.acknowledge([RequestId(request_id)])

    refused(await gateway.future(request_id), 410)


async def test_delivery_is_noted_so_that_results_can_go(gateway: Harness, request_id: str) -> None:
    await gateway.finish(request_id, b"{}")
    await gateway.future(request_id)
    await hub_of(gateway).hub.poll()
    gateway.clock.advance(10)

    now = gateway.clock.now()
    assert await gateway.store.requests.sweep(delivered_before=now, undelivered_before=0) == 1


class TestHolding:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return LONG_HOLD

    async def test_a_commit_wakes_every_waiter(self, gateway: Harness, request_id: str) -> None:
        waiting = [asyncio.create_task(gateway.future(request_id)) for _ in range(3)]
        await held(gateway, 3)

        await gateway.finish(request_id, b'{"metrics": {}}')

        async with asyncio.timeout(10):
            for answer in await asyncio.gather(*waiting):
                assert answer.json() == {"metrics": {}}

    async def test_a_failure_wakes_too(self, gateway: Harness, request_id: str) -> None:
        waiting = asyncio.create_task(gateway.future(request_id))
        await held(gateway)

        await gateway.fail(request_id, "no")

        async with asyncio.timeout(10):
            assert (await waiting).json()["error"] == "no"

    async def test_a_commit_between_the_read_and_the_wait_is_not_missed(
        self, gateway: Harness, request_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = gateway.store.requests.future
        num_reads = 0

        async def read_then_commit(id_: RequestId) -> object:
            nonlocal num_reads
            num_reads += 1
            record = await read(id_)
            if num_reads == 1:
                await gateway.finish(request_id, b"{}")
            return record

        monkeypatch.setattr(gateway.store.requests, "future", read_then_commit)

        async with asyncio.timeout(10):
            assert (await gateway.future(request_id)).status_code == 200

    async def test_a_commit_of_another_process_is_found_by_the_slow_poll(
        self, gateway: Harness, request_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waiting = asyncio.create_task(gateway.future(request_id))
        await held(gateway)
        monkeypatch.setattr(gateway.store.events, "announce_finished", lambda _ids: None)
        cycles = gateway.store.cycles
        monkeypatch.setattr(cycles, "_events", gateway.store.events)

        result = FinishedRequest(RequestId(request_id), result=EncodedResult("application/json", b"{}"))
        await gateway.commit(result)
        assert not waiting.done()

        async with asyncio.timeout(10):
            assert (await waiting).status_code == 200

    async def test_a_stopping_server_lets_held_polls_go(
        self, gateway: Harness, request_id: str, sampler_id: str
    ) -> None:
        waiting = asyncio.create_task(gateway.future(request_id))
        polling = asyncio.create_task(gateway.post("retrieve_futures", poll_body(sampler_id)))
        await held(gateway, 2)

        gateway.is_draining = True

        async with asyncio.timeout(10 * TICK_S):
            assert (await waiting).status_code == 408
            assert ok(await polling) == {"completions": [], "cursor": 0}

    async def test_polls_of_a_stopping_server_are_held_for_a_moment_only(
        self, gateway: Harness, request_id: str
    ) -> None:
        gateway.is_draining = True
        started_at = time.monotonic()

        answer = await gateway.future(request_id)

        assert answer.status_code == 408
        # Not at once: a client that asks again immediately must not spin.
        assert DRAIN_HOLD_S * 0.9 <= time.monotonic() - started_at < 10

    async def test_a_finished_sample_wakes_its_sessions_poller(self, gateway: Harness, sampler_id: str) -> None:
        request_id = await sample(gateway, sampler_id, 1)
        polling = asyncio.create_task(gateway.post("retrieve_futures", poll_body(sampler_id)))
        await held(gateway)

        await gateway.finish(request_id, b"four")

        async with asyncio.timeout(10):
            body = ok(await polling)
        assert body["completions"] == [
            {"state": "finished", "request_id": request_id, "response_payload_uncompressed_size": 4}
        ]

    async def test_an_acknowledgement_is_answered_at_once(self, gateway: Harness, sampler_id: str) -> None:
        async with asyncio.timeout(10):
            body = ok(await gateway.post("retrieve_futures", poll_body(sampler_id, timeout=0.0, prev_cursor=3)))

        assert body == {"completions": [], "cursor": 3}


async def test_the_cursor_moves_past_what_was_seen(gateway: Harness, sampler_id: str) -> None:
    ids = [await sample(gateway, sampler_id, seq_id) for seq_id in (1, 2, 3)]
    await gateway.finish(ids[1], b"x")
    first = ok(await gateway.post("retrieve_futures", poll_body(sampler_id)))
    await gateway.fail(ids[0], "no")
    await gateway.finish(ids[2], b"yy")
    second = ok(await gateway.post("retrieve_futures", poll_body(sampler_id, prev_cursor=first["cursor"])))

    assert [done["request_id"] for done in first["completions"]] == [ids[1]]
    assert [(done["request_id"], done["state"]) for done in second["completions"]] == [
        (ids[0], "failed"),
        (ids[2], "finished"),
    ]
    assert second["cursor"] > first["cursor"]
    nothing = ok(await gateway.post("retrieve_futures", poll_body(sampler_id, prev_cursor=second["cursor"])))
    assert nothing == {"completions": [], "cursor": second["cursor"]}


async def test_a_refused_sample_is_a_completion_too(gateway: Harness, sampler_id: str) -> None:
    request_id = ok(await gateway.post("asample", sample_body(sampler_id, prompt=None)))["request_id"]

    body = ok(await gateway.post("retrieve_futures", poll_body(sampler_id)))

    assert body["completions"] == [{"state": "failed", "request_id": request_id}]


async def test_each_clone_sees_its_own_samples(gateway: Harness, sampler_id: str) -> None:
    original = await sample(gateway, sampler_id, 1)
    clone = await sample(gateway, sampler_id, 5 * 10**9 + 1)
    for request_id in (original, clone):
        await gateway.finish(request_id, b"x")

    async def seen(cloned_sampler_id: int) -> list[str]:
        body = poll_body(sampler_id)
        body["target"] = {"sampling_session_id": sampler_id, "cloned_sampler_id": cloned_sampler_id}
        return [done["request_id"] for done in ok(await gateway.post("retrieve_futures", body))["completions"]]

    assert await seen(0) == [original]
    assert await seen(5) == [clone]
    body = poll_body(sampler_id)
    body["target"] = {"sampling_session_id": sampler_id, "cloned_sampler_id": 2**62}
    refused(await gateway.post("retrieve_futures", body), 400)


async def test_only_own_results_can_be_acknowledged(gateway: Harness, sampler_id: str) -> None:
    other_sampler = await gateway.new_sampler(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)
    foreign = ok(await gateway.post("asample", sample_body(other_sampler), key=OTHER_KEY))["request_id"]
    own = await sample(gateway, sampler_id, 1)
    for request_id in (foreign, own):
        await gateway.finish(request_id, b"x")

    ok(await gateway.post("retrieve_futures", poll_body(sampler_id, retrieved_request_ids=[foreign, own], timeout=0.0)))

    assert (await gateway.future(foreign, key=OTHER_KEY)).content == b"x"
    refused(await gateway.future(own), 410)


async def test_a_sampling_session_made_by_a_save_can_be_polled(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    sampler_id = await gateway.new_sampler(session_id, 3)

    assert ok(await gateway.post("retrieve_futures", poll_body(sampler_id)))["completions"] == []
    assert await gateway.store.sampling.get(SamplingSessionId(sampler_id)) is not None


async def test_unknown_and_foreign_sampling_sessions_are_404(gateway: Harness, sampler_id: str) -> None:
    refused(await gateway.post("retrieve_futures", poll_body("nothing")), 404)
    refused(await gateway.post("retrieve_futures", poll_body(sampler_id), key=OTHER_KEY), 404)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"request_id": 5}'])
async def test_a_retrieval_that_cannot_be_read_is_refused_with_a_body(gateway: Harness, body: bytes) -> None:
    refused(await gateway.post("retrieve_future", content=body), 400)
    refused(await gateway.post("retrieve_futures", content=body), 400)


async def test_a_cancelled_sample_ends_and_a_finished_one_stays(gateway: Harness, sampler_id: str) -> None:
    queued, done = await sample(gateway, sampler_id, 1), await sample(gateway, sampler_id, 2)
    await gateway.finish(done, b"tokens", content_type=PROTOBUF)
    waiting = asyncio.create_task(gateway.post("retrieve_future", {"request_id": queued}))
    await held(gateway)
    for request_id in (queued, done, queued):
        assert ok(await gateway.post("cancel_future", {"request_id": request_id})) == {}
    assert (await waiting).json() == {"error": "this sample was cancelled", "category": "user"}
    assert (await gateway.post("retrieve_future", {"request_id": done})).content == b"tokens"
    # What a sampler had drawn of it comes too late.
    await gateway.finish(queued, b"late", content_type=PROTOBUF)
    assert b"cancelled" in (await gateway.post("retrieve_future", {"request_id": queued})).content


async def test_only_ones_own_samples_can_be_cancelled(gateway: Harness, sampler_id: str, request_id: str) -> None:
    queued = await sample(gateway, sampler_id, 1)
    assert "optim_step" in refused(await gateway.post("cancel_future", {"request_id": request_id}), 400)
    foreign = refused(await gateway.post("cancel_future", {"request_id": queued}, key=OTHER_KEY), 404)
    unknown = refused(await gateway.post("cancel_future", {"request_id": "nobody"}), 404)
    assert foreign.replace(queued, "nobody") == unknown
