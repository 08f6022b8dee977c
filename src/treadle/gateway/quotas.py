"""A tenant's quotas as a gateway applies them: operators' limits within the server's own, and what is used of each.

It refuses to count runs, checkpoints and tokens itself: the store does, where they are written. Invariants: no limit is
above what the server's settings allow; whoever is refused is told the quota, its value, what is used, and whom to ask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from treadle.domain.ids import TenantId
from treadle.domain.policy import Quota
from treadle.domain.quotas import MAX_QUOTA, QUOTAS, at_limit
from treadle.domain.rates import RateKind, RateUse
from treadle.errors import InvalidRequest, QueueFull
from treadle.gateway.backlog import Backlog
from treadle.gateway.deps import Clock, GatewaySettings, PoolDirectory
from treadle.store import Store
from treadle.store.policy_watch import PolicyWatch
from treadle.wire.passes import PassLimits

# Where a limit comes from that no operator set.
SERVER = "server"


@dataclass(frozen=True, slots=True)
class Limit:
    """What a tenant may have. scope: who says so: "tenant:...", "organization:...", "default" or "server"."""

    value: int
    scope: str


@dataclass(frozen=True, slots=True)
class Standing:
    """One quota of one tenant. limit None: unlimited. used: None for what is judged request by request.

    room_at: of a rate that is used up, when there is room again, in epoch seconds.
    """

    quota: Quota
    limit: Limit | None
    used: int | None = None
    room_at: float | None = None


class TenantQuotas:
    """See the module."""

    def __init__(
        self,
        *,
        store: Store,
        settings: GatewaySettings,
        policies: PolicyWatch,
        backlog: Backlog,
        pools: PoolDirectory,
        clock: Clock,
    ) -> None:
        self._store = store
        self._settings = settings
        self._policies = policies
        self._backlog = backlog
        self._pools = pools
        self._clock = clock
        # Samples that were let in and are not counted as waiting yet.
        self._entering: Counter[TenantId] = Counter()

    def limit(self, tenant_id: TenantId, quota: Quota) -> Limit | None:
        """The limit of a tenant, None where there is none."""
        most, default = self.most(quota), self.default(quota)
        policies = self._policies.now
        for scope in policies.scopes_of(tenant_id):
            if (value := policies.quotas.get(scope, {}).get(quota)) is not None:
                return Limit(min(value, most), scope)
        return None if default is None else Limit(default, SERVER)

    def default(self, quota: Quota) -> int | None:
        """What the server's settings say for tenants for whom no operator says anything."""
        settings = self._settings
        return {
            Quota.RANK: settings.max_lora_rank,
            Quota.QUEUED_TOKENS: settings.max_queued_tokens_per_tenant,
            Quota.QUEUED_BYTES: settings.max_queued_bytes_per_tenant,
            Quota.SAMPLES: settings.max_queued_samples_per_tenant,
        }.get(quota)

    def most(self, quota: Quota) -> int:
        """What an operator may set at most: the server's settings and models allow no more."""
        settings = self._settings
        if quota is Quota.CONTEXT:
            facts = [pool.facts for pool in self._pools.all()]
            known = [one.max_context_length for one in facts if one is not None]
            return max(known) if known and len(known) == len(facts) else MAX_QUOTA
        return {
            Quota.RANK: settings.max_lora_rank,
            Quota.QUEUED_TOKENS: settings.max_queued_tokens,
            Quota.QUEUED_BYTES: settings.max_queued_bytes,
            Quota.SAMPLES: settings.max_queued_samples_per_tenant,
        }.get(quota, MAX_QUOTA)

    def checked(self, changes: Mapping[str, int | None]) -> dict[Quota, int | None]:
        """An operator's limits by name, None to unset one. Raises InvalidRequest, naming what may be set."""
        checked: dict[Quota, int | None] = {}
        for name, value in changes.items():
            quota = Quota(name)
            lowest, most = QUOTAS[quota].lowest, self.most(quota)
            if value is not None and value < lowest:
                raise InvalidRequest(f"{quota}={value} is below {lowest}, the lowest value of this quota")
            if value is not None and value > most:
                whose = "the models of this server" if quota is Quota.CONTEXT else "this server's settings"
                raise InvalidRequest(f"{quota}={value} is above {most}, which {whose} allow at most")
            checked[quota] = value
        return checked

    def check_rank(self, tenant_id: TenantId, rank: int) -> None:
        """Raises InvalidRequest for a rank that the tenant's quota does not allow."""
        limit = self.limit(tenant_id, Quota.RANK)
        assert limit is not None, "the server has one"
        if rank > limit.value and limit.scope != SERVER:
            raise InvalidRequest(at_limit(Quota.RANK, f"rank {rank} is asked for, and your limit is {limit.value}"))

    def max_models(self, tenant_id: TenantId) -> int | None:
        """How many runs may be alive; None: any number."""
        limit = self.limit(tenant_id, Quota.MODELS)
        return None if limit is None else limit.value

    def within_context(self, tenant_id: TenantId, limits: PassLimits) -> PassLimits:
        """What a pool can take, and the tenant may send."""
        limit = self.limit(tenant_id, Quota.CONTEXT)
        if limit is None or limit.value >= limits.max_context_length:
            return limits
        note = "; " + at_limit(Quota.CONTEXT, f"your limit is {limit.value:,} tokens")
        return PassLimits(limits.vocab_size, limit.value, context_note=note)

    @asynccontextmanager
    async def entering(self, tenant_id: TenantId, num_samples: int = 1) -> AsyncIterator[None]:
        """Let so many sample requests in; inside, they become rows. Raises QueueFull when they have to come later."""
        if (excess := self._backlog.excess(tenant_id, is_sample=True)) is not None:
            # The SDK stops sending for a second or five, then sends the same sample again, as often as it takes.
            raise QueueFull(excess.words)
        await self._check_rate(tenant_id)
        await self._check_concurrent(tenant_id, num_samples)
        self._entering[tenant_id] += num_samples
        try:
            yield
        finally:
            self._entering[tenant_id] -= num_samples
            if not self._entering[tenant_id]:
                del self._entering[tenant_id]

    async def _check_rate(self, tenant_id: TenantId) -> None:
        use = await self.used_up(tenant_id, RateKind.SAMPLING)
        if use is not None:
            raise QueueFull(self.words_of(use))

    async def _check_concurrent(self, tenant_id: TenantId, num_samples: int) -> None:
        limit = self.limit(tenant_id, Quota.SAMPLES)
        if limit is None or limit.scope == SERVER:
            return
        room = limit.value - num_samples
        if self._backlog.of_tenant(tenant_id)[True].num_ops + self._entering[tenant_id] <= room:
            return
        # What is remembered may count samples that are over by now.
        num_open = await self._store.quotas.num_samples(tenant_id) + self._entering[tenant_id]
        if num_open > room:
            what = f"you have {num_open:,} of {limit.value:,} samples waiting or running"
            raise QueueFull(at_limit(Quota.SAMPLES, what, advice="wait for one"))

    async def used_up(self, tenant_id: TenantId, kind: RateKind) -> RateUse | None:
        """The rate that a tenant has used up, and that is open again last; None while there is room in all."""
        uses = (await self._store.rates.uses(self._policies.now, kind, [tenant_id])).get(tenant_id, ())
        return max((use for use in uses if use.room <= 0), key=lambda use: use.opens_at, default=None)

    def words_of(self, use: RateUse) -> str:
        """Why work has to wait for a rate, for its owner."""
        wait_s = max(1.0, use.opens_at - self._clock.now())
        at = datetime.fromtimestamp(use.opens_at, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        what = f"{round(use.used):,} of {use.limit:,} tokens are used; there is room in {wait_s:,.0f} s, at {at}"
        return at_limit(use.quota, what)

    async def standings(self, tenant_id: TenantId) -> list[Standing]:
        """All quotas of a tenant and what it uses now."""
        using = await self._store.quotas.using(tenant_id)
        used: dict[Quota, int] = {
            Quota.MODELS: using.num_models,
            Quota.SAMPLES: using.num_samples,
            Quota.CHECKPOINTS: using.saved.num,
            Quota.CHECKPOINT_BYTES: using.saved.num_bytes,
        }
        waiting = self._backlog.of_tenant(tenant_id)
        used[Quota.QUEUED_TOKENS] = max(load.num_tokens for load in waiting.values())
        used[Quota.QUEUED_BYTES] = max(load.num_bytes for load in waiting.values())
        uses: dict[Quota, RateUse] = {}
        for kind in RateKind:
            rates = await self._store.rates.uses(self._policies.now, kind, [tenant_id])
            uses.update({use.quota: use for use in rates.get(tenant_id, ())})
        return [self._standing(tenant_id, quota, used, uses) for quota in Quota]

    def _standing(
        self, tenant_id: TenantId, quota: Quota, used: Mapping[Quota, int], uses: Mapping[Quota, RateUse]
    ) -> Standing:
        limit = self.limit(tenant_id, quota)
        if (use := uses.get(quota)) is not None:
            return Standing(quota, limit, round(use.used), use.opens_at if use.room <= 0 else None)
        return Standing(quota, limit, used.get(quota))
