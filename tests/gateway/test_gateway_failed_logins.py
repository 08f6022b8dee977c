"""Unknown keys, one after another: an address that tries them is held up, and nobody else."""

from __future__ import annotations

import httpx
import pytest
import sqlalchemy as sa
from gateway_support import Harness, ok, refused

from treadle.domain.keys import key_digest
from treadle.gateway import GatewaySettings

GOOD, LATE = "tml-good", "tml-late"
LIMIT = 10


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.1, max_failed_logins_per_minute=LIMIT)


@pytest.fixture
async def keyed(gateway: Harness) -> Harness:
    """A gateway with two keys, one of which was used."""
    for key in (GOOD, LATE):
        await gateway.store.keys.add(key[4:], key_digest(key), False)
    ok(await gateway.get("sessions", key=GOOD))
    return gateway


async def ask(gateway: Harness, key: str, *, address: str = "192.0.2.1") -> httpx.Response:
    transport = httpx.ASGITransport(app=gateway.app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.get("/api/v1/sessions", headers={"X-API-Key": key})


async def fail(gateway: Harness, times: int = LIMIT, *, address: str = "192.0.2.1") -> list[int]:
    return [(await ask(gateway, f"tml-guess-{i}", address=address)).status_code for i in range(times)]


async def test_after_many_unknown_keys_the_next_ones_wait(keyed: Harness) -> None:
    assert await fail(keyed, LIMIT + 3) == [401] * LIMIT + [429] * 3
    answer = await ask(keyed, "tml-guess")
    assert "try again" in refused(answer, 429)
    assert answer.headers["retry-after"] == "1"
    # Nor is a good one looked up that was not seen before: it could be a guess.
    assert (await ask(keyed, LATE)).status_code == 429


async def test_who_was_known_goes_on_and_other_addresses_do(keyed: Harness) -> None:
    await fail(keyed)
    assert (await ask(keyed, GOOD)).status_code == 200
    assert (await ask(keyed, LATE, address="192.0.2.2")).status_code == 200
    assert (await ask(keyed, "tml-guess", address="192.0.2.2")).status_code == 401
    # Seen from another address, it is known.
    assert (await ask(keyed, LATE)).status_code == 200


async def test_with_time_there_is_room_again(keyed: Harness) -> None:
    await fail(keyed)
    keyed.clock.advance(60 / LIMIT)
    assert await fail(keyed, 2) == [401, 429]
    keyed.clock.advance(3_600)
    assert await fail(keyed, LIMIT + 1) == [401] * LIMIT + [429]


async def test_a_key_that_ended_is_no_way_through(keyed: Harness) -> None:
    await fail(keyed)
    record = await keyed.store.keys.find(key_digest(GOOD))
    assert record is not None
    await keyed.store.keys.revoke(record.key_id)
    keyed.clock.advance(1.5)
    assert (await ask(keyed, GOOD)).status_code == 401
    assert (await ask(keyed, GOOD)).status_code == 429


async def test_what_is_held_up_asks_the_database_nothing(keyed: Harness) -> None:
    asked: list[str] = []

    def note(conn: object, cursor: object, statement: str, *rest: object) -> None:
        asked.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        await fail(keyed)
        assert len([statement for statement in asked if "FROM keys" in statement]) >= LIMIT
        asked.clear()
        assert await fail(keyed, 5) == [429] * 5
        assert not [statement for statement in asked if "FROM keys" in statement]
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


async def test_a_token_of_a_key_is_asked_for_like_everything_else(keyed: Harness) -> None:
    await fail(keyed, address="127.0.0.1")
    assert (await keyed.post("auth/token", key="tml-guess")).status_code == 429
    token = ok(await keyed.post("auth/token", key=GOOD))["jwt"]
    # A token that nobody has shown yet waits, though its key is known.
    assert (await keyed.get("sessions", key=token)).status_code == 429


async def test_failures_are_counted(keyed: Harness) -> None:
    await fail(keyed, 3)
    assert keyed.metrics.registry.get_sample_value("treadle_failed_logins_total") == 3
