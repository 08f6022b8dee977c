"""What a simulation counts, and the figures that come of it. Plain numbers, rounded, in a fixed order.

Invariant: only what happened behind the warm-up counts, except faults, which always do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.domain.ids import ModelId, TenantId
from treadle.domain.plan import CyclePlan, PolicyInput
from treadle.engine.buckets import packed_length
from treadle.testing.simulation.costs import Costs
from treadle.testing.simulation.rows import Row


@dataclass(frozen=True, slots=True)
class CycleFacts:
    """What one cycle ran. computed_rows: tokens and padding. held_up: tenants with a pass that only the budget or the
    number of ops kept out."""

    tokens: Mapping[TenantId, int]
    computed_rows: int
    num_packs: int
    num_ops: int
    num_restores: int
    num_replayed_tokens: int
    held_up: frozenset[TenantId]
    tenants: frozenset[TenantId]

    @staticmethod
    def of(
        given: PolicyInput,
        plan: CyclePlan,
        packs: Sequence[int],
        costs: Costs,
        *,
        rows: Sequence[Row],
        num_restores: int,
    ) -> CycleFacts:
        tokens: Counter[TenantId] = Counter()
        replayed = 0
        done: dict[ModelId, int] = {}
        for op, row in zip(plan.ops, rows, strict=True):
            tokens[row.run.tenant_id] += op.num_tokens
            replayed += op.num_tokens if row.finished_s is not None else 0
            done[op.model_id] = done.get(op.model_id, 0) + op.is_last_part
        held_up = set()
        for queue in given.models:
            num_done = done.get(queue.model_id, 0)
            is_next_a_pass = num_done < len(queue.ops) and bool(queue.ops[num_done].quantum_tokens)
            if is_next_a_pass and (num_done == 0 or queue.ops[num_done - 1].quantum_tokens):
                held_up.add(queue.tenant_id)
        return CycleFacts(
            tokens=tokens,
            computed_rows=sum(packed_length(pack, costs.buckets) for pack in packs),
            num_packs=len(packs),
            num_ops=len(plan.ops),
            num_restores=num_restores,
            num_replayed_tokens=replayed,
            held_up=frozenset(held_up),
            tenants=frozenset(queue.tenant_id for queue in given.models),
        )


@dataclass(slots=True)
class Tally:
    """Counts of one simulation."""

    warmup_s: float
    cycles: Counter[str] = field(default_factory=Counter)
    busy_s: float = 0.0
    snapshots: int = 0
    deaths: int = 0
    restores: int = 0
    replayed_tokens: int = 0
    served: Counter[TenantId] = field(default_factory=Counter)
    # Per tenant: cycles in which it waited for a pass at all, and those in which the budget kept one out.
    present: Counter[TenantId] = field(default_factory=Counter)
    held_up: Counter[TenantId] = field(default_factory=Counter)
    # Seconds and cycles, by group of tenants.
    waits_s: dict[str, list[float]] = field(default_factory=dict)
    steps_s: dict[str, list[float]] = field(default_factory=dict)
    step_cycles: dict[str, list[int]] = field(default_factory=dict)
    pauses_s: list[float] = field(default_factory=list)
    _stopped: dict[ModelId, float] = field(default_factory=dict)

    def ran(self, now: float, facts: CycleFacts, compute_s: float) -> None:
        """A cycle was committed."""
        self.restores += facts.num_restores
        self.replayed_tokens += facts.num_replayed_tokens
        if now < self.warmup_s:
            return
        self.cycles["cycles"] += 1
        self.cycles["ops"] += facts.num_ops
        self.cycles["packs"] += facts.num_packs
        self.cycles["computed_rows"] += facts.computed_rows
        self.busy_s += compute_s
        self.served.update(facts.tokens)
        self.present.update(facts.tenants)
        self.held_up.update(facts.held_up)

    def committed(self, row: Row, group: str) -> None:
        """A row's outcome is true."""
        assert row.finished_s is not None
        assert row.begun_s is not None
        stopped = self._stopped.pop(row.run.model_id, None)
        if stopped is not None:
            self.pauses_s.append(row.finished_s - stopped)
        if row.record.created_at >= self.warmup_s:
            self.waits_s.setdefault(group, []).append(row.begun_s - row.record.created_at)

    def stepped(self, rows: Sequence[Row], group: str, *, num_cycles: int) -> None:
        """A client has all results of a step."""
        first, last = rows[0], rows[-1]
        assert last.finished_s is not None
        if first.record.created_at >= self.warmup_s:
            self.steps_s.setdefault(group, []).append(last.finished_s - first.record.created_at)
            self.step_cycles.setdefault(group, []).append(num_cycles)

    def died(self, now: float, waiting: Iterable[ModelId]) -> None:
        """A worker or its leader died while these runs waited for a result."""
        self.deaths += 1
        for model_id in waiting:
            self._stopped.setdefault(model_id, now)

    def figures(self, *, duration_s: float, weights: Mapping[TenantId, float], num_workers: int) -> dict[str, Any]:
        """Everything, for JSON: rounded, so that it reads, and the same for the same seed."""
        measured_s = duration_s - self.warmup_s
        tokens = sum(self.served.values())
        num_cycles = self.cycles["cycles"]
        steps = [value for values in self.steps_s.values() for value in values]
        contended = [t for t in weights if 2 * self.held_up[t] >= max(1, num_cycles // num_workers)]
        return {
            "tokens_per_s": _round(tokens / measured_s),
            "steps_per_s": _round(len(steps) / measured_s),
            "busy": _round(self.busy_s / (measured_s * num_workers)),
            "num_cycles": num_cycles,
            "tokens_per_cycle": _round(tokens / max(1, num_cycles)),
            "ops_per_cycle": _round(self.cycles["ops"] / max(1, num_cycles)),
            "compute_s_per_cycle": _round(self.busy_s / max(1, num_cycles)),
            "cycles_over_steps": _round(num_cycles / max(1, len(steps))),
            "packs_per_cycle": _round(self.cycles["packs"] / max(1, num_cycles)),
            "useful_over_computed": _round(tokens / max(1, self.cycles["computed_rows"])),
            "jain": _round(jain([self.served[t] / w for t, w in sorted(weights.items())])),
            "jain_contended": _round(jain([self.served[t] / weights[t] for t in sorted(contended)])),
            "num_contended": len(contended),
            "groups": {
                group: {
                    "steps": len(values),
                    "step_s": spread(values),
                    "cycles_per_step": _round(sum(self.step_cycles[group]) / len(values)),
                    "wait_s": spread(self.waits_s.get(group, [])),
                }
                for group, values in sorted(self.steps_s.items())
            },
            "faults": {
                "deaths": self.deaths,
                "restores": self.restores,
                "replayed_tokens": self.replayed_tokens,
                "snapshots": self.snapshots,
                "pause_s": spread(self.pauses_s),
            },
        }


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 when all are equal, 1/n when one has everything. (Jain, Chiu, Hawe 1984, equation 2.)"""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles (nearest rank); empty without values."""
    if not values:
        return {}
    ordered = sorted(values)
    last = len(ordered) - 1
    return {"mean": _round(sum(ordered) / len(ordered))} | {
        f"p{percent}": _round(ordered[min(last, len(ordered) * percent // 100)]) for percent in (50, 95, 99)
    }


def _round(value: float) -> float:
    """Five digits: more would be noise, and fewer would hide a cycle."""
    return float(f"{value:.5g}")
