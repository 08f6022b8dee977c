"""What tenants that are at a rate may start now: the rest stays queued, and waits.

Of a tenant with a rate, passes are let through oldest first while there is room, each counted whole, and those that are
half done before all others. What costs no tokens runs as far as nothing stands in front of it. It refuses to know how
room is measured and what order a cycle has. Invariants: what is let through of one tenant exceeds its room by less than
one request; with any room, its oldest pass goes through, whatever its size; nobody else's queue changes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from treadle.domain.ids import ModelId, RequestId, TenantId
from treadle.domain.plan import ModelQueue, QueuedOp
from treadle.domain.policy import Policies
from treadle.domain.rates import RateKind
from treadle.domain.records import RequestRecord
from treadle.store import Store

# How often those who wait for a rate are looked at: with PolicyWatch, a limit that is lifted is felt within a second.
HELD_BACK_POLL_S = 0.5

Rooms = Mapping[TenantId, float]
"""Tokens that may start now, of tenants that have a rate."""


class RateGate:
    """Asks the store how much room there is."""

    def __init__(self, store: Store, policies: Callable[[], Policies]) -> None:
        self._store = store
        self._policies = policies

    async def rooms(self, kind: RateKind, tenant_ids: Collection[TenantId]) -> Rooms:
        """For those of these tenants that have a rate: the least room of their quotas. May be negative."""
        uses = await self._store.rates.uses(self._policies(), kind, tenant_ids)
        return {tenant_id: min(use.room for use in of) for tenant_id, of in uses.items()}

    async def within(
        self, queues: Mapping[ModelId, ModelQueue], replayed: Collection[ModelId]
    ) -> dict[ModelId, ModelQueue]:
        """`queues` without the passes that have to wait. replayed: runs whose ops were counted before."""
        rooms = await self.rooms(RateKind.TRAINING, {queue.tenant_id for queue in queues.values()})
        return within_rooms(queues, rooms, replayed)


def within_rooms(
    queues: Mapping[ModelId, ModelQueue], rooms: Rooms, replayed: Collection[ModelId] = ()
) -> dict[ModelId, ModelQueue]:
    """See RateGate.within. Pure."""
    result = dict(queues)
    by_tenant: dict[TenantId, list[ModelQueue]] = {}
    for model_id, queue in queues.items():
        if queue.tenant_id in rooms and model_id not in replayed:
            by_tenant.setdefault(queue.tenant_id, []).append(queue)
    for tenant_id, lines in by_tenant.items():
        for queue in _let_through(lines, rooms[tenant_id]):
            result[queue.model_id] = queue
    return result


@dataclass(slots=True)
class _Line:
    """A run's queue and how many of its ops are let through."""

    queue: ModelQueue
    num_through: int = 0
    expected: int = field(init=False)

    def __post_init__(self) -> None:
        self.expected = self.queue.next_seq_id
        self.pass_free()

    @property
    def next_pass(self) -> QueuedOp | None:
        """What is let through next, if there is more."""
        ops = self.queue.ops
        return ops[self.num_through] if self.num_through < len(ops) else None

    @property
    def is_behind_a_hole(self) -> bool:
        """The next pass waits for a request that has not come."""
        op = self.next_pass
        assert op is not None
        settled = self.queue.settled_seq_ids
        return any(seq_id not in settled for seq_id in range(self.expected, op.seq_id))

    def take(self) -> int:
        """Let the next pass through, and what follows it without tokens: its tokens."""
        op = self.next_pass
        assert op is not None
        self._advance(op)
        self.pass_free()
        return sum(op.quantum_tokens)

    def pass_free(self) -> None:
        while (op := self.next_pass) is not None and not op.quantum_tokens:
            self._advance(op)

    def _advance(self, op: QueuedOp) -> None:
        self.num_through += 1
        self.expected = op.seq_id + 1

    def trimmed(self) -> ModelQueue:
        return replace(self.queue, ops=self.queue.ops[: self.num_through])


def _let_through(queues: Iterable[ModelQueue], room: float) -> list[ModelQueue]:
    """One tenant's queues, as far as there is room."""
    lines = [_Line(queue) for queue in queues]
    for line in lines:
        if (op := line.next_pass) is not None and op.num_quanta_done:
            room -= line.take()
    waiting: list[tuple[float, ModelId, _Line]] = []
    held_up: list[_Line] = []
    for line in lines:
        _enter(line, waiting, held_up)
    while waiting and room > 0:
        line = heapq.heappop(waiting)[2]
        room -= line.take()
        _enter(line, waiting, held_up)
    if room > 0:
        # It costs nothing as long as the hole is waited for; what is not seen would never end that wait.
        for line in held_up:
            line.num_through = len(line.queue.ops)
    return [line.trimmed() for line in lines]


def _enter(line: _Line, waiting: list[tuple[float, ModelId, _Line]], held_up: list[_Line]) -> None:
    op = line.next_pass
    if op is None:
        return
    if line.is_behind_a_hole:
        held_up.append(line)
    else:
        heapq.heappush(waiting, (-op.queued_s, line.queue.model_id, line))


class SampleMeter:
    """What a sampler may be given of tenants with a rate: as much as their samples in flight leave at most."""

    def __init__(self, rooms: Rooms, running: Mapping[RequestId, tuple[TenantId, int]]) -> None:
        """running: whose each sample is, and how many tokens it may draw."""
        self._rooms = dict(rooms)
        for tenant_id, num_tokens in running.values():
            self._spend(tenant_id, num_tokens)

    def takes(self, row: RequestRecord) -> bool:
        """Whether this one may start; it counts from then on."""
        if self._rooms.get(row.tenant_id, 1.0) <= 0:
            return False
        self._spend(row.tenant_id, most_sampled(row))
        return True

    def _spend(self, tenant_id: TenantId, num_tokens: int) -> None:
        if tenant_id in self._rooms:
            self._rooms[tenant_id] -= num_tokens


def most_sampled(row: RequestRecord) -> int:
    """Tokens that a sample may draw at most. A row that does not say counts with its prompt."""
    return sum(row.quantum_tokens) or row.num_tokens
