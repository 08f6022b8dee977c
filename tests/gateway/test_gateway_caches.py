"""Rows that are believed for a while: one question for all of them, and never a row that is over for longer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from treadle.errors import StoreUnavailable
from treadle.gateway.caches import ConfirmedRows, RecentRows
from treadle.testing.clock import ManualClock

LIFETIME_S = 1.0


class Truth:
    """What the store would say; `may_answer` holds its answers back."""

    def __init__(self) -> None:
        self.over: set[str] = set()
        self.asked: list[list[str]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.is_down = False

    async def ended(self, keys: Sequence[str]) -> set[str]:
        self.asked.append(list(keys))
        await self.may_answer.wait()
        if self.is_down:
            raise StoreUnavailable("down")
        return self.over & set(keys)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def truth() -> Truth:
    return Truth()


@pytest.fixture
def rows(truth: Truth, clock: ManualClock) -> ConfirmedRows[str, int]:
    rows: ConfirmedRows[str, int] = ConfirmedRows(capacity=8, lifetime_s=LIFETIME_S, clock=clock, ended=truth.ended)
    for value, key in enumerate("abc"):
        rows.put(key, value, read_at=clock.monotonic())
    return rows


async def test_a_fresh_row_is_believed_without_asking(rows: ConfirmedRows[str, int], truth: Truth) -> None:
    assert [await rows.get(key) for key in "abcx"] == [0, 1, 2, None]
    assert truth.asked == []


async def test_all_old_rows_are_confirmed_by_one_question(
    rows: ConfirmedRows[str, int], truth: Truth, clock: ManualClock
) -> None:
    clock.advance(LIFETIME_S)
    truth.over = {"b"}
    assert await asyncio.gather(*(rows.get(key) for key in "abc")) == [0, None, 2]
    assert truth.asked == [["a", "b", "c"]]
    clock.advance(LIFETIME_S / 2)
    assert await rows.get("a") == 0
    assert len(truth.asked) == 1
    clock.advance(LIFETIME_S / 2)
    assert await rows.get("c") == 2
    assert len(truth.asked) == 2


async def test_a_row_that_came_too_old_while_the_store_was_asked_is_read_again(
    rows: ConfirmedRows[str, int], truth: Truth, clock: ManualClock
) -> None:
    clock.advance(LIFETIME_S)
    truth.may_answer.clear()
    first = asyncio.ensure_future(rows.get("a"))
    while not truth.asked:  # noqa: ASYNC110 (no event says that the store was asked)
        await asyncio.sleep(0)
    rows.put("late", 9, read_at=clock.monotonic() - 2 * LIFETIME_S)
    late = asyncio.ensure_future(rows.get("late"))
    await asyncio.sleep(0)
    truth.may_answer.set()
    assert await first == 0
    assert await late is None


async def test_a_slow_store_is_asked_once_and_its_answer_counts(
    rows: ConfirmedRows[str, int], truth: Truth, clock: ManualClock
) -> None:
    clock.advance(LIFETIME_S)
    truth.may_answer.clear()
    waiting = asyncio.ensure_future(rows.get("a"))
    await asyncio.sleep(0)
    clock.advance(10 * LIFETIME_S)
    truth.may_answer.set()
    assert await waiting == 0
    assert len(truth.asked) == 1


async def test_a_caller_that_goes_away_does_not_take_the_answer_with_it(
    rows: ConfirmedRows[str, int], truth: Truth, clock: ManualClock
) -> None:
    clock.advance(LIFETIME_S)
    truth.may_answer.clear()
    first, second = (asyncio.ensure_future(rows.get(key)) for key in "ab")
    await asyncio.sleep(0)
    first.cancel()
    truth.may_answer.set()
    assert await second == 1
    assert len(truth.asked) == 1


async def test_nothing_old_is_believed_while_the_store_is_down(
    rows: ConfirmedRows[str, int], truth: Truth, clock: ManualClock
) -> None:
    clock.advance(LIFETIME_S)
    truth.is_down = True
    with pytest.raises(StoreUnavailable):
        await rows.get("a")
    truth.is_down = False
    assert await rows.get("a") == 0


def test_the_row_that_was_not_used_for_longest_goes_first() -> None:
    rows: RecentRows[str, int] = RecentRows(2)
    rows.put("a", 1)
    rows.put("b", 2)
    assert rows.get("a") == 1
    rows.put("c", 3)
    assert [rows.get(key) for key in "abc"] == [1, None, 3]
