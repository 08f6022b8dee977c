"""Secrets: made once, by whoever is first, and the same for all."""

from __future__ import annotations

import asyncio
import itertools

from treadle.store import Store


async def test_a_secret_is_made_once(store: Store) -> None:
    made = itertools.count()
    first = await store.secrets.get_or_create("urls", lambda: f"value {next(made)}")
    again = await store.secrets.get_or_create("urls", lambda: f"value {next(made)}")
    assert first == again == "value 0"
    assert await store.secrets.get_or_create("tokens", lambda: "other") == "other"


async def test_two_servers_that_make_one_at_the_same_time_agree(store: Store, database_url: str) -> None:
    other = await Store.open(database_url)
    try:
        values = await asyncio.gather(
            *(
                part.secrets.get_or_create("urls", lambda number=number: f"value {number}")
                for number in range(8)
                for part in (store, other)
            )
        )
    finally:
        await other.close()
    assert len(set(values)) == 1
