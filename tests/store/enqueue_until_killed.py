"""A process for test_store_writer.py: enqueue for ever, and print each seq_id once its row is acknowledged."""

from __future__ import annotations

import asyncio
import sys
from itertools import count

from store_builders import op, with_run

from treadle.store import Store


async def enqueue_until_killed(url: str) -> None:
    store = await Store.open(url)
    await with_run(store)

    async def client(first_seq_id: int) -> None:
        for seq_id in count(first_seq_id, 4):
            await store.requests.enqueue(op(seq_id, payload=str(seq_id).encode()))
            print(seq_id, flush=True)

    await asyncio.gather(*(client(n) for n in range(1, 5)))


if __name__ == "__main__":
    asyncio.run(enqueue_until_killed(sys.argv[1]))
