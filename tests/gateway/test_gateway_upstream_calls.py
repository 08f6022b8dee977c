"""Who may make the server call an outside service, and how often."""

from __future__ import annotations

import asyncio

import pytest

from treadle.errors import AuthUnavailable
from treadle.gateway.authenticators import upstream_calls
from treadle.gateway.authenticators.upstream_calls import AddressRates, CallSlots
from treadle.testing.clock import ManualClock


def taken(rates: AddressRates, address: str, tries: int = 100) -> int:
    """How many of so many questions in a row are allowed."""
    count = 0
    for _ in range(tries):
        try:
            rates.take(address)
        except AuthUnavailable:
            continue
        count += 1
    return count


def test_an_address_has_its_rate_and_no_more() -> None:
    clock = ManualClock()
    rates = AddressRates(per_minute=30, clock=clock)
    assert taken(rates, "192.0.2.1") == 30
    clock.advance(10)
    assert taken(rates, "192.0.2.1") == 5
    clock.advance(3_600)
    assert taken(rates, "192.0.2.1") == 30


def test_addresses_do_not_share_but_those_of_one_network_do() -> None:
    rates = AddressRates(per_minute=30, clock=ManualClock())
    assert taken(rates, "192.0.2.1") == 30
    assert taken(rates, "192.0.2.2") == 30
    assert taken(rates, "::ffff:192.0.2.1") == 0
    assert taken(rates, "2001:db8::1") == 30
    assert taken(rates, "2001:db8::ffff:1") == 0
    assert taken(rates, "2001:db8:0:1::1") == 30


def test_what_is_given_back_is_never_more_than_there_was() -> None:
    rates = AddressRates(per_minute=5, clock=ManualClock())
    for _ in range(10):
        rates.give_back("192.0.2.1")
    assert taken(rates, "192.0.2.1") == 5


async def test_strangers_leave_room_for_what_is_known() -> None:
    slots = CallSlots(4)
    held = asyncio.Event()
    num_in = 0

    async def hold(*, is_known: bool) -> None:
        nonlocal num_in
        async with slots.one(is_known=is_known, within_s=60):
            num_in += 1
            await held.wait()
            num_in -= 1

    strangers = [asyncio.ensure_future(hold(is_known=False)) for _ in range(10)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert num_in == 3
    known = [asyncio.ensure_future(hold(is_known=True)) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert num_in == 4
    held.set()
    await asyncio.gather(*strangers, *known)
    assert num_in == 0


async def test_too_many_strangers_are_sent_away_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_calls, "_MAX_WAITING", 2)
    slots = CallSlots(2)
    async with slots.one(is_known=False, within_s=60):
        waiting = [asyncio.ensure_future(slots.one(is_known=False, within_s=60).__aenter__()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(AuthUnavailable):
            async with slots.one(is_known=False, within_s=60):
                pass
        # Whatever is known is never sent away.
        async with slots.one(is_known=True, within_s=60):
            pass
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_who_waits_too_long_gives_back_what_it_has() -> None:
    slots = CallSlots(2)
    async with slots.one(is_known=True, within_s=60), slots.one(is_known=True, within_s=60):
        for _ in range(3):
            with pytest.raises(AuthUnavailable):
                async with slots.one(is_known=False, within_s=0.001):
                    pass
    async with slots.one(is_known=False, within_s=60):
        pass
