"""Who may make this server call an outside service, and how often: calls at once, and unknown tokens per address.

It refuses to know what is called. Invariants: strangers never hold every slot, so that what is known can always be
asked about again; one address takes no more than its rate, whatever it sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from treadle.domain.addresses import network_of
from treadle.domain.limits import MAX_REMEMBERED_ADDRESSES
from treadle.errors import AuthUnavailable
from treadle.gateway.caches import RecentRows
from treadle.gateway.deps import Clock

# Strangers that may wait for a slot; each of them is an open request.
_MAX_WAITING = 64
# So many minutes' worth an address may ask at once, after a pause: everybody in one office, in the morning.
_BURST_MINUTES = 1.0


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class AddressRates:
    """A token bucket for each client address."""

    def __init__(self, *, per_minute: int, clock: Clock) -> None:
        self._per_second = per_minute / 60
        self._burst = per_minute * _BURST_MINUTES
        self._clock = clock
        # With more of them, the oldest begin anew, and the slots are the bound.
        self._buckets: RecentRows[str, _Bucket] = RecentRows(MAX_REMEMBERED_ADDRESSES)

    def take(self, address: str) -> None:
        """One more question for this address. Raises AuthUnavailable when it has had its share."""
        bucket = self._filled(network_of(address))
        if bucket.tokens < 1:
            raise AuthUnavailable(
                "too many unknown tokens came from your address; tokens that this server knows still work: try again "
                "in a minute"
            )
        bucket.tokens -= 1

    def give_back(self, address: str) -> None:
        """The last question was a good one, and is not counted."""
        bucket = self._filled(network_of(address))
        bucket.tokens = min(self._burst, bucket.tokens + 1)

    def _filled(self, network: str) -> _Bucket:
        now = self._clock.monotonic()
        bucket = self._buckets.get(network)
        if bucket is None:
            bucket = _Bucket(self._burst, now)
            self._buckets.put(network, bucket)
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._per_second)
        bucket.filled_at = now
        return bucket


class CallSlots:
    """Calls at once: `total`, of which strangers get three quarters at most."""

    def __init__(self, total: int) -> None:
        assert total > 1, total
        self._all = asyncio.Semaphore(total)
        self._for_strangers = asyncio.Semaphore(total - max(1, total // 4))
        self._num_waiting = 0

    @asynccontextmanager
    async def one(self, *, is_known: bool, within_s: float) -> AsyncIterator[None]:
        """A slot, for the block. is_known: it is about a token that was good. Raises AuthUnavailable without one."""
        async with AsyncExitStack() as held:
            await self._wait(held, is_known=is_known, within_s=within_s)
            yield

    async def _wait(self, held: AsyncExitStack, *, is_known: bool, within_s: float) -> None:
        if not is_known and self._num_waiting >= _MAX_WAITING:
            raise AuthUnavailable("too many unknown tokens are being checked; try again in a moment")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(within_s):
                if not is_known:
                    await held.enter_async_context(self._for_strangers)
                await held.enter_async_context(self._all)
        except TimeoutError:
            raise AuthUnavailable("too many tokens are being checked; try again in a moment") from None
        finally:
            self._num_waiting -= 1
