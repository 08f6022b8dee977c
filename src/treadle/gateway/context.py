"""What every route of one gateway shares, found through the request.

It holds the parts and owns the decoding threads; it decides nothing. Invariant: one per app, alive between
`start` and `stop`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from starlette.datastructures import Headers
from starlette.requests import Request

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.outcome import PoolFacts
from treadle.domain.pool_decisions import PoolState
from treadle.domain.usage import SampleUsage
from treadle.errors import Draining, Forbidden, InvalidRequest, NotFound, PoolLoading, Unauthenticated
from treadle.gateway.access import Access
from treadle.gateway.admission import Admission
from treadle.gateway.auth import Authenticator, Principal
from treadle.gateway.backlog import Backlog, BacklogLimits
from treadle.gateway.bodies import BodyRoom, room_of
from treadle.gateway.chat.sessions import TextSessions
from treadle.gateway.chat.tokenizers import Tokenizers
from treadle.gateway.deps import GatewayDeps, GatewaySettings, PoolView
from treadle.gateway.failed_logins import FailedLogins
from treadle.gateway.futures import FuturesHub
from treadle.gateway.losses import LossDesk
from treadle.gateway.named_losses import LossReviews
from treadle.gateway.quotas import TenantQuotas
from treadle.gateway.signing import Signer
from treadle.store.policy_watch import PolicyWatch
from treadle.telemetry.context import bind_context

T = TypeVar("T")


class Gateway:
    """The parts of one gateway."""

    def __init__(self, deps: GatewayDeps) -> None:
        self.deps = deps
        self.settings = deps.settings
        self.store = deps.store
        self.policies = deps.policies or PolicyWatch(deps.store)
        self.signer = Signer(store=deps.store, clock=deps.clock)
        self.auth = Authenticator(
            store=deps.store, settings=deps.settings, clock=deps.clock, signer=self.signer, policies=self.policies
        )
        self.failed_logins = FailedLogins(
            max_per_minute=deps.settings.max_failed_logins_per_minute,
            monotonic=deps.clock.monotonic,
            metrics=deps.metrics,
        )
        self.access = Access(store=deps.store, clock=deps.clock)
        self.losses = LossDesk(store=deps.store, policies=self.policies, access=self.access)
        self.loss_reviews = LossReviews(store=deps.store, settings=deps.settings.losses)
        self.hub = FuturesHub(store=deps.store, is_draining=deps.is_draining, metrics=deps.metrics)
        self.body_room = BodyRoom(deps.settings.max_body_bytes_in_memory)
        self.backlog = Backlog(
            store=deps.store,
            limits=_backlog_limits(deps.settings),
            metrics=deps.metrics,
            clock=deps.clock,
            policies=lambda: self.policies.now,
        )
        self.quotas = TenantQuotas(
            store=deps.store,
            settings=deps.settings,
            policies=self.policies,
            backlog=self.backlog,
            pools=deps.pools,
            clock=deps.clock,
        )
        self.admission = Admission(store=deps.store, blobs=deps.blobs, backlog=self.backlog, metrics=deps.metrics)
        self.tokenizers = Tokenizers()
        self.text_sessions = TextSessions()
        self._end_showing: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Listen to committed rows. Called once, on the event loop that serves."""
        self._end_showing = self.deps.metrics.on_scrape(self._show_held)
        if self.deps.policies is None:
            await self.policies.start()
        await self.hub.start()
        await self.backlog.start()

    async def stop(self) -> None:
        """Let every waiter go and end the threads. Idempotent."""
        self._end_showing()
        await self.backlog.stop()
        await self.loss_reviews.stop()
        await self.hub.stop()
        await self.auth.close()
        if self.deps.policies is None:
            await self.policies.stop()
        self.admission.close()

    def _show_held(self) -> None:
        held = self.deps.metrics.held_calls
        held.labels(until="result").set(self.hub.num_waiters)
        held.labels(until="room").set(self.backlog.num_waiting)

    async def caller(self, request: Request) -> Principal:
        """Who sent a request that reads. Raises Unauthenticated."""
        principal = await self.logged_in(request, self.auth.principal)
        bind_context(tenant_id=principal.tenant_id)
        room_of(request.scope).caller_is(
            principal.tenant_id, ask_again=lambda: self.logged_in(request, self.auth.principal)
        )
        return principal

    async def logged_in(self, request: Request, ask: Callable[[Headers, str], Awaitable[T]]) -> T:
        """What the authenticator answers about the credential of a request, unless too many failed before it.

        ask: with the request's headers and the client's address.

        Raises Unauthenticated and TooManyFailedLogins.
        """
        self.failed_logins.check(request)
        try:
            answer = await ask(request.headers, "" if request.client is None else request.client.host)
        except Unauthenticated:
            self.failed_logins.failed(request)
            raise
        self.failed_logins.succeeded(request)
        return answer

    async def admin(self, request: Request) -> Principal:
        """Who sent a request of an operator. Raises Unauthenticated, and Forbidden for a key without that scope."""
        principal = await self.caller(request)
        if not principal.is_admin:
            raise Forbidden("this needs an admin key: create one with `treadle keys create USER --admin`")
        return principal

    async def submitter(self, request: Request) -> Principal:
        """Who sent a request that makes new work. Raises Unauthenticated, and Draining while the server stops."""
        if self.deps.is_draining():
            raise Draining("the server is stopping; ask again in a moment")
        return await self.caller(request)

    async def cancel_sample(self, request_id: RequestId, *, used: SampleUsage | None = None) -> None:
        """End a queued sample for which nobody waits any more. used: what its client got of it. Idempotent."""
        for key in await self.store.cycles.cancel_sample(request_id, used=used, policies=self.policies.now):
            await asyncio.to_thread(self.deps.blobs.delete, key)

    def pool_for(self, base_model: str) -> PoolView:
        """The pool that serves `base_model`, by its name or an alias. Raises NotFound, naming what is served."""
        pool = self.deps.pools.by_base_model(base_model)
        if pool is None:
            served = ", ".join(view.name for view in self.deps.pools.all())
            decision = self.deps.pools.decision(PoolName(base_model))
            why = "" if decision is None or not decision.reason else f" ({decision.reason})"
            raise NotFound(f"base model {base_model[:200]!r} is not served here{why}; served: {served}")
        return pool

    def pool_for_new(self, base_model: str) -> PoolView:
        """Like `pool_for`, for a new run or sampling session. Raises InvalidRequest too, while the pool takes none."""
        pool = self.pool_for(base_model)
        check_takes_new(pool)
        return pool


# What proxies add. Behind one on this machine, everybody seems to be here.
_OF_PROXIES = ("x-forwarded-for", "forwarded", "x-real-ip", "via")


def is_local_client(gateway: Gateway, request: Request) -> bool:
    """Whether a client on this machine asks a server that serves this machine alone, with no proxy in between."""
    if not gateway.settings.is_loopback or any(name in request.headers for name in _OF_PROXIES):
        return False
    return request.client is not None and request.client.host in ("127.0.0.1", "::1")


def check_takes_new(pool: PoolView) -> None:
    """Raises InvalidRequest when operators let no run and no sampling session begin in the pool."""
    if pool.state is PoolState.DRAINING:
        why = f": {pool.state_reason}" if pool.state_reason else ""
        raise InvalidRequest(f"base model {pool.name} takes no new runs and sampling sessions now{why}")


def loaded_facts(pool: PoolView) -> PoolFacts:
    """What the pool's worker reported. Raises PoolLoading until it has; the SDK then asks again."""
    if pool.facts is None:
        raise PoolLoading(f"base model {pool.name} is not loaded yet: {pool.reason or 'loading'}")
    return pool.facts


def _backlog_limits(settings: GatewaySettings) -> BacklogLimits:
    return BacklogLimits(
        tokens_of_tenant=settings.max_queued_tokens_per_tenant,
        bytes_of_tenant=settings.max_queued_bytes_per_tenant,
        tokens=settings.max_queued_tokens,
        bytes=settings.max_queued_bytes,
        sample_ops_of_tenant=settings.max_queued_samples_per_tenant,
    )


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves this request."""
    return cast(Gateway, request.app.state.gateway)
