"""Who presents one unknown key after another: after many of them, the next ones are not even looked up.

It counts per client address (docs/security.md says what that is behind a proxy) and refuses to judge keys: what passes
here is checked like everything else. Invariant: a credential that was good a moment ago is never held up, whatever else
comes from its address.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from starlette.requests import HTTPConnection

from treadle.domain.addresses import network_of
from treadle.domain.limits import MAX_REMEMBERED_ADDRESSES
from treadle.errors import TooManyFailedLogins
from treadle.gateway.caches import RecentRows
from treadle.telemetry.metrics import Metrics

# Where credentials may stand.
_HEADERS = frozenset({b"x-api-key", b"twinkle-authorization", b"authorization"})


class FailedLogins:
    """One gateway's count: a bucket of `max_per_minute` failures for each address, filled up again at that pace."""

    def __init__(self, *, max_per_minute: int, monotonic: Callable[[], float], metrics: Metrics) -> None:
        self._capacity = float(max_per_minute)
        self._monotonic = monotonic
        self._metrics = metrics
        # Of addresses with failures: how much room was left, and when.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        # Hashes of credentials that were good, which tell nothing about them. Everybody's, of any address.
        self._good: RecentRows[int, bool] = RecentRows(MAX_REMEMBERED_ADDRESSES)

    def check(self, request: HTTPConnection) -> None:
        """Raise TooManyFailedLogins where too many credentials failed and this one is not known to be good."""
        if self._left and self._left_of(_address(request)) < 1 and not self._good.get(_presented(request)):
            raise TooManyFailedLogins(
                f"more than {self._capacity:.0f} requests a minute came from your address with keys that are not known "
                "here; check your key, and try again in a moment"
            )

    def succeeded(self, request: HTTPConnection) -> None:
        """What it presents is good."""
        self._good.put(_presented(request), True)

    def failed(self, request: HTTPConnection) -> None:
        """What it presents is known to nobody, or is no credential."""
        self._metrics.failed_logins.inc()
        self._good.forget(_presented(request))
        address = _address(request)
        self._left[address] = max(0.0, self._left_of(address) - 1), self._monotonic()
        self._left.move_to_end(address)
        while len(self._left) > MAX_REMEMBERED_ADDRESSES:
            self._left.popitem(last=False)

    def _left_of(self, address: str) -> float:
        left, at = self._left.get(address, (self._capacity, 0.0))
        if left >= self._capacity:
            return left
        left += (self._monotonic() - at) * self._capacity / 60
        if left >= self._capacity:
            del self._left[address]
        return min(left, self._capacity)


def _address(request: HTTPConnection) -> str:
    return "" if request.client is None else network_of(request.client.host)


def _presented(request: HTTPConnection) -> int:
    return hash(tuple((name, value) for name, value in request.scope["headers"] if name in _HEADERS))
