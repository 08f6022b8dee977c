"""Too much waits: who is slowed down, how, and what the waiting client is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
from gateway_support import KEY, OTHER_KEY, POOL, Harness, ok, open_tenant, refused, sample_body

from treadle.domain.backlog import Load, TenantBacklog
from treadle.domain.ids import ModelId
from treadle.gateway import GatewaySettings
from treadle.gateway.backlog import HARD_FACTOR, Backlog
from treadle.gateway.context import Gateway
from treadle.testing.builders import datum, pass_op
from treadle.wire.passes import encode_pass

# Nothing here ends because a hold does, unless a test says so.
OPEN = GatewaySettings(is_loopback=True, hold_s=40)
# What one `send_pass` of 10 tokens counts, and one sample of `sample_body`: 3 prompt tokens and 2 x 4 at most.
PASS_TOKENS, SAMPLE_TOKENS = 10, 11


@pytest.fixture
def settings() -> GatewaySettings:
    return OPEN


@pytest.fixture
async def model_id(gateway: Harness) -> ModelId:
    return ModelId(await gateway.new_model(await gateway.new_session()))


@pytest.fixture
async def sampler_id(gateway: Harness) -> str:
    return await gateway.new_sampler(await gateway.new_session())


def backlog_of(gateway: Harness) -> Backlog:
    part = gateway.app.state.gateway
    assert isinstance(part, Gateway)
    return part.backlog


async def send_pass(gateway: Harness, model_id: str, seq_id: int, *, key: str = KEY) -> httpx.Response:
    op = pass_op(seq_id, model_id=ModelId(model_id), datums=[datum(PASS_TOKENS)])
    headers = {"Content-Type": "application/x-protobuf"}
    return await gateway.post("forward_backward", content=encode_pass(op), headers=headers, key=key)


async def held(gateway: Harness, sent: asyncio.Task[httpx.Response]) -> None:
    """Return once the call waits for room."""
    async with asyncio.timeout(10):
        while not backlog_of(gateway).num_waiting:
            assert not sent.done(), sent.result()
            await asyncio.sleep(0)


class TestSamples:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return replace(OPEN, max_queued_samples_per_tenant=2)

    async def test_a_full_queue_pushes_back_until_there_is_room(self, gateway: Harness, sampler_id: str) -> None:
        first = ok(await gateway.post("asample", sample_body(sampler_id, 1)))
        ok(await gateway.post("asample", sample_body(sampler_id, 2)))
        answer = await gateway.post("asample", sample_body(sampler_id, 3))
        assert refused(answer, 429) == "2 of your requests wait; the limit is 2"
        assert answer.headers["retry-after"] == "1"
        # Nothing is known of it, and it may come again under its number.
        assert await gateway.store.requests.get(f"{sampler_id}:3") is None

        await gateway.finish(first["request_id"], b"x")
        await backlog_of(gateway).read()

        ok(await gateway.post("asample", sample_body(sampler_id, 3)))

    async def test_other_tenants_have_a_queue_of_their_own(self, gateway: Harness, sampler_id: str) -> None:
        for seq_id in (1, 2):
            ok(await gateway.post("asample", sample_body(sampler_id, seq_id)))

        other = await gateway.new_sampler(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)
        ok(await gateway.post("asample", sample_body(other), key=OTHER_KEY))

    async def test_a_full_queue_of_samples_leaves_training_alone(
        self, gateway: Harness, sampler_id: str, model_id: ModelId
    ) -> None:
        """An actor that samples ahead must not slow its own trainer down."""
        for seq_id in (1, 2):
            ok(await gateway.post("asample", sample_body(sampler_id, seq_id)))
        async with asyncio.timeout(10):
            ok(await send_pass(gateway, model_id, 1))

    async def test_a_replay_is_not_counted_again(self, gateway: Harness, sampler_id: str) -> None:
        for _ in range(3):
            ok(await gateway.post("asample", sample_body(sampler_id, 1)))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"max_queued_tokens_per_tenant": SAMPLE_TOKENS}, f"{SAMPLE_TOKENS} of your tokens wait; the limit is 11"),
        ({"max_queued_bytes_per_tenant": 1}, "of your bytes of requests wait; the limit is 1"),
        ({"max_queued_tokens": SAMPLE_TOKENS}, "11 tokens of all tenants wait; the limit is 11"),
        ({"max_queued_bytes": 1}, "bytes of requests of all tenants wait; the limit is 1"),
    ],
)
class TestEachLimit:
    @pytest.fixture
    def settings(self, limit: dict[str, int]) -> GatewaySettings:
        return replace(OPEN, hold_s=0.02, **limit)

    async def test_pushes_samples_back_and_says_so_to_those_who_wait(
        self, gateway: Harness, sampler_id: str, words: str, limit: dict[str, int]
    ) -> None:
        admitted = ok(await gateway.post("asample", sample_body(sampler_id, 1)))
        assert words in refused(await gateway.post("asample", sample_body(sampler_id, 2)), 429)

        waiting = await gateway.future(admitted["request_id"])

        assert waiting.status_code == 408
        is_own = any(name.endswith("per_tenant") for name in limit)
        assert waiting.json()["queue_state"] == ("paused_rate_limit" if is_own else "paused_capacity")
        assert words in waiting.json()["queue_state_reason"]

    async def test_holds_for_others_only_if_it_is_everybodys(
        self, gateway: Harness, sampler_id: str, words: str, limit: dict[str, int]
    ) -> None:
        ok(await gateway.post("asample", sample_body(sampler_id, 1)))
        other = await gateway.new_sampler(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)

        answer = await gateway.post("asample", sample_body(other), key=OTHER_KEY)

        if any(name.endswith("per_tenant") for name in limit):
            ok(answer)
        else:
            assert words in refused(answer, 429)


class TestTraining:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        # Room for two passes; the answer to the second is held, for as long as it may be.
        return replace(OPEN, max_queued_tokens_per_tenant=2 * PASS_TOKENS)

    async def test_an_op_beyond_the_limit_is_durable_at_once_and_its_answer_waits_for_room(
        self, gateway: Harness, model_id: ModelId
    ) -> None:
        first = ok(await send_pass(gateway, model_id, 1))
        sent = asyncio.create_task(send_pass(gateway, model_id, 2))
        await held(gateway, sent)
        assert (await gateway.row(f"{model_id}:2")).num_tokens == PASS_TOKENS

        await gateway.finish(first["request_id"], b"x")

        assert ok(await sent)["request_id"] == f"{model_id}:2"

    async def test_a_chunk_in_front_of_which_one_is_missing_is_answered_at_once(
        self, gateway: Harness, model_id: ModelId
    ) -> None:
        """The SDK sends the first chunk of a call when the others are answered: to hold those would stop the run."""
        async with asyncio.timeout(10):
            for seq_id in (2, 3, 4):
                ok(await send_pass(gateway, model_id, seq_id))
        assert backlog_of(gateway).excess(open_tenant(), is_sample=False) is not None

        sent = asyncio.create_task(send_pass(gateway, model_id, 1))
        await held(gateway, sent)
        sent.cancel()

    async def test_steps_and_saves_are_held_like_passes(self, gateway: Harness, model_id: ModelId) -> None:
        ok(await send_pass(gateway, model_id, 1))
        sent = asyncio.create_task(send_pass(gateway, model_id, 2))
        await held(gateway, sent)
        step = asyncio.create_task(gateway.post("optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": {}}))
        async with asyncio.timeout(10):
            while backlog_of(gateway).num_waiting < 2:  # noqa: ASYNC110 (no event says that a call waits)
                await asyncio.sleep(0)
        assert not step.done()
        for task in (sent, step):
            task.cancel()

    async def test_another_tenant_is_not_held(self, gateway: Harness, model_id: ModelId) -> None:
        ok(await send_pass(gateway, model_id, 1))
        sent = asyncio.create_task(send_pass(gateway, model_id, 2))
        await held(gateway, sent)
        other = await gateway.new_model(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)
        async with asyncio.timeout(10):
            ok(await send_pass(gateway, other, 1, key=OTHER_KEY))
        sent.cancel()

    async def test_a_server_that_drains_holds_nobody(self, gateway: Harness, model_id: ModelId) -> None:
        ok(await send_pass(gateway, model_id, 1))
        sent = asyncio.create_task(send_pass(gateway, model_id, 2))
        await held(gateway, sent)
        gateway.is_draining = True
        async with asyncio.timeout(10):
            ok(await sent)


class TestTheEndOfAHold:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return replace(OPEN, hold_s=0.02, max_queued_tokens_per_tenant=PASS_TOKENS)

    async def test_an_op_is_answered_when_the_hold_is_over(self, gateway: Harness, model_id: ModelId) -> None:
        assert ok(await send_pass(gateway, model_id, 1))["request_id"] == f"{model_id}:1"

    async def test_far_beyond_the_limit_ops_are_kept_out_until_there_is_room(
        self, gateway: Harness, model_id: ModelId
    ) -> None:
        for seq_id in range(1, HARD_FACTOR + 1):
            ok(await send_pass(gateway, model_id, seq_id))

        answer = await send_pass(gateway, model_id, HARD_FACTOR + 1)

        # Not a 4xx, which would leave a hole: the SDK sends the same op again.
        assert f"the limit is {HARD_FACTOR * PASS_TOKENS}" in refused(answer, 503)
        assert answer.headers["retry-after"] == "1"
        assert await gateway.store.requests.known_seq_ids(model_id, 1, 9) == set(range(1, HARD_FACTOR + 1))
        refused(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 4, "adam_params": {}}), 503)

        await gateway.finish(f"{model_id}:1", b"x")
        await backlog_of(gateway).read()
        ok(await send_pass(gateway, model_id, HARD_FACTOR + 1))


class TestReasons:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return replace(OPEN, hold_s=0.02)

    async def test_a_hole_is_named(self, gateway: Harness, model_id: ModelId) -> None:
        await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
        for seq_id in (4, 5):
            ok(await send_pass(gateway, model_id, seq_id))

        body = (await gateway.future(f"{model_id}:5")).json()

        assert body == {
            "queue_state": "paused_capacity",
            "queue_state_reason": "waiting for request 2, which has not come",
        }

    async def test_in_line_the_place_is_told(self, gateway: Harness, model_id: ModelId) -> None:
        other = await gateway.new_model(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)
        ok(await send_pass(gateway, other, 1, key=OTHER_KEY))
        for seq_id in (1, 2, 3):
            ok(await send_pass(gateway, model_id, seq_id))
        await backlog_of(gateway).read()

        body = (await gateway.future(f"{model_id}:3")).json()

        assert body["queue_state"] == "active"
        words = "2 of this run's requests (20 tokens) are ahead; 1 other tenants have work in the pool"
        assert body["queue_state_reason"] == words


async def test_what_an_earlier_server_left_is_counted(gateway: Harness, model_id: ModelId, sampler_id: str) -> None:
    ok(await send_pass(gateway, model_id, 1))
    ok(await gateway.post("asample", sample_body(sampler_id, 1)))
    fresh = Backlog(
        store=gateway.store, limits=backlog_of(gateway).limits, metrics=gateway.metrics, clock=gateway.clock
    )

    await fresh.read()

    row = await gateway.row(f"{model_id}:1")
    loads = fresh.of_tenant(open_tenant())
    assert loads[False] == Load(1, PASS_TOKENS, row.payload_bytes)
    assert (loads[True].num_ops, loads[True].num_tokens) == (1, SAMPLE_TOKENS)
    assert row.payload_bytes > PASS_TOKENS * 12


async def test_what_is_admitted_while_the_table_is_read_is_not_forgotten(
    gateway: Harness, model_id: ModelId, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = gateway.store.backlog.read

    async def read_then_admit() -> list[TenantBacklog]:
        entries = await read()
        ok(await send_pass(gateway, model_id, 1))
        return entries

    with monkeypatch.context() as patch:
        patch.setattr(gateway.store.backlog, "read", read_then_admit)
        await backlog_of(gateway).read()
    assert backlog_of(gateway).of_tenant(open_tenant())[False].num_ops == 1
    await backlog_of(gateway).read()
    assert backlog_of(gateway).of_tenant(open_tenant())[False].num_ops == 1


async def test_a_large_payload_counts_although_it_lies_elsewhere(gateway: Harness, model_id: ModelId) -> None:
    body = encode_pass(pass_op(1, model_id=model_id, datums=[datum(64, seed=seed) for seed in range(100)]))
    headers = {"Content-Type": "application/x-protobuf"}
    ok(await gateway.post("forward_backward", content=body, headers=headers))
    backlog = backlog_of(gateway)
    assert (await gateway.row(f"{model_id}:1")).payload_key is not None

    as_admitted = backlog.of_tenant(open_tenant())[False]
    await backlog.read()

    assert as_admitted.num_bytes == backlog.of_tenant(open_tenant())[False].num_bytes == len(body)


async def test_metrics_show_what_waits_and_go_back_to_zero(gateway: Harness, model_id: ModelId) -> None:
    ok(await send_pass(gateway, model_id, 1))
    gateway.clock.advance(7)
    await backlog_of(gateway).read()

    def value(name: str, **labels: str) -> float | None:
        return gateway.metrics.registry.get_sample_value(f"treadle_queued_{name}", {"pool": POOL, **labels})

    assert value("ops", work="training") == 1
    assert value("tokens", work="training") == PASS_TOKENS
    assert value("bytes", work="training") == (await gateway.row(f"{model_id}:1")).payload_bytes
    assert value("oldest_seconds") == 7

    await gateway.finish(f"{model_id}:1", b"x")
    await backlog_of(gateway).read()
    assert value("ops", work="training") == value("oldest_seconds") == 0
