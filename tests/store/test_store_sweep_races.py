"""Sweeps beside another server's write to the same row, which only PostgreSQL has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import psycopg
import pytest
from store_builders import checkpoint, lead, with_run

from treadle.domain.records import FinishedCycle
from treadle.store import Store
from treadle.store.engine import T
from treadle.testing.clock import ManualClock

pytestmark = pytest.mark.postgres


@pytest.fixture
async def store(postgres_url: str, clock: ManualClock) -> AsyncIterator[Store]:
    store = await Store.open(postgres_url, clock=clock.now)
    yield store
    await store.close()


async def beside(url: str, statement: str, work: Awaitable[T]) -> T:
    """What `work` returns that comes upon a row which another transaction has changed and then commits."""
    async with await psycopg.AsyncConnection.connect(url.replace("+psycopg", "")) as other:
        await other.execute(statement.encode())
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait([task], timeout=0.5)
        assert not done, "it did not wait"
        await other.commit()
    return await task


async def test_a_save_that_takes_an_expired_name_again_stays(
    store: Store, postgres_url: str, clock: ManualClock
) -> None:
    await with_run(store)
    record = checkpoint(expires_at=clock.now() - 10.0)
    await store.cycles.finish(await lead(store), FinishedCycle(checkpoints=(record,)))
    sweep = store.retention.drop_checkpoints(expired_before=clock.now())
    assert await beside(postgres_url, "UPDATE checkpoints SET expires_at = NULL, blob_key = 'new'", sweep) == (0, ())
    assert await store.checkpoints.exists(record.tinker_path)


async def test_a_record_that_a_pass_uses_stays(store: Store, postgres_url: str, clock: ManualClock) -> None:
    await with_run(store)
    values = "('q', session_id, tenant_id, 0, 1, '', '')"
    async with await psycopg.AsyncConnection.connect(postgres_url.replace("+psycopg", "")) as other:
        columns = "sequence_id, session_id, tenant_id, last_used_at, num_prompt_tokens, tokens, logprobs"
        await other.execute(f"INSERT INTO stability_records ({columns}) SELECT {values[1:-1]} FROM sessions".encode())
    sweep = store.stability.forget(unused_since=clock.now())
    assert await beside(postgres_url, f"UPDATE stability_records SET last_used_at = {clock.now()}", sweep) == 0
