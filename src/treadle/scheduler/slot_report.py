"""Tells the store what the worker holds, so that any server can show it.

It refuses to know who looks. Invariant: nothing is written while nothing changes, and at most once in REPORT_EVERY_S.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from treadle.domain.records import LeaseRecord
from treadle.errors import Fenced, ServerError
from treadle.store import Store
from treadle.store.slots import Slots
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

REPORT_EVERY_S = 1.0


async def report_slots(store: Store, lease: LeaseRecord, slots: Callable[[], Slots]) -> None:
    """Report for as long as it is not cancelled. Raises Fenced when another leader took over."""
    reported: Slots | None = None
    is_away = False
    while True:
        found = slots()
        if found != reported:
            try:
                await store.slots.publish(lease, found)
                reported, is_away = found, False
            except Fenced:
                raise
            except ServerError as error:
                if not is_away:
                    log.warning("slots not reported", pool=lease.pool, reason=error.message)
                is_away = True
        await asyncio.sleep(REPORT_EVERY_S)
