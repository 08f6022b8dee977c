"""Weights as planning gets them: from the store, relative to the standard class, and never in the way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from treadle.domain.fairness import DEFAULT_WEIGHTS, WeightClass
from treadle.domain.ids import TenantId
from treadle.errors import StoreUnavailable
from treadle.scheduler.weights import REFRESH_S, TenantWeights
from treadle.store import Store
from treadle.testing.clock import ManualClock

ALICE, BOB = TenantId("user:alice"), TenantId("user:bob")


async def changed(weights: TenantWeights, before: object) -> None:
    """Return once the weights are others than before."""
    async with asyncio.timeout(10):
        while weights() == before:  # noqa: ASYNC110 (reading goes on in the background, and nobody says when it ends)
            await asyncio.sleep(0)


async def test_weights_follow_the_store_within_seconds(tmp_path: Path) -> None:
    clock = ManualClock()
    store = await Store.open(f"sqlite:///{tmp_path}/treadle.db", clock=clock.now)
    weights = TenantWeights(store, DEFAULT_WEIGHTS, monotonic=clock.monotonic)
    await store.tenants.set_class(ALICE, WeightClass.INTERACTIVE)

    # Planning never waits for the store.
    assert weights() == {}
    await changed(weights, {})
    assert weights() == {ALICE: 4.0}

    await store.tenants.set_class(BOB, WeightClass.BULK)
    clock.advance(REFRESH_S)
    await changed(weights, {ALICE: 4.0})
    assert weights() == {ALICE: 4.0, BOB: 0.25}
    await store.close()


async def test_only_ratios_count(tmp_path: Path) -> None:
    """Who has no class is not in the answer and counts 1, so the standard class must."""
    store = await Store.open(f"sqlite:///{tmp_path}/treadle.db")
    await store.tenants.set_class(ALICE, WeightClass.INTERACTIVE)
    doubled = {weight_class: 2 * weight for weight_class, weight in DEFAULT_WEIGHTS.items()}
    assert await TenantWeights(store, doubled, monotonic=lambda: 0.0).read() == {ALICE: 4.0}
    await store.close()


async def test_a_database_that_is_away_changes_nobodys_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    store = await Store.open(f"sqlite:///{tmp_path}/treadle.db", clock=clock.now)
    weights = TenantWeights(store, DEFAULT_WEIGHTS, monotonic=clock.monotonic)
    await store.tenants.set_class(ALICE, WeightClass.BULK)
    await weights.read()
    asked = asyncio.Event()

    async def away() -> dict[TenantId, WeightClass]:
        asked.set()
        raise StoreUnavailable("the database does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(store.tenants, "classes", away)
        clock.advance(REFRESH_S)
        assert weights() == {ALICE: 0.25}
        await asyncio.wait_for(asked.wait(), 10)
        await asyncio.sleep(0)
    assert weights() == {ALICE: 0.25}
    await store.close()
