"""Tenants' weights for planning, as they stand in the store.

Asking costs nothing: the answer is what was read last, and reading it again goes on beside the cycle. So a change made
by an operator takes effect within REFRESH_S, and a database that is away changes nobody's share.
Invariant: a weight is relative to the standard class, so that a tenant who is not in the answer has weight 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from treadle.domain.fairness import WeightClass
from treadle.domain.ids import TenantId
from treadle.errors import TreadleError
from treadle.store import Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# How long weights are believed: what an operator changes holds within a second, and reading few rows by an index that
# often is free.
REFRESH_S = 0.5


class TenantWeights:
    """Call it for the weights of all tenants that have one of their own. It belongs to the event loop it is used on."""

    def __init__(
        self,
        store: Store,
        weight_of: Mapping[WeightClass, float],
        *,
        monotonic: Callable[[], float],
    ) -> None:
        """weight_of: the share of each class, positive; only ratios count. monotonic: seconds."""
        assert all(weight_of[weight_class] > 0 for weight_class in WeightClass), weight_of
        self._store = store
        standard = weight_of[WeightClass.STANDARD]
        self._weight_of = {weight_class: weight / standard for weight_class, weight in weight_of.items()}
        self._monotonic = monotonic
        self._weights: Mapping[TenantId, float] = {}
        self._believed_until = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    def __call__(self) -> Mapping[TenantId, float]:
        """What was read last, which is nothing at first; starts to read again when that is old."""
        if self._monotonic() >= self._believed_until and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read_or_keep(), name="tenant-weights")
        return self._weights

    async def read(self) -> Mapping[TenantId, float]:
        """The weights as the store has them now. Raises StoreUnavailable."""
        classes = await self._store.tenants.classes()
        self._weights = {tenant_id: self._weight_of[weight_class] for tenant_id, weight_class in classes.items()}
        self._believed_until = self._monotonic() + REFRESH_S
        return self._weights

    async def _read_or_keep(self) -> None:
        try:
            await self.read()
        except TreadleError as error:
            log.warning("weights not read", reason=error.message)
            self._believed_until = self._monotonic() + REFRESH_S
