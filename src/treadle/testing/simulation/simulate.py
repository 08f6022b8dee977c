"""One scenario from its first request to its last result.

Invariant: when it returns, every request of every client is committed, once, and every run is what it would be had
nothing ever died.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from treadle.domain.ids import ModelId, TenantId
from treadle.domain.ops import OpKind
from treadle.testing.simulation.checks import undisturbed_digest
from treadle.testing.simulation.clients import Client
from treadle.testing.simulation.costs import Costs
from treadle.testing.simulation.draws import Gaps
from treadle.testing.simulation.pool import SimPool
from treadle.testing.simulation.rows import Row, RunRow
from treadle.testing.simulation.scenario import Group, Scenario
from treadle.testing.simulation.tally import Tally
from treadle.testing.simulation.timeline import Timeline

# Virtual seconds after the last new request in which everything must be done: hours, but not for ever.
_DRAIN_S = 24 * 3_600.0


def simulate(scenario: Scenario, costs: Costs, *, seed: int, checks_every_event: bool = False) -> dict[str, Any]:
    """The figures of a scenario. Raises AssertionError when an invariant does not hold."""
    return Simulation(scenario, costs, seed=seed, checks_every_event=checks_every_event).run()


class Simulation:
    """A scenario under way."""

    def __init__(self, scenario: Scenario, costs: Costs, *, seed: int, checks_every_event: bool = False) -> None:
        self._scenario = scenario
        self._seed = seed
        self._checks_every_event = checks_every_event
        self._timeline = Timeline()
        self._tally = Tally(scenario.warmup_s)
        self._weights: dict[TenantId, float] = {}
        self._groups: dict[TenantId, str] = {}
        for group in scenario.groups:
            for index in range(group.tenants):
                tenant_id = TenantId(f"{group.name}-{index:05}")
                self._weights[tenant_id], self._groups[tenant_id] = group.weight, group.name
        self._pool = SimPool(
            num_workers=scenario.num_workers,
            timeline=self._timeline,
            clock=scenario.clock,
            costs=costs,
            weights=self._weights,
            groups=self._groups,
            tally=self._tally,
        )
        self._turn = Gaps(costs.client_s, costs.client_cv)
        self._submit_gap = Gaps(costs.submit_s, costs.submit_cv)
        self._clients: list[Client] = []
        self._runs: list[tuple[RunRow, list[Row]]] = []
        for group in scenario.groups:
            self._add_clients(group)

    def run(self) -> dict[str, Any]:
        """Let everything happen, then see that nothing is missing."""
        scenario = self._scenario
        # Tenants of a kind do not come together, or they would live together.
        order = random.Random(f"{self._seed} arrivals").sample(self._clients, len(self._clients))
        for index, client in enumerate(order):
            self._timeline.after(scenario.starts_over_s * index / len(self._clients), client.start)
        self._pool.schedule(scenario.faults, random.Random(f"{self._seed} faults"))
        after_each = self._pool.check_all if self._checks_every_event else None
        self._timeline.run(scenario.duration_s, after_each=after_each)
        figures = self._tally.figures(
            duration_s=scenario.duration_s, weights=self._weights, num_workers=scenario.num_workers
        )
        for client in self._clients:
            client.stop()
        self._pool.cease()
        self._timeline.run(scenario.duration_s + _DRAIN_S, after_each=after_each)
        self._check_that_nothing_is_missing()
        return figures | {"num_events": self._timeline.num_events, "num_requests": sum(len(r) for _, r in self._runs)}

    def _check_that_nothing_is_missing(self) -> None:
        self._pool.check_all()
        for run, rows in self._runs:
            assert not run.line, f"{run.model_id}: {len(run.line)} acknowledged requests were never answered"
            assert all(row.finished_s is not None for row in rows)
            assert run.digest == undisturbed_digest(rows), f"{run.model_id} is not what it would be undisturbed"

    def _add_clients(self, group: Group) -> None:
        for index in range(group.tenants):
            tenant_id = TenantId(f"{group.name}-{index:05}")
            for number in range(group.runs):
                self._add_client(group, ModelId(f"{tenant_id}:train:{number}"), tenant_id)

    def _add_client(self, group: Group, model_id: ModelId, tenant_id: TenantId) -> None:
        rows: list[Row] = []
        run = RunRow(model_id, tenant_id, on_finished=lambda row: client.on_finished(row))
        client = Client(
            habit=group.habit,
            rng=random.Random(f"{self._seed} {model_id}"),
            timeline=self._timeline,
            turn=self._turn,
            submit_gap=self._submit_gap,
            submit=partial(self._submit, run, rows),
            on_step=partial(self._stepped, group.name),
        )
        self._runs.append((run, rows))
        self._clients.append(client)

    def _submit(self, run: RunRow, rows: list[Row], kind: OpKind, quantum_tokens: Sequence[int]) -> Row:
        row = self._pool.submit(run, kind, quantum_tokens)
        rows.append(row)
        return row

    def _stepped(self, group: str, rows: Sequence[Row]) -> None:
        self._tally.stepped(rows, group, num_cycles=self._pool.cycles_since(rows[0]))
