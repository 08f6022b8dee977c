"""One of several processes that fight for a lease: `fight_for_lease.py URL INDEX`.

While it leads it raises the pool's cycle number by one per fenced write, reading it first; it takes the lease over
whenever it has lost it. It says when it is there, begins when a line comes in, and prints how many writes were
committed and how many were refused.
"""

from __future__ import annotations

import asyncio
import sys

from scheduler_support import POOL

from treadle.domain.records import LeaseRecord
from treadle.errors import Fenced
from treadle.store import Store

NUM_WRITES = 40
HOLDER = "a fighter"


async def fight(url: str, index: int) -> None:
    store = await Store.open(url)
    # Starting takes far longer than the fight: without this they would come one after the other.
    sys.stdout.write("here\n")
    sys.stdout.flush()
    sys.stdin.readline()
    lease: LeaseRecord | None = None
    num_written = num_refused = 0
    while num_written < NUM_WRITES:
        if lease is None:
            # All of one name: each may take over from the others at any moment.
            lease = await store.leases.acquire(POOL, HOLDER, 60.0)
            assert lease is not None
            cycle = lease.cycle
        try:
            # Between the reading and the writing, another one may have taken over and written.
            await asyncio.sleep(0.001 * index)
            await store.cycles.begin(lease, cycle + 1, [])
        except Fenced:
            num_refused += 1
            lease = None
        else:
            cycle += 1
            num_written += 1
    await store.close()
    sys.stdout.write(f"{num_written} {num_refused}\n")


asyncio.run(fight(sys.argv[1], int(sys.argv[2])))
