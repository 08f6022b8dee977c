"""Threads behind the event loop: every function is run or refused, and many share one way back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from treadle.errors import StoreUnavailable
from treadle.store.lanes import Lanes


class Gate:
    """What the threads work with: nothing, until it is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()

    def call(self, work: Callable[[str], Any]) -> Any:
        self.is_open.wait()
        return work("connection")


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def lanes(gate: Gate) -> AsyncIterator[Lanes[str]]:
    lanes: Lanes[str] = Lanes("test", count=2, max_waiting=100, call=gate.call)
    yield lanes
    gate.is_open.set()
    await lanes.close()


async def test_each_caller_gets_its_own_value_or_error(lanes: Lanes[str], gate: Gate) -> None:
    def fail(_connection: str) -> str:
        raise ValueError("mine")

    gate.is_open.set()
    works = [lambda connection, n=n: f"{connection} {n}" for n in range(50)]
    outcomes = await asyncio.gather(*map(lanes.run, works), lanes.run(fail), return_exceptions=True)
    assert outcomes[:-1] == [f"connection {n}" for n in range(50)]
    assert isinstance(outcomes[-1], ValueError)


async def test_work_of_a_caller_that_went_away_is_left_out(lanes: Lanes[str], gate: Gate) -> None:
    ran: list[int] = []
    tasks = [asyncio.ensure_future(lanes.run(lambda _c, n=n: ran.append(n))) for n in range(20)]
    await asyncio.sleep(0)
    for task in tasks[10:]:
        task.cancel()
    gate.is_open.set()
    await asyncio.gather(*tasks[:10])
    assert await lanes.run(lambda connection: connection) == "connection"
    # A thread may have taken its first turn before the cancellation.
    assert set(range(10)) <= set(ran)


async def test_close_runs_what_waits_and_refuses_the_rest(lanes: Lanes[str], gate: Gate) -> None:
    waiting = [asyncio.ensure_future(lanes.run(lambda _c, n=n: n)) for n in range(70)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(lanes.close())
    await asyncio.sleep(0)
    gate.is_open.set()
    await closing
    assert await asyncio.gather(*waiting) == list(range(70))
    with pytest.raises(StoreUnavailable, match="closed"):
        await lanes.run(lambda connection: connection)


async def test_too_much_waiting_work_is_refused(gate: Gate) -> None:
    lanes: Lanes[str] = Lanes("test", count=1, max_waiting=3, call=gate.call)
    waiting = [asyncio.ensure_future(lanes.run(lambda connection: connection)) for _ in range(40)]
    await asyncio.sleep(0)
    gate.is_open.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert any(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    assert outcomes[:3] == ["connection"] * 3
    await lanes.close()
