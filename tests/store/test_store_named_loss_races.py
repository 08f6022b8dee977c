"""Two servers over one database decide about the same named losses at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

import pytest
from test_store_named_losses import ADMIN, ALICE, BOB, OTHER_GRAPH, PASSED, new, reviewed, submitted

from treadle.domain.named_losses import LossStatus, ReviewResult
from treadle.errors import InvalidRequest
from treadle.store import Store
from treadle.testing.clock import ManualClock

T = TypeVar("T")
_ROUNDS = 20


@pytest.fixture
async def other(database_url: str, store: Store, clock: ManualClock) -> AsyncIterator[Store]:
    """Another server's store."""
    other = await Store.open(database_url, clock=clock.now)
    yield other
    await other.close()


async def outcomes(calls: Sequence[Awaitable[T]]) -> list[T]:
    """What became of those that were not refused; nothing but a refusal is raised."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in done:
        if isinstance(outcome, BaseException) and not isinstance(outcome, InvalidRequest):
            raise outcome
    return [outcome for outcome in done if not isinstance(outcome, BaseException)]


async def test_a_name_is_pending_once(store: Store, other: Store) -> None:
    for index in range(_ROUNDS):
        kept = await outcomes([submitted(one, new(f"mine_{index}")) for one in (store, other)])
        assert len(kept) == 1
        await store.named_losses.remove(kept[0].named_loss_id, ADMIN, only_pending=True)


async def test_a_review_is_claimed_once(store: Store, other: Store) -> None:
    for index in range(_ROUNDS):
        row = await submitted(store, new(f"mine_{index}"))
        calls = [one.named_losses.begin_review(row.named_loss_id, ADMIN) for one in (store, other)]
        assert len(await outcomes(calls)) == 1
        await store.named_losses.remove(row.named_loss_id, ADMIN, only_pending=True)


async def test_of_two_tenants_one_gets_the_name(store: Store, other: Store) -> None:
    for index in range(_ROUNDS):
        rows = [await reviewed(store, new(f"mine_{index}", tenant=tenant)) for tenant in (ALICE, BOB)]
        calls = [one.named_losses.approve(row, None, ADMIN) for one, row in zip((store, other), rows, strict=True)]
        assert len(await outcomes(calls)) == 1
        for row in rows:
            if (await store.named_losses.get(row)).status is LossStatus.PENDING:
                await store.named_losses.remove(row, ADMIN, only_pending=True)


async def test_what_is_revoked_stays_so_whoever_changes_its_tenants(store: Store, other: Store) -> None:
    for index in range(_ROUNDS):
        first = await reviewed(store, new(f"mine_{index}"))
        await store.named_losses.approve(first, None, ADMIN)
        second = await reviewed(store, new(f"mine_{index}"), OTHER_GRAPH)
        await outcomes(
            [
                store.named_losses.approve(first, [BOB], ADMIN),
                other.named_losses.decide(first, LossStatus.REVOKED, "it leaks", ADMIN),
                other.named_losses.approve(second, None, ADMIN),
            ]
        )
        rows = [await store.named_losses.get(row) for row in (first, second)]
        assert [row.status for row in rows] == [LossStatus.REVOKED, LossStatus.APPROVED]
        loss = await store.named_losses.approved(f"mine_{index}", BOB)
        assert loss is not None
        assert loss.definition == OTHER_GRAPH
        revoked = (await other.policies.read()).revoked_losses
        assert rows[1].definition_sha256 not in revoked
        await other.named_losses.decide(second, LossStatus.REVOKED, "next", ADMIN)


async def test_a_withdrawal_and_the_end_of_a_review(store: Store, other: Store) -> None:
    for index in range(_ROUNDS):
        rows = [await submitted(store, new(f"mine_{index}", tenant=tenant)) for tenant in (ALICE, BOB)]
        for row in rows:
            await store.named_losses.begin_review(row.named_loss_id, ADMIN)
        # Both have one definition, which goes with the last of them and not before.
        result = ReviewResult(PASSED, definition=b'{"graph": "shared"}')
        await store.named_losses.finish_review(rows[0].named_loss_id, result, ADMIN)
        await outcomes(
            [
                store.named_losses.remove(rows[0].named_loss_id, ADMIN, only_pending=True),
                other.named_losses.finish_review(rows[1].named_loss_id, result, ADMIN),
            ]
        )
        kept = await store.named_losses.get(rows[1].named_loss_id)
        assert kept.definition == result.definition
        await store.named_losses.remove(rows[1].named_loss_id, ADMIN, only_pending=True)
