"""On which worker a tenant's runs live: all on one, chosen when it first has something to run.

Tenant-parallel: every worker holds the whole base model, so no tenant needs two. There is nothing to import yet, since
a pool of today has one worker; this is the rule that a later one should beat. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping


def choose_worker(num_tenants: Mapping[int, int], queued_tokens: Mapping[int, int]) -> int:
    """The worker, out of the keys, with the fewest tenants, then with the least waiting, then the first.

    Not the other way round: a queue is empty for a moment on every worker, and whoever came in that moment would all
    go there (in simulations of 1,000 tenants on 8 workers, half of them on one).
    """
    assert num_tenants, "no worker is left"
    return min(num_tenants, key=lambda index: (num_tenants[index], queued_tokens.get(index, 0), index))
