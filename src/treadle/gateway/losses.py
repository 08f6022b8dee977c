"""What the losses of passes stand for, and whether their sender may run them.

A name is a built-in loss, a traced one, or one that somebody submitted and an operator approved; a run's metadata may
say that one of the built-in names is another loss there. What was read of approved losses is believed until operators
change anything, which this process learns within a second. It refuses to know what a loss computes.
Invariant: a pass is admitted with exactly the loss that its sender named, or refused with what may be named instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from treadle.domain import loss_policy
from treadle.domain.custom_loss import CUSTOM, LossInput
from treadle.domain.ids import LossId, TenantId
from treadle.domain.losses import LOSSES, LossMeaning
from treadle.domain.named_losses import LossStatus, NamedLoss, check_name
from treadle.domain.ops import PassOp
from treadle.domain.records import ModelRecord
from treadle.errors import InvalidRequest
from treadle.gateway.access import Access
from treadle.gateway.auth import Principal
from treadle.gateway.caches import RecentRows
from treadle.store import Store
from treadle.store.policy_watch import PolicyWatch
from treadle.wire.graphs import read_inputs
from treadle.wire.passes import PassHead

# Checking a graph takes this many times as long as decoding a protobuf of as many bytes (measured: 6 ms for 50 KB).
GRAPH_DECODE_COST = 32
# Approved losses remembered, up to 64 KB each.
MAX_CACHED_NAMED_LOSSES = 256


@dataclass(frozen=True, slots=True)
class UsableLoss:
    """An approved named loss, as users see it. tenants: who may use it; None for all."""

    name: str
    inputs: tuple[LossInput, ...]
    definition_sha256: str
    tenants: tuple[TenantId, ...] | None


@dataclass(slots=True)
class _Known:
    """What was read while the operators' decisions were of this version."""

    version: int
    by_name: RecentRows[str, NamedLoss] = field(default_factory=lambda: RecentRows(MAX_CACHED_NAMED_LOSSES))
    usable: list[UsableLoss] | None = None


class LossDesk:
    """Answers for one gateway, on its event loop; `check` also in a thread."""

    def __init__(self, *, store: Store, policies: PolicyWatch, access: Access) -> None:
        self._store = store
        self._policies = policies
        self._access = access
        self._known = _Known(version=-1)

    async def meaning(self, principal: Principal, model: ModelRecord, head: PassHead) -> LossMeaning | None:
        """What a pass's loss_fn stands for in this run; None: the built-in loss of that name.

        Raises InvalidRequest for a loss that the caller may not run, NotFound for an unknown loss_id.
        """
        name = loss_policy.aliases_of(model.user_metadata).get(head.loss_fn, head.loss_fn)
        if name in loss_policy.RULED_LOSSES:
            await self._check_enabled(principal.tenant_id, name)
        if name in LOSSES:
            return None if name == head.loss_fn else LossMeaning(name)
        if name == CUSTOM:
            if head.custom_loss_id is None:
                return None
            record = await self._access.custom_loss(principal, LossId(head.custom_loss_id))
            return LossMeaning(CUSTOM, record.definition)
        loss = await self._approved(principal.tenant_id, name)
        return LossMeaning(name, loss.definition, loss.definition_sha256)

    def check(self, tenant_id: TenantId, op: PassOp) -> None:
        """Raise InvalidRequest for a pass with a setting out of the tenant's bounds, or an operation that is switched
        off by now."""
        policies = self._policies.now
        if op.loss.custom is not None:
            loss_policy.check_operations(op.loss.custom, policies.disabled_operations)
        else:
            loss_policy.check_bounds(op, loss_policy.bounds_of(policies, tenant_id, op.loss.name))

    async def check_traced(self, tenant_id: TenantId) -> None:
        """Raise InvalidRequest when the tenant may not run traced losses."""
        await self._check_enabled(tenant_id, CUSTOM)

    async def check_metadata(self, tenant_id: TenantId, metadata: Mapping[str, str]) -> None:
        """Raise InvalidRequest when a new run's metadata name a loss that its passes could not be computed with."""
        for name, loss in loss_policy.aliases_of(metadata).items():
            try:
                if loss in LOSSES:
                    await self._check_enabled(tenant_id, loss)
                else:
                    await self._approved(tenant_id, loss)
            except InvalidRequest as refusal:
                key = loss_policy.ALIAS_PREFIX + name
                raise InvalidRequest(f"user_metadata {key!r}: {refusal.message}") from None

    async def usable(self, tenant_id: TenantId) -> list[UsableLoss]:
        """The named losses that a tenant may run, by name."""
        known = self._current()
        if known.usable is None:
            known.usable = [
                UsableLoss(loss.name, read_inputs(loss.definition), loss.definition_sha256, loss.tenants)
                for loss in await self._store.named_losses.all_approved()
            ]
        return [loss for loss in known.usable if loss.tenants is None or tenant_id in loss.tenants]

    async def _check_enabled(self, tenant_id: TenantId, name: str) -> None:
        if not loss_policy.is_enabled(self._policies.now, tenant_id, name):
            raise loss_policy.not_enabled(name, await self._enabled(tenant_id))

    async def _approved(self, tenant_id: TenantId, name: str) -> NamedLoss:
        """The approved loss of a name. Raises InvalidRequest when the tenant has none."""
        try:
            # Also because no database is asked about anything that cannot be a name.
            check_name(name)
        except InvalidRequest:
            raise loss_policy.not_enabled(name, await self._enabled(tenant_id)) from None
        known = self._current()
        loss = known.by_name.get(name) or await self._store.named_losses.approved(name, tenant_id)
        if loss is not None:
            known.by_name.put(name, loss)
            if loss.is_for(tenant_id):
                return loss
        note = await self._note_of_submission(tenant_id, name)
        raise loss_policy.not_enabled(name, await self._enabled(tenant_id), note=note)

    async def _note_of_submission(self, tenant_id: TenantId, name: str) -> str:
        """For a refusal: where the tenant's own submission of this name stands, or why another's was revoked."""
        submission = await self._store.named_losses.newest(name, tenant_id)
        if submission is not None and submission.status is not LossStatus.APPROVED:
            said = f": {submission.reason}" if submission.reason else ""
            return f"your submission of it is {submission.status}{said}"
        reason = await self._store.named_losses.reason_of_revocation(name, tenant_id)
        if reason is None:
            return ""
        return "it was revoked" + (f": {reason}" if reason else "")

    async def _enabled(self, tenant_id: TenantId) -> Sequence[str]:
        names = loss_policy.enabled_losses(self._policies.now, tenant_id)
        return [*names, *(loss.name for loss in await self.usable(tenant_id))]

    def _current(self) -> _Known:
        version = self._policies.now.version
        if self._known.version != version:
            self._known = _Known(version)
        return self._known
