"""What must be true whatever happens: asserted after every plan, every commit and, in tests, every event.

Kept apart from what it checks, with books of its own. Invariant: it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from treadle.domain.ids import ModelId, TenantId
from treadle.domain.limits import MAX_OPS_PER_CYCLE, QUANTUM_TOKENS
from treadle.domain.plan import CyclePlan, PolicyInput, PolicyState
from treadle.scheduler.outcomes import REPLAYED_KINDS
from treadle.scheduler.runs import Run
from treadle.testing.simulation.rows import SEED_DIGEST, Row, RunRow, digest_after
from treadle.testing.simulation.worker import SimWorker


class Checks:
    """Books of one loop since its leader began."""

    def __init__(self) -> None:
        self._num_plans = 0
        self._num_tokens = 0
        # Tenants that nothing was planned of, and how many plans and tokens there had been when that began.
        self._hungry_since: dict[TenantId, tuple[int, int]] = {}
        # The hardest conditions so far, which the bound on waiting depends on.
        self._most_tenants = 0
        self._most_suspects = 0
        self._largest_quantum = QUANTUM_TOKENS
        self._least_budget: float = float("inf")
        self._largest_budget = 0
        self._least_weight_share = 1.0
        # What suspects got of cycles that nobody shared with them.
        self._tokens_alone = 0

    def planned(self, given: PolicyInput, plan: CyclePlan, state: PolicyState) -> None:
        """Order, atomicity, budget, fairness and progress of one plan."""
        self._num_plans += 1
        self._check_order(given, plan)
        self._largest_budget = max(self._largest_budget, given.budget_tokens)
        self._least_budget = min(self._least_budget, given.budget_tokens)
        largest = max((op.num_tokens for op in plan.ops), default=0)
        self._largest_quantum = max(self._largest_quantum, largest if len(plan.ops) == 1 else 0)
        is_one_quantum = sum(op.quantum_stop - op.quantum_start for op in plan.ops) <= 1
        assert plan.num_tokens <= given.budget_tokens or is_one_quantum, "over the budget"
        assert len(plan.ops) <= MAX_OPS_PER_CYCLE
        self._check_fairness(given, state)
        self._check_progress(given, plan)

    def _check_order(self, given: PolicyInput, plan: CyclePlan) -> None:
        """Each run's planned ops are the first of its line, whole but for the last, and start where they stopped."""
        by_model: dict[ModelId, int] = {}
        queues = {queue.model_id: queue for queue in given.models}
        for planned in plan.ops:
            index = by_model.get(planned.model_id, 0)
            op = queues[planned.model_id].ops[index]
            assert op.request_id == planned.request_id, f"{planned.request_id} before {op.request_id}"
            assert planned.quantum_start == op.num_quanta_done
            assert planned.is_last_part == (planned.quantum_stop == len(op.quantum_tokens))
            # A part is its run's last op of the cycle: asking for the op behind it finds none that follows it.
            by_model[planned.model_id] = index + 1 if planned.is_last_part else len(queues[planned.model_id].ops)
        if any(op.request_id in given.quarantined for op in plan.ops):
            assert len(plan.ops) == 1, "a suspect runs beside others"
            self._tokens_alone += plan.num_tokens

    def _check_fairness(self, given: PolicyInput, state: PolicyState) -> None:
        """No account strays further from the exact share than the policy promises (policy.py, first paragraph).

        What quarantine serves alone comes on top: it is charged, but nobody could choose to share those cycles.
        """
        bound = 2 * (self._largest_budget + self._largest_quantum) + self._tokens_alone
        for tenant_id, deficit in state.deficits.items():
            assert abs(deficit) <= bound, f"{tenant_id} is {deficit} tokens from its share; the bound is {bound}"

    def _check_progress(self, given: PolicyInput, plan: CyclePlan) -> None:
        """Whoever waits is served within a bounded number of cycles, or of tokens where a quantum is over the budget.

        Such a quantum waits until its tenant's share of what others got has grown to its size. When those others ask
        for little, that is many cycles, if short ones.
        """
        self._num_tokens += plan.num_tokens
        served = {op.model_id for op in plan.ops}
        fed = {queue.tenant_id for queue in given.models if queue.model_id in served}
        present = {queue.tenant_id for queue in given.models}
        weights = [given.weights.get(tenant_id, 1.0) for tenant_id in present]
        self._most_tenants = max(self._most_tenants, len(present))
        self._most_suspects = max(self._most_suspects, len(given.quarantined))
        self._least_weight_share = min(self._least_weight_share, min(weights, default=1.0) / max(sum(weights), 1e-9))
        turns = (self._largest_quantum / self._least_budget + 2) / self._least_weight_share
        most_cycles = turns + 2 * self._most_tenants / MAX_OPS_PER_CYCLE + 4 * self._most_suspects + 4
        # What quarantine gave somebody alone was charged, and is made up for at the same pace.
        owed = 2 * (self._largest_budget + self._largest_quantum) + self._tokens_alone
        most_tokens = owed / self._least_weight_share
        for tenant_id in present:
            if tenant_id in fed:
                self._hungry_since.pop(tenant_id, None)
            cycle, tokens = self._hungry_since.setdefault(tenant_id, (self._num_plans, self._num_tokens))
            cycles, tokens = self._num_plans - cycle, self._num_tokens - tokens
            assert cycles <= most_cycles or tokens <= most_tokens, (
                f"{tenant_id} starves: nothing for {cycles} cycles of {tokens} tokens in all; "
                f"the bounds are {most_cycles:.0f} and {most_tokens:.0f}"
            )
        for tenant_id in self._hungry_since.keys() - present:
            del self._hungry_since[tenant_id]

    def committed(self, worker: SimWorker, book: Mapping[ModelId, Run], rows: Sequence[Row]) -> None:
        """The runs of a cycle are held in exactly the state that is committed, or in one on the way to it."""
        for row in rows:
            _check_run(worker, book, row.run)

    def everything(self, worker: SimWorker, book: Mapping[ModelId, Run], runs: Iterable[RunRow]) -> None:
        """The same for all runs, and that each line is in order and whole."""
        believed = {model_id for model_id, run in book.items() if run.tag is not None}
        assert believed == set(worker.held), "the leader believes something else than is true"
        for run in runs:
            _check_run(worker, book, run)
            seq_ids = [row.record.seq_id for row in run.line]
            assert seq_ids == list(range(run.next_seq_id, run.num_submitted)), f"{run.model_id} has lost a request"
            assert all(row.finished_s is None for row in run.line)


def _check_run(worker: SimWorker, book: Mapping[ModelId, Run], run: RunRow) -> None:
    held = worker.held.get(run.model_id)
    if held is None:
        return
    assert book[run.model_id].tag == held.tag, f"{run.model_id}: the leader believes something else than is true"
    assert held.tag.applied_seq < run.next_seq_id, f"{run.model_id} is ahead of what is committed"
    if not any(row.record.seq_id > held.tag.applied_seq for row in run.log):
        assert held.digest == run.digest, f"{run.model_id}: the worker holds another state than was committed"


def undisturbed_digest(rows: Iterable[Row]) -> int:
    """The state of a run after these ops, run once each in this order: what faults must not change."""
    digest = SEED_DIGEST
    for row in rows:
        if row.record.kind in REPLAYED_KINDS:
            digest = digest_after(digest, row.record)
    return digest
