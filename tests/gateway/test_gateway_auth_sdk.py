"""The official SDK with ModelScope tokens: a member trains, strangers are told why not, and verdicts that end meanwhile
are mended without the program noticing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tinker
from gateway_support import POOL
from modelscope_stand_in import ORGANIZATION, StandIn, stand_in
from test_gateway_sdk import _served, sdk_datum
from tinker import types

from treadle.config import ModelScopeSettings
from treadle.domain.limits import JWT_LIFE_S
from treadle.gateway import GatewaySettings
from treadle.testing.clock import ManualClock

MEMBER, OUTSIDER, NOBODY = "ms-member-0123456789", "ms-outsider-0123456789", "ms-nobody-0123456789"


@contextmanager
def modelscope() -> Iterator[StandIn]:
    """One on a thread and a loop of its own."""
    box: list[StandIn] = []
    started = threading.Event()
    over = threading.Event()

    async def serve() -> None:
        async with stand_in() as server:
            server.users |= {MEMBER: "alice", OUTSIDER: "bob"}
            server.members.add("alice")
            box.append(server)
            started.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(30)
    yield box[0]
    over.set()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def clock() -> ManualClock:
    # Today's time: the SDK compares the ends of its tokens with its own clock.
    return ManualClock(time.time())


@pytest.fixture
def server() -> Iterator[StandIn]:
    with modelscope() as server:
        yield server


@pytest.fixture
def url(server: StandIn, clock: ManualClock, tmp_path: Path) -> Iterator[str]:
    asked = ModelScopeSettings(organization=ORGANIZATION, endpoint=server.url)
    settings = GatewaySettings(is_loopback=False, hold_s=5, auth_methods=("modelscope",), modelscope=asked)
    with _served(tmp_path, settings, clock) as url:
        yield url


def test_a_member_trains_over_the_ends_of_tokens_and_verdicts(url: str, server: StandIn, clock: ManualClock) -> None:
    service = tinker.ServiceClient(base_url=url, api_key=f"tml-{MEMBER}")
    training = service.create_lora_training_client(base_model=POOL, rank=8).result()
    for _ in range(4):
        assert training.forward_backward([sdk_datum()], "cross_entropy").result().metrics["loss:sum"] == 3.0
        # By the server's clock, verdict and token are over now; the SDK learns it from an answer.
        clock.advance(JWT_LIFE_S)
    server.trouble = "500"
    clock.advance(JWT_LIFE_S)
    assert training.optim_step(types.AdamParams(learning_rate=0.5)).result().metrics == {"learning_rate": 0.5}
    who = tinker.RestClient(base_url=url, api_key=f"tml-{MEMBER}").whoami().result()
    assert who.user_urn == "tml:ms:alice"
    service.close("success").result()


def test_who_leaves_in_the_middle_of_a_run_is_told_so(url: str, server: StandIn, clock: ManualClock) -> None:
    service = tinker.ServiceClient(base_url=url, api_key=f"tml-{MEMBER}")
    training = service.create_lora_training_client(base_model=POOL, rank=8).result()
    assert training.forward_backward([sdk_datum()], "cross_entropy").result().metrics["loss:sum"] == 3.0
    server.members.clear()
    clock.advance(JWT_LIFE_S)

    passed = training.forward_backward([sdk_datum()], "cross_entropy")
    stepped = training.optim_step(types.AdamParams(learning_rate=0.5))

    for future in (passed, stepped):
        with pytest.raises(tinker.PermissionDeniedError, match=ORGANIZATION):
            future.result(60)


def test_strangers_are_told_why_they_do_not_get_in(url: str, server: StandIn) -> None:
    def ask(token: str) -> None:
        tinker.RestClient(base_url=url, api_key=f"tml-{token}").list_sessions().result()

    with pytest.raises(tinker.PermissionDeniedError, match=ORGANIZATION):
        ask(OUTSIDER)
    with pytest.raises(tinker.AuthenticationError, match="ModelScope"):
        ask(NOBODY)
    server.members.add("carol")
    server.users["ms-carol-0123456789"] = "carol"
    ask("ms-carol-0123456789")
