"""What a gateway is given when it is built: its neighbours, its settings, and its view of the pools.

The composition root (server.py) fills this in; routes read it. Nothing here does I/O.
Invariant: a `GatewayDeps` never changes; what moves (pools loading, draining) is behind its callables.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from treadle.blobs import BlobStore
from treadle.config import AuthMethod, LossSettings, ModelScopeSettings
from treadle.domain import limits
from treadle.domain.ids import PoolName
from treadle.domain.outcome import PoolFacts
from treadle.domain.pool_decisions import PoolDecision, PoolDecisions, PoolState
from treadle.gateway.chat.live import LiveSamples
from treadle.store import Store
from treadle.store.policy_watch import PolicyWatch
from treadle.store.pool_watch import PoolWatch
from treadle.telemetry.metrics import Metrics


class Clock(Protocol):
    """Wall-clock time for stored and shown times, and monotonic time for cache lifetimes; both in seconds."""

    def now(self) -> float: ...

    def monotonic(self) -> float: ...


@dataclass(frozen=True, slots=True)
class PoolView:
    """One pool as a gateway sees it.

    aliases: other accepted values of base_model (the absolute directory of a local model).
    facts: None until its first worker has loaded the base model. reason: why it is not ready. source, revision: where
    its base model comes from. state, state_reason: what operators decided.
    """

    name: PoolName
    aliases: tuple[str, ...] = ()
    facts: PoolFacts | None = None
    is_ready: bool = False
    reason: str = ""
    source: str = ""
    revision: str | None = None
    state: PoolState = PoolState.SERVING
    state_reason: str = ""


class PoolDirectory:
    """The pools of this server, looked up by name or by a client's base_model. Those that operators removed are not
    there, from the moment on at which `watch` knows."""

    def __init__(
        self,
        views: Callable[[], Sequence[PoolView]],
        watch: PoolWatch | None = None,
        *,
        settings: Mapping[PoolName, tuple[str, str | None]] | None = None,
    ) -> None:
        """views: all that this server has. watch: what operators decided about them, kept up to date by its owner.

        settings: source and revision of the pools that this server was started with.
        """
        self._all_views = views
        self._watch = watch
        self._settings = settings or {}

    @property
    def decisions(self) -> PoolDecisions:
        """What operators decided, as it is known now."""
        return PoolDecisions() if self._watch is None else self._watch.now

    def decision(self, name: PoolName) -> PoolDecision | None:
        """What operators decided about the pool, which need not be served here."""
        return self.decisions.pools.get(name)

    def settings_of(self, name: PoolName) -> tuple[str, str | None] | None:
        """Source and revision of a pool that this server was started with, also of one that was removed."""
        return self._settings.get(name)

    async def refresh(self) -> None:
        """Know what was decided until now. Raises StoreUnavailable."""
        if self._watch is not None:
            await self._watch.refresh()

    def _views(self) -> Sequence[PoolView]:
        decided = self.decisions.pools
        if not decided:
            return self._all_views()
        views = [_as_decided(view, decided.get(view.name)) for view in self._all_views()]
        return [view for view in views if view.state is not PoolState.REMOVED]

    def all(self) -> tuple[PoolView, ...]:
        """All pools, in the order in which the operator named them."""
        return tuple(self._views())

    def by_base_model(self, base_model: str) -> PoolView | None:
        """The pool that serves `base_model` (its name or an alias), or None."""
        for view in self._views():
            if base_model == view.name or base_model in view.aliases:
                return view
        return None

    def by_name(self, name: PoolName) -> PoolView | None:
        """The pool called `name`, or None when this server does not have it."""
        return next((view for view in self._views() if view.name == name), None)


def _as_decided(view: PoolView, decision: PoolDecision | None) -> PoolView:
    return view if decision is None else replace(view, state=decision.state, state_reason=decision.reason)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Bounds and modes of one gateway; the reasons for the defaults stand in domain/limits.py.

    hold_s: how long a retrieve call waits before it answers 408 (the SDK gives up at 45 s).
    is_loopback: the server listens on a loopback address only. Without it no mode is ever open.
    auth_methods: how callers are recognised; empty: openly until the first key is created, then by keys.
    modelscope: how ModelScope is asked, for the method of that name.
    losses: where files of submitted losses come from, and whether they are executed.
    has_jwt: keys may be exchanged for tokens that live an hour.
    root_path: what every path begins with, "" or like "/twinkle".
    public_url: where clients reach this server, prefix included; None: where the request came to.
    """

    is_loopback: bool
    auth_methods: tuple[AuthMethod, ...] = ()
    modelscope: ModelScopeSettings = field(default_factory=ModelScopeSettings)
    losses: LossSettings = field(default_factory=LossSettings)
    has_jwt: bool = True
    root_path: str = ""
    public_url: str | None = None
    max_lora_rank: int = limits.MAX_LORA_RANK
    hold_s: float = limits.HOLD_S
    max_body_bytes: int = limits.MAX_BODY_BYTES
    max_decompressed_bytes: int = limits.MAX_DECOMPRESSED_BYTES
    max_datums_per_request: int = limits.MAX_DATUMS_PER_REQUEST
    max_num_samples: int = limits.MAX_NUM_SAMPLES
    # Back-pressure starts here: the SDK then resends the same sample every second, without a limit.
    max_queued_samples_per_tenant: int = 4_096
    max_queued_tokens_per_tenant: int = limits.MAX_QUEUED_TOKENS_PER_TENANT
    max_queued_bytes_per_tenant: int = limits.MAX_QUEUED_BYTES_PER_TENANT
    max_queued_tokens: int = limits.MAX_QUEUED_TOKENS
    max_queued_bytes: int = limits.MAX_QUEUED_BYTES
    max_body_bytes_in_memory: int = limits.MAX_BODY_BYTES_IN_MEMORY
    max_failed_logins_per_minute: int = limits.MAX_FAILED_LOGINS_PER_MINUTE


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether this server can serve, and if not, why (one short sentence per reason)."""

    is_ready: bool
    reasons: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class GatewayDeps:
    """Everything a gateway needs from outside.

    draw_seed: a fresh 63-bit seed for a request that came without one; it is stored in the row, so replay is exact.
    is_draining: True once the server is stopping: new work is refused, held polls are let go.
    policies: what operators decided, kept up to date by its owner; None: the gateway looks by itself.
    live: tokens of running samples, as far as this server's own workers draw them.
    """

    store: Store
    blobs: BlobStore
    clock: Clock
    pools: PoolDirectory
    settings: GatewaySettings
    readiness: Callable[[], Awaitable[Readiness]]
    is_draining: Callable[[], bool]
    draw_seed: Callable[[], int]
    metrics: Metrics
    live: LiveSamples = field(default_factory=LiveSamples)
    policies: PolicyWatch | None = None
