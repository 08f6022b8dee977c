"""How much waits, as this gateway believes it, and whether that is too much.

What the table says is read now and then, with what this gateway admitted since counted on top. So asking costs no
query, a flood is noticed at once but for what is on its way in, and other gateways' work is seen at the next reading.
Samples and training ops are judged apart: an actor that fills its sampling queue must not slow its own trainer down.
Invariant: what this gateway admitted is never believed to be less than it is; for up to a reading it may be more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

from treadle.domain.backlog import Load, TenantBacklog
from treadle.domain.ids import PoolName, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.policy import Policies, Quota
from treadle.domain.quotas import at_limit
from treadle.domain.records import NewRequest
from treadle.domain.states import QueueState
from treadle.errors import TreadleError
from treadle.gateway.deps import Clock
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# How often the table is read while something waits.
READ_EVERY_S = 0.5
# The pause is also this many times what the reading took, so that a long queue costs a reader about 1 %.
PAUSE_PER_READING = 100.0
# At most this long: while nothing is read, what was done meanwhile still counts against the limits.
MAX_PAUSE_S = 10.0
# How often it is read while this gateway admits nothing, for what others admitted.
READ_IDLE_EVERY_S = 5.0
# Training ops are slowed down at the limits, and kept out (503, asked again) at this many times the limits.
HARD_FACTOR = 2
# Of a tenant with a rate, training ops are slowed down as soon as so many seconds of that rate wait: more would only be
# read by every cycle that passes it over. Never kept out for it, since a slow rate may mean minutes.
RATED_QUEUE_S = 15.0


@dataclass(slots=True)
class _Sum:
    """A Load that grows in place: one is added to with every request."""

    num_ops: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def load(self) -> Load:
        return Load(self.num_ops, self.num_tokens, self.num_bytes)


# Never added to.
_NOTHING = _Sum()


@dataclass(frozen=True, slots=True)
class _Admitted:
    """What a new row adds. Not the row, which holds its payload: many may come between two readings."""

    tenant_id: TenantId
    is_sample: bool
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BacklogLimits:
    """What may wait before clients are slowed down, samples and training ops apart.

    sample_ops_of_tenant: requests of any kind a tenant may have waiting before its samples are refused.
    """

    tokens_of_tenant: int
    bytes_of_tenant: int
    tokens: int
    bytes: int
    sample_ops_of_tenant: int


@dataclass(frozen=True, slots=True)
class Excess:
    """Which limit is reached, in words for the client, and what its SDK calls that."""

    state: QueueState
    words: str


class Backlog:
    """What waits. Reads in a task of its own between `start` and `stop`."""

    def __init__(
        self,
        *,
        store: Store,
        limits: BacklogLimits,
        metrics: Metrics,
        clock: Clock,
        policies: Callable[[], Policies] = Policies,
    ) -> None:
        """limits: of tenants for whom operators say nothing."""
        self.limits = limits
        self._policies = policies
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._entries: list[TenantBacklog] = []
        # By tenant and kind, and by kind; as the table had it, plus what was admitted here since it was read.
        self._loads: dict[Hashable, _Sum] = {}
        self._totals: dict[Hashable, _Sum] = {}
        self._since: list[_Admitted] = []
        self._may_have_changed = asyncio.Event()
        self._was_read = asyncio.Event()
        # Pools and kinds of work that the metrics have a series for.
        self._shown: set[tuple[PoolName, str]] = set()
        self._num_waiting = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what an earlier server left, and go on reading. Called once."""
        assert self._task is None, "started twice"
        self._may_have_changed.set()
        self._task = asyncio.create_task(self._run(), name="gateway-backlog")

    async def stop(self) -> None:
        """Stop reading, and let whoever waits for room look again. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self._wake()

    @property
    def num_waiting(self) -> int:
        """Calls that wait for room now."""
        return self._num_waiting

    def admitted(self, request: NewRequest) -> None:
        """A new row was committed by this gateway."""
        admitted = _Admitted(
            tenant_id=request.tenant_id,
            is_sample=request.kind is OpKind.SAMPLE,
            num_tokens=request.num_tokens,
            num_bytes=request.payload_bytes or len(request.payload),
        )
        self._since.append(admitted)
        self._count_admitted(admitted)
        self._may_have_changed.set()

    def of_tenant(self, tenant_id: TenantId) -> Mapping[bool, Load]:
        """What a tenant has waiting: samples under True, training ops under False."""
        return {is_sample: self._loads.get((tenant_id, is_sample), _NOTHING).load() for is_sample in (False, True)}

    def in_pool(self, pool: PoolName) -> list[TenantBacklog]:
        """What every tenant had waiting in a pool when the table was last read."""
        return [entry for entry in self._entries if entry.pool == pool]

    def limits_of(self, tenant_id: TenantId) -> BacklogLimits:
        """What a tenant may have waiting: what operators say of it, else what the server's settings say."""
        policies, limits = self._policies(), self.limits
        tokens, num_bytes = (policies.quota(tenant_id, quota) for quota in (Quota.QUEUED_TOKENS, Quota.QUEUED_BYTES))
        if tokens is None and num_bytes is None:
            return limits
        return replace(
            limits,
            tokens_of_tenant=limits.tokens_of_tenant if tokens is None else tokens,
            bytes_of_tenant=limits.bytes_of_tenant if num_bytes is None else num_bytes,
        )

    def _own(self, tenant_id: TenantId, quota: Quota, what: str, count: int, limit: int) -> Excess:
        words = f"{count:,} of your {what} wait; the limit is {limit:,}"
        if self._policies().quota(tenant_id, quota) is not None:
            words = at_limit(quota, words)
        return Excess(QueueState.PAUSED_RATE_LIMIT, words)

    def excess(self, tenant_id: TenantId, *, is_sample: bool, factor: int = 1) -> Excess | None:
        """The limit, times `factor`, that this tenant or all together have reached; None while there is room."""
        limits, own = self.limits_of(tenant_id), self._loads.get((tenant_id, is_sample), _NOTHING)
        total = self._totals.get(is_sample, _NOTHING)
        if own.num_tokens >= factor * limits.tokens_of_tenant:
            return self._own(tenant_id, Quota.QUEUED_TOKENS, "tokens", own.num_tokens, factor * limits.tokens_of_tenant)
        if own.num_bytes >= factor * limits.bytes_of_tenant:
            limit = factor * limits.bytes_of_tenant
            return self._own(tenant_id, Quota.QUEUED_BYTES, "bytes of requests", own.num_bytes, limit)
        if is_sample:
            num_ops = own.num_ops + self._loads.get((tenant_id, False), _NOTHING).num_ops
            if num_ops >= limits.sample_ops_of_tenant:
                words = f"{num_ops:,} of your requests wait; the limit is {limits.sample_ops_of_tenant:,}"
                return Excess(QueueState.PAUSED_RATE_LIMIT, words)
        if total.num_tokens >= factor * limits.tokens:
            return _shared("tokens", total.num_tokens, factor * limits.tokens)
        if total.num_bytes >= factor * limits.bytes:
            return _shared("bytes of requests", total.num_bytes, factor * limits.bytes)
        return None

    def too_far_ahead(self, tenant_id: TenantId, *, factor: int = 1) -> Excess | None:
        """Why a client is slowed down before its next training op: `excess`, or a queue too long for its rate."""
        return self.excess(tenant_id, is_sample=False, factor=factor) or (
            self._rate_excess(tenant_id) if factor == 1 else None
        )

    def _rate_excess(self, tenant_id: TenantId) -> Excess | None:
        """Whether as many tokens wait as a tenant's rate lets run in RATED_QUEUE_S; one op alone never does."""
        rate = self._policies().quota(tenant_id, Quota.TRAINED_PER_MINUTE)
        own = self._loads.get((tenant_id, False), _NOTHING)
        if rate is None or own.num_ops < 2 or own.num_tokens * 60 < rate * RATED_QUEUE_S:
            return None
        words = f"{own.num_tokens:,} of your tokens wait; {rate:,} a minute may run"
        return Excess(QueueState.PAUSED_RATE_LIMIT, at_limit(Quota.TRAINED_PER_MINUTE, words))

    async def wait_for_room(
        self, tenant_id: TenantId, *, hold_s: float, is_over: Callable[[], bool], factor: int = 1
    ) -> Excess | None:
        """None as soon as the tenant's training ops have room, or the limit that is still reached after `hold_s`.

        is_over: ends the wait early, when it is True at the next reading.
        """
        deadline = asyncio.get_running_loop().time() + hold_s
        while (excess := self.too_far_ahead(tenant_id, factor=factor)) is not None:
            remaining_s = deadline - asyncio.get_running_loop().time()
            if remaining_s <= 0 or is_over() or self._task is None:
                return excess
            self._num_waiting += 1
            try:
                async with asyncio.timeout(remaining_s):
                    await self._was_read.wait()
            except TimeoutError:
                return excess
            finally:
                self._num_waiting -= 1
        return None

    async def read(self) -> None:
        """Take over what the table says. Raises StoreUnavailable."""
        self._since.clear()
        self._entries = await self._store.backlog.read()
        self._loads, self._totals = {}, {}
        for entry in self._entries:
            load = entry.load
            self._count(entry.tenant_id, entry.is_sample, load.num_ops, load.num_tokens, load.num_bytes)
        # Committed while the table was read: perhaps in it, perhaps not. Counted twice rather than not at all.
        for admitted in self._since:
            self._count_admitted(admitted)
        self._show()

    def _wake(self) -> None:
        """Whoever waits for room looks again."""
        was_read, self._was_read = self._was_read, asyncio.Event()
        was_read.set()

    def _count_admitted(self, admitted: _Admitted) -> None:
        self._count(admitted.tenant_id, admitted.is_sample, 1, admitted.num_tokens, admitted.num_bytes)

    def _count(self, tenant_id: TenantId, is_sample: bool, num_ops: int, num_tokens: int, num_bytes: int) -> None:
        for sums, key in ((self._loads, (tenant_id, is_sample)), (self._totals, is_sample)):
            total = sums.get(key)
            if total is None:
                total = sums[key] = _Sum()
            total.num_ops += num_ops
            total.num_tokens += num_tokens
            total.num_bytes += num_bytes

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READ_IDLE_EVERY_S):
                    await self._may_have_changed.wait()
            self._may_have_changed.clear()
            began = asyncio.get_running_loop().time()
            try:
                await self.read()
            except TreadleError as error:
                log.warning("backlog not read", reason=error.message)
                self._may_have_changed.set()
            except Exception as error:  # noqa: BLE001 (background sweep: without readings, full queues would stay full)
                log.error("reading the backlog failed unexpectedly", exc=error)
                self._metrics.caught_errors.labels(boundary="sweep").inc()
                self._may_have_changed.set()
            if self._loads:
                self._may_have_changed.set()
            self._wake()
            took_s = asyncio.get_running_loop().time() - began
            await asyncio.sleep(min(MAX_PAUSE_S, max(READ_EVERY_S, PAUSE_PER_READING * took_s)))

    def _show(self) -> None:
        """Set the metrics; what was shown before and is gone becomes zero."""
        now = self._clock.now()
        loads = dict.fromkeys(self._shown, Load())
        ages = {pool: 0.0 for pool, _ in self._shown}
        for entry in self._entries:
            line = (entry.pool, "sampling" if entry.is_sample else "training")
            loads[line] = loads.get(line, Load()) + entry.load
            ages[entry.pool] = max(ages.get(entry.pool, 0.0), now - entry.oldest_at)
        for (pool, work), load in loads.items():
            self._metrics.queued_ops.labels(pool, work).set(load.num_ops)
            self._metrics.queued_tokens.labels(pool, work).set(load.num_tokens)
            self._metrics.queued_bytes.labels(pool, work).set(load.num_bytes)
        for pool, age_s in ages.items():
            self._metrics.queued_oldest_seconds.labels(pool).set(age_s)
        self._shown = set(loads)


def _shared(what: str, count: int, limit: int) -> Excess:
    return Excess(QueueState.PAUSED_CAPACITY, f"{count:,} {what} of all tenants wait; the limit is {limit:,}")
