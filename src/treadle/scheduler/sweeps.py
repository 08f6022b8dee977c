"""Background sweeps: what may be forgotten is, by stated rules. Each sweep is idempotent and bounded.

Results go ten minutes after they were first delivered, or a day after they were made when nobody fetched them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from treadle.domain.limits import (
    MAX_ROWS_PER_SWEEP,
    RESULT_KEPT_AFTER_DELIVERY_S,
    RESULT_KEPT_UNDELIVERED_S,
    SWEEP_INTERVAL_S,
)
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)


async def sweep_forever(store: Store, *, clock: Callable[[], float], metrics: Metrics) -> None:
    """Sweep once per interval until cancelled."""
    while True:
        await asyncio.sleep(SWEEP_INTERVAL_S)
        try:
            await sweep_results(store, now=clock())
        except Exception as error:  # noqa: BLE001 (background sweep: what is left is swept the next time)
            log.error("sweep failed", exc=error)
            metrics.caught_errors.labels("sweep").inc()


async def sweep_results(store: Store, *, now: float) -> int:
    """Drop results whose time is over; how many went. Their requests stay, as expired."""
    num_dropped = 0
    while True:
        dropped = await store.requests.sweep(
            delivered_before=now - RESULT_KEPT_AFTER_DELIVERY_S, undelivered_before=now - RESULT_KEPT_UNDELIVERED_S
        )
        num_dropped += dropped
        if dropped < MAX_ROWS_PER_SWEEP:
            return num_dropped
