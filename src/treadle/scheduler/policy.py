"""Which ops run in the next cycle: order, holes, budget and fairness between tenants.

Pure and deterministic: no clock, no database, no tensors, no randomness; the order of the input does not matter.
It knows nothing about workers or payloads. Invariant: the plan is empty only if nothing may run.

Fairness is a weighted deficit scheme in tokens. A tenant's deficit is what a perfectly divisible device would have
given it minus what it got. The next quantum is that of the tenant which, given its share from now on, would be done
with it first; after the cycle the tokens served are shared out on paper (`_settle`) and the differences carried over.
So over time every waiting tenant gets tokens in proportion to its weight, whatever the sizes of its requests. In
simulations the distance from the exact share stays below two times (budget + largest quantum). Nobody starves, since
a deficit grows with every cycle that passes its owner by.
It is deficit round-robin (Shreedhar, Varghese 1995) in the order of fair queueing (Demers, Keshav, Shenker 1989).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from treadle.domain.ids import ModelId, TenantId
from treadle.domain.limits import MAX_OPS_PER_CYCLE
from treadle.domain.plan import CyclePlan, PlannedOp, PolicyInput, PolicyState
from treadle.scheduler.line import PHASE_INDEX, Line

# Waiting steps, saves and set-ups may take this much of a cycle, so that they cannot keep passes out.
_MAX_FREE_HEADS: Final = MAX_OPS_PER_CYCLE // 2
# Of these, one tenant's while others wait: each costs milliseconds, and the others' cycle would be as long as they all.
_MAX_FREE_HEADS_PER_TENANT: Final = _MAX_FREE_HEADS // 4


def plan_cycle(policy_input: PolicyInput) -> tuple[CyclePlan, PolicyState]:
    """The next cycle, and the state to pass in when planning the one after it.

    The state must only be kept if the plan is run. Milliseconds for thousands of tenants.
    """
    assert policy_input.budget_tokens > 0
    assert policy_input.tenant_cap_tokens > 0
    tenants = _tenants_of(policy_input)
    cycle = _Cycle(budget=policy_input.budget_tokens, cap=policy_input.tenant_cap_tokens)
    last_tenant = policy_input.state.last_tenant
    suspect = _find_suspect(tenants, policy_input)
    if suspect is not None:
        cycle.serve_alone(*suspect, others=tenants)
    else:
        last_tenant = cycle.serve_free_heads(tenants, after=last_tenant)
        cycle.serve_passes(tenants)
    plan = _collect(tenants)
    assert plan.is_empty or len(plan.ops) <= MAX_OPS_PER_CYCLE
    assert plan.ops or all(line.head is None for tenant in tenants for line in tenant.lines), "work was left lying"
    state = PolicyState(
        deficits=_settle(tenants, cycle, policy_input),
        last_tenant=last_tenant,
        turns={tenant.tenant_id: tenant.turn for tenant in tenants if tenant.turn is not None},
    )
    return plan, state


@dataclass(slots=True)
class _Tenant:
    """A tenant while one cycle is planned. is_unmet: budget or op count, not its own cap or queue, ended its turn."""

    tenant_id: TenantId
    weight: float
    deficit: float
    lines: tuple[Line, ...]
    turn: ModelId | None
    served: int = 0
    is_unmet: bool = False

    def pass_lines(self) -> deque[Line]:
        """Lines with a pass at their head, the one whose turn it is first."""
        waiting = [line for line in self.lines if line.next_quantum_tokens is not None]
        start = bisect_left(waiting, self.turn, key=lambda line: line.model_id) if self.turn is not None else 0
        return deque(waiting[start:] + waiting[:start])

    def due(self, lines: Sequence[Line]) -> float:
        """When the next quantum would be done if the tenant had its share all the time; the least goes first."""
        tokens = lines[0].next_quantum_tokens
        assert tokens is not None
        return (self.served + tokens - self.deficit) / self.weight

    def waiting_tokens(self, *, limit: int) -> int:
        """Tokens that could run in this cycle, those served included; counting stops at `limit`."""
        tokens = self.served
        for line in self.lines:
            if tokens >= limit:
                break
            tokens += line.waiting_tokens(limit=limit - tokens)
        return tokens


@dataclass(slots=True)
class _Cycle:
    """What is left of the cycle under construction."""

    budget: int
    cap: int
    used: int = 0
    slots: int = MAX_OPS_PER_CYCLE

    def serve_alone(self, tenant: _Tenant, line: Line, *, others: Iterable[_Tenant]) -> None:
        """Plan the head of one line and nothing else; a pass within budget and cap, as ever."""
        assert line.head is not None
        for other in others:
            other.is_unmet = other is not tenant and bool(other.pass_lines())
        if line.has_free_head:
            line.take_free()
            return
        tokens = line.next_quantum_tokens
        while tokens is not None and self._has_room(line, tokens) and self._is_within_cap(tenant, tokens):
            self._take_quantum(tenant, line)
            tokens = line.next_quantum_tokens if line.is_extension() else None

    def serve_free_heads(self, tenants: Sequence[_Tenant], *, after: TenantId | None) -> TenantId | None:
        """Plan waiting ops without tokens, one per tenant in turn, oldest first within a tenant.

        Returns the tenant served last; the next cycle starts after it.
        """
        start = next((i for i, tenant in enumerate(tenants) if after is None or tenant.tenant_id > after), 0)
        turns: deque[tuple[TenantId, deque[Line]]] = deque()
        for tenant in (*tenants[start:], *tenants[:start]):
            free = [line for line in tenant.lines if line.has_free_head]
            if free:
                free.sort(key=lambda line: -line.head.queued_s if line.head else 0.0)
                turns.append((tenant.tenant_id, deque(free)))
        last = after
        spare = self.slots - _MAX_FREE_HEADS
        rounds_left = _MAX_FREE_HEADS_PER_TENANT if len(tenants) > 1 else _MAX_FREE_HEADS
        num_in_round = len(turns)
        while turns and self.slots > spare and rounds_left:
            last, lines = turns.popleft()
            lines[0].take_free()
            self.slots -= 1
            if not lines[0].has_free_head:
                lines.popleft()
            if lines:
                turns.append((last, lines))
            num_in_round -= 1
            if num_in_round == 0:
                num_in_round, rounds_left = len(turns), rounds_left - 1
        return last

    def serve_passes(self, tenants: Iterable[_Tenant]) -> None:
        """Plan passes, a quantum at a time, of the tenant whose quantum is due first; a tenant's models take turns.

        A tenant whose next quantum does not fit is set aside whole; its deficit makes it first soon, when the budget
        is still untouched. Others may fill the room it leaves, but only up to a budget's worth of debt: a tenant of
        small quanta would otherwise live in that room for good, at the expense of those with large ones.
        """
        is_anyone_set_aside = False
        heap = [(t.due(lines), t.tenant_id, t, lines) for t in tenants if (lines := t.pass_lines())]
        heapq.heapify(heap)
        while heap:
            _, tenant_id, tenant, lines = heapq.heappop(heap)
            line = lines[0]
            tenant.turn = line.model_id
            tokens = line.next_quantum_tokens
            assert tokens is not None
            is_in_debt = is_anyone_set_aside and tenant.deficit - tenant.served - tokens < -self.budget
            if is_in_debt or not self._has_room(line, tokens):
                tenant.is_unmet = is_anyone_set_aside = True
                continue
            if not self._is_within_cap(tenant, tokens):
                continue
            self._take_quantum(tenant, line)
            lines.popleft()
            while line.has_free_head and self.slots:
                line.take_free()
                self.slots -= 1
            if line.next_quantum_tokens is not None:
                lines.append(line)
            if lines:
                heapq.heappush(heap, (tenant.due(lines), tenant_id, tenant, lines))

    def _has_room(self, line: Line, tokens: int) -> bool:
        """The first quantum always has, so that one larger than the budget can run at all."""
        has_slot = self.slots > 0 or line.is_extension()
        return has_slot and (self.used == 0 or self.used + tokens <= self.budget)

    def _is_within_cap(self, tenant: _Tenant, tokens: int) -> bool:
        """As with the budget, a tenant's first quantum is, whatever its size."""
        return tenant.served == 0 or tenant.served + tokens <= self.cap

    def _take_quantum(self, tenant: _Tenant, line: Line) -> None:
        self.slots -= 0 if line.is_extension() else 1
        tokens = line.take_quantum()
        tenant.served += tokens
        self.used += tokens


def _tenants_of(policy_input: PolicyInput) -> list[_Tenant]:
    """Tenants by id, each with its lines by model id: from here on the order of the input is forgotten."""
    by_tenant: dict[TenantId, list[Line]] = {}
    for queue in sorted(policy_input.models, key=lambda queue: queue.model_id):
        if queue.ops:
            line = Line(queue, gap_wait_s=policy_input.gap_wait_s, quarantined=policy_input.quarantined)
            by_tenant.setdefault(queue.tenant_id, []).append(line)
    state = policy_input.state
    tenants = [
        _Tenant(
            tenant_id=tenant_id,
            weight=policy_input.weights.get(tenant_id, 1.0),
            deficit=state.deficits.get(tenant_id, 0.0),
            lines=tuple(by_tenant[tenant_id]),
            turn=state.turns.get(tenant_id),
        )
        for tenant_id in sorted(by_tenant)
    ]
    assert all(tenant.weight > 0 for tenant in tenants), "weights are positive"
    return tenants


def _find_suspect(tenants: Iterable[_Tenant], policy_input: PolicyInput) -> tuple[_Tenant, Line] | None:
    if not policy_input.quarantined:
        return None
    suspects = (
        (tenant, line)
        for tenant in tenants
        for line in tenant.lines
        if line.head is not None and line.head.request_id in policy_input.quarantined
    )
    return next(suspects, None)


def _collect(tenants: Iterable[_Tenant]) -> CyclePlan:
    """The plan in worker order: by phase over all models, then tenant by tenant, each model in seq order."""
    keyed: list[tuple[int, TenantId, ModelId, int, PlannedOp]] = []
    gaps = []
    for tenant in tenants:
        for line in tenant.lines:
            keyed += [(PHASE_INDEX[op.kind], tenant.tenant_id, op.model_id, op.seq_id, op) for op in line.planned]
            gaps += [line.gap] if line.gap else []
    keyed.sort(key=lambda entry: entry[:4])
    return CyclePlan(ops=tuple(entry[4] for entry in keyed), gaps=tuple(gaps))


def _settle(tenants: Sequence[_Tenant], cycle: _Cycle, policy_input: PolicyInput) -> Mapping[TenantId, float]:
    """Deficits after the cycle: before it, plus the fair share of what was served, minus what each was served.

    Fair shares are weighted max-min: everyone is owed `level * weight`, or its demand where that is less. When the
    cycle left nobody waiting, all demands were met, nobody was held up, and all accounts are closed.
    An absent tenant's credit is dropped; its debt is paid off at the rate at which it would have been owed, so that
    a client that sends one large request after another does not get a fresh account for each.
    """
    if not any(tenant.is_unmet for tenant in tenants):
        return {}
    # A quantum over the budget makes a long cycle, in which the others would have had more as well.
    limit = int(policy_input.tenant_cap_tokens * max(1.0, cycle.used / policy_input.budget_tokens))
    demands = [max(t.served, t.waiting_tokens(limit=limit)) if t.is_unmet else t.served for t in tenants]
    level = _fill_level(cycle.used, [(demand, t.weight) for demand, t in zip(demands, tenants, strict=True)])
    deficits = {
        t.tenant_id: t.deficit + min(demand, level * t.weight) - t.served
        for demand, t in zip(demands, tenants, strict=True)
    }
    for tenant_id, deficit in sorted(policy_input.state.deficits.items()):
        if tenant_id not in deficits:
            deficits[tenant_id] = min(0.0, deficit + level * policy_input.weights.get(tenant_id, 1.0))
    return {tenant_id: deficit for tenant_id, deficit in deficits.items() if deficit != 0.0}


def _fill_level(total: int, demands: Iterable[tuple[int, float]]) -> float:
    """The level with `sum(min(demand, level * weight)) == total`, for (demand, weight) pairs that can hold `total`."""
    waiting = sorted((demand / weight, demand, weight) for demand, weight in demands if demand > 0)
    weights_from = list(accumulate(weight for _, _, weight in reversed(waiting)))
    left = total
    for ratio, demand, _ in waiting:
        weight = weights_from.pop()
        if ratio * weight >= left:
            return left / weight
        left -= demand
    # Only rounding leads here: every demand is met exactly.
    return waiting[-1][0] if waiting else 0.0
