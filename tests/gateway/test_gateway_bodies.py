"""Room for large bodies: bounded, tenants taking turns, and given back whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import zstandard
from gateway_support import Harness, ok, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.domain.ids import ModelId
from treadle.domain.limits import MAX_BODY_BYTES
from treadle.errors import Overloaded
from treadle.gateway import GatewaySettings, bodies
from treadle.gateway.admission import INLINE_DECODE_BYTES
from treadle.gateway.bodies import FREE_BODY_BYTES, BodyRoom, ByteBudget
from treadle.gateway.context import Gateway
from treadle.testing.builders import datum, pass_op
from treadle.wire.passes import encode_pass

PROTOBUF = {"Content-Type": "application/x-protobuf"}


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def room_of_gateway(gateway: Harness) -> BodyRoom:
    part = gateway.app.state.gateway
    assert isinstance(part, Gateway)
    return part.body_room


async def test_takers_wait_for_room_in_the_order_of_their_turns() -> None:
    budget = ByteBudget(100)
    await budget.take(80, owner="first")
    served: list[str] = []

    async def take(name: str, owner: str) -> None:
        await budget.take(60, owner=owner)
        served.append(name)

    tasks = [asyncio.create_task(take(f"flood {i}", "flooder")) for i in range(3)]
    await settle()
    tasks.append(asyncio.create_task(take("small", "other")))
    await settle()
    assert served == []

    budget.give_back(80)
    for _ in range(3):
        await settle()
        budget.give_back(60)
    await asyncio.gather(*tasks)

    assert served == ["flood 0", "small", "flood 1", "flood 2"]
    assert budget.held == 60


async def test_what_fits_does_not_pass_what_does_not() -> None:
    budget = ByteBudget(100)
    await budget.take(50, owner="a")
    large = asyncio.create_task(budget.take(80, owner="b"))
    await settle()
    small = asyncio.create_task(budget.take(10, owner="c"))
    await settle()
    assert not small.done()

    budget.give_back(50)
    await asyncio.gather(large, small)
    assert budget.held == 90


async def test_more_than_the_whole_budget_gets_in_alone() -> None:
    budget = ByteBudget(100)
    await budget.take(1, owner="a")
    huge = asyncio.create_task(budget.take(1_000, owner="b"))
    await settle()
    assert not huge.done()
    budget.give_back(1)
    await huge
    assert budget.held == 1_000


async def test_a_taker_that_waits_too_long_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "ROOM_WAIT_S", 0.01)
    budget = ByteBudget(100)
    await budget.take(100, owner="a")
    with pytest.raises(Overloaded):
        await budget.take(1, owner="b")
    budget.give_back(100)
    await budget.take(100, owner="c")


async def test_room_that_came_too_late_for_its_taker_is_free_again() -> None:
    budget = ByteBudget(100)
    await budget.take(100, owner="a")
    gone = asyncio.create_task(budget.take(60, owner="b"))
    await settle()
    # In one turn of the loop: its turn comes, and its client goes away.
    budget.give_back(100)
    gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled()
    assert budget.held == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(("take", "cancel", "back")), st.integers(1, 150), st.sampled_from("abc")), max_size=40
    )
)
@settings(max_examples=60, deadline=None)
def test_room_is_never_lost_or_given_twice(script: list[tuple[str, int, str]]) -> None:
    """Takers that are cancelled at any moment, also right after their turn came."""

    async def run() -> None:
        budget = ByteBudget(100)
        takers: list[tuple[asyncio.Task[None], int]] = []
        given_back: set[int] = set()

        def done() -> list[int]:
            return [
                i
                for i, (task, _) in enumerate(takers)
                if task.done() and not task.cancelled() and task.exception() is None and i not in given_back
            ]

        for position, (what, size, owner) in enumerate(script):
            if what == "take":
                takers.append((asyncio.create_task(budget.take(size, owner=owner)), size))
            elif what == "cancel" and takers:
                takers[size % len(takers)][0].cancel()
            elif what == "back" and (ready := done()):
                index = ready[size % len(ready)]
                given_back.add(index)
                budget.give_back(takers[index][1])
            if position % 3:
                await settle()
        while True:
            await settle()
            ready = done()
            assert budget.held == sum(takers[i][1] for i in ready)
            assert budget.held <= 100 or len(ready) == 1
            if not ready:
                break
            given_back.add(ready[0])
            budget.give_back(takers[ready[0]][1])
        # Nobody is left behind.
        assert all(task.done() for task, _ in takers)

    asyncio.run(run())


class TestInTheGateway:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        # As much as one body of the test below.
        return replace(GatewaySettings(is_loopback=True, hold_s=0.1), max_body_bytes_in_memory=MAX_BODY_BYTES)

    @pytest.fixture
    async def model_id(self, gateway: Harness) -> ModelId:
        return ModelId(await gateway.new_model(await gateway.new_session()))

    @pytest.fixture
    def large_body(self, model_id: ModelId) -> bytes:
        datums = [datum(64, seed=seed) for seed in range(400)]
        return encode_pass(pass_op(1, model_id=model_id, datums=datums))

    async def test_a_large_body_is_not_read_before_there_is_room(self, gateway: Harness, large_body: bytes) -> None:
        room, num_read = room_of_gateway(gateway), 0
        await room.sent.take(MAX_BODY_BYTES, owner="somebody")

        async def content() -> AsyncIterator[bytes]:
            nonlocal num_read
            num_read += 1
            yield large_body

        headers = PROTOBUF | {"Content-Length": str(len(large_body))}
        sent = asyncio.create_task(gateway.post("forward_backward", content=content(), headers=headers))
        # Others' small bodies go on meanwhile.
        await gateway.new_session()
        assert not sent.done()

        room.sent.give_back(MAX_BODY_BYTES)
        ok(await sent)
        assert room.sent.held == 0

    @pytest.mark.parametrize("body", [b"\xff" * (FREE_BODY_BYTES + 1), b"\xff" * (MAX_BODY_BYTES + 1)])
    async def test_room_is_given_back_after_a_refusal(self, gateway: Harness, body: bytes) -> None:
        answer = await gateway.post("forward_backward", content=body, headers=PROTOBUF)
        assert answer.status_code in (400, 413)
        assert room_of_gateway(gateway).sent.held == 0

    async def test_what_a_body_becomes_has_room_of_its_own(self, gateway: Harness, large_body: bytes) -> None:
        room = room_of_gateway(gateway)
        assert len(large_body) > INLINE_DECODE_BYTES
        await room.plain.take(MAX_BODY_BYTES, owner="somebody")
        headers = PROTOBUF | {"Content-Encoding": "zstd"}
        compressed = zstandard.ZstdCompressor().compress(large_body)
        sent = asyncio.create_task(gateway.post("forward_backward", content=compressed, headers=headers))
        await gateway.new_session()
        assert not sent.done()

        room.plain.give_back(MAX_BODY_BYTES)
        ok(await sent)
        assert room.plain.held == room.sent.held == 0

    async def test_a_body_that_does_not_come_gives_its_room_back(
        self, gateway: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bodies, "READ_WAIT_S", 0.01)

        async def stalled() -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.Event().wait()

        headers = PROTOBUF | {"Content-Length": str(MAX_BODY_BYTES)}
        answer = await gateway.post("forward_backward", content=stalled(), headers=headers)

        assert "did not arrive" in refused(answer, 503)
        assert room_of_gateway(gateway).sent.held == 0
