"""One flooder among small tenants, in virtual time: what the small ones notice of it, and what everybody gets."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.domain.fairness import DEFAULT_WEIGHTS, WeightClass
from treadle.domain.ids import ModelId, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.plan import ModelQueue, PolicyState, QueuedOp
from treadle.scheduler.policy import plan_cycle
from treadle.testing.builders import model_queue, policy_input, queued

PASS, STEP = OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP
BUDGET, QUANTUM = 8_192, 2_048
# A cycle takes this long in virtual seconds: a worker of 8,192 tokens in half a second, and what every cycle costs.
FIXED_S, TOKENS_PER_S = 0.01, 16_384
# Small tenants that pause between their steps think for about so long.
THINK_S = 0.3


@dataclass
class Run:
    """One run. A small one sends a pass and its step, waits for both, thinks, and goes on; a flooder never waits.

    step_s: seconds from the sending of each step to its result.
    """

    tenant_id: TenantId
    model_id: ModelId
    draw: random.Random
    is_flooder: bool
    pass_tokens: int
    next_seq_id: int = 1
    num_quanta_done: int = 0
    sent_at: float = 0.0
    step_s: list[float] = field(default_factory=list)

    def queue(self, now: float) -> ModelQueue | None:
        if self.is_flooder:
            ops = [self._pass(self.next_seq_id + i, (QUANTUM,) * 8, 0 if i else self.num_quanta_done) for i in range(8)]
        elif now < self.sent_at:
            return None
        else:
            quanta = [min(QUANTUM, self.pass_tokens - start) for start in range(0, self.pass_tokens, QUANTUM)]
            is_stepping = self.next_seq_id % 2 == 0
            passes = [] if is_stepping else [self._pass(self.next_seq_id, tuple(quanta), self.num_quanta_done)]
            ops = [*passes, queued(STEP, self.next_seq_id + (0 if is_stepping else 1))]
        return model_queue(*ops, model_id=self.model_id, tenant_id=self.tenant_id, next_seq_id=self.next_seq_id)

    def _pass(self, seq_id: int, quanta: tuple[int, ...], num_done: int) -> QueuedOp:
        return queued(PASS, seq_id, *quanta, num_quanta_done=num_done)

    def done(self, seq_id: int, kind: OpKind, now: float, think_s: float) -> None:
        self.next_seq_id, self.num_quanta_done = seq_id + 1, 0
        if kind is STEP:
            self.step_s.append(now - self.sent_at)
            self.sent_at = now + think_s * self.draw.expovariate(1.0)


class Clock:
    """Cycles in virtual time over these runs."""

    def __init__(self, *, seed: int = 0, cap_fraction: float = 0.5, think_s: float = 0.0) -> None:
        self.seed, self.cap, self.think_s = seed, int(BUDGET * cap_fraction), think_s
        self.runs: dict[ModelId, Run] = {}
        self.weights: dict[TenantId, float] = {}
        self.tokens: dict[TenantId, int] = {}
        self.now = 0.0
        self.longest_cycle_s = 0.0
        self._state = PolicyState()

    def add(self, tenant: str, *, pass_tokens: int = 0, weight: float = 1.0, is_flooder: bool = False) -> Run:
        tenant_id, model_id = TenantId(tenant), ModelId(f"{tenant}/0")
        run = Run(tenant_id, model_id, random.Random(f"{self.seed} {tenant}"), is_flooder, pass_tokens)
        self.runs[model_id], self.weights[tenant_id], self.tokens[tenant_id] = run, weight, 0
        return run

    def add_small(self, count: int, *, pass_tokens: int) -> list[Run]:
        return [self.add(f"small {i:02}", pass_tokens=pass_tokens) for i in range(count)]

    def cycle(self) -> None:
        queues = [queue for run in self.runs.values() if (queue := run.queue(self.now)) is not None]
        if not queues:
            self.now = min(run.sent_at for run in self.runs.values())
            return
        plan, self._state = plan_cycle(
            policy_input(
                *queues, state=self._state, budget_tokens=BUDGET, tenant_cap_tokens=self.cap, weights=self.weights
            )
        )
        cycle_s = FIXED_S + plan.num_tokens / TOKENS_PER_S
        self.longest_cycle_s = max(self.longest_cycle_s, cycle_s)
        self.now += cycle_s
        for op in plan.ops:
            run = self.runs[op.model_id]
            self.tokens[run.tenant_id] += op.num_tokens
            run.num_quanta_done = op.quantum_stop
            if op.is_last_part:
                run.done(op.seq_id, op.kind, self.now, self.think_s)

    def run_until(self, seconds: float) -> None:
        while self.now < seconds:
            self.cycle()

    def jain(self) -> float:
        """Jain's index of served tokens per weight: 1 is exactly fair, 1/n is one tenant having it all."""
        shares = [tokens / self.weights[tenant_id] for tenant_id, tokens in self.tokens.items()]
        return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pass_tokens", [700, 2_048, 5_000])
def test_with_everybody_waiting_a_flooder_gets_its_share_and_no_more(pass_tokens: int, seed: int) -> None:
    """15 that always have the next step waiting: their demand is above their share, so all 16 shares are equal."""
    clock = Clock(seed=seed)
    clock.add("flooder", is_flooder=True)
    clock.add_small(15, pass_tokens=pass_tokens)
    clock.run_until(80)
    assert clock.jain() >= 0.98


@pytest.mark.parametrize("seed", range(3))
def test_weights_count_beside_a_flooder(seed: int) -> None:
    clock = Clock(seed=seed)
    clock.add("flooder", is_flooder=True, weight=DEFAULT_WEIGHTS[WeightClass.BULK])
    for index, weight_class in enumerate((*WeightClass, *WeightClass, *WeightClass)):
        clock.add(f"{index} {weight_class}", pass_tokens=6_000, weight=DEFAULT_WEIGHTS[weight_class])
    clock.run_until(150)
    assert clock.jain() >= 0.98


@pytest.mark.parametrize("think_s", [0.0, THINK_S])
@pytest.mark.parametrize("pass_tokens", [100, 500, 2_048])
def test_a_small_tenants_step_hardly_notices_a_flooder(pass_tokens: int, think_s: float) -> None:
    """At most a cycle and a tenth more than beside 15 others of its own size, for clients that work without a pause.

    A client that thinks between its steps may send one just after a full cycle began, and it runs in the next full one:
    that is what a clock costs, beside whomever.
    """

    def steps_beside(*, flooder: bool) -> tuple[float, float, float]:
        clock = Clock(think_s=think_s)
        if flooder:
            clock.add("flooder", is_flooder=True)
        small = clock.add_small(15 if flooder else 16, pass_tokens=pass_tokens)
        clock.run_until(80)
        steps = sorted(seconds for run in small for seconds in run.step_s)
        return median(steps), steps[int(0.95 * len(steps))], clock.longest_cycle_s

    median_alone, p95_alone, _ = steps_beside(flooder=False)
    median_beside, p95_beside, cycle_s = steps_beside(flooder=True)
    num_cycles = 2 if think_s else 1
    assert median_beside <= 1.1 * median_alone + num_cycles * cycle_s
    assert p95_beside <= 1.1 * p95_alone + num_cycles * cycle_s


def test_small_tenants_get_all_they_ask_for_while_it_is_less_than_their_share() -> None:
    clock = Clock(think_s=THINK_S)
    clock.add("flooder", is_flooder=True)
    small = clock.add_small(15, pass_tokens=100)
    clock.run_until(60)
    # Each step of theirs was in the first cycle after it was sent.
    assert max(seconds for run in small for seconds in run.step_s) <= 2 * clock.longest_cycle_s
    # And the clock was not idle meanwhile: the flooder had the rest, up to its cap.
    assert clock.tokens[TenantId("flooder")] >= 0.9 * clock.cap * (clock.now / clock.longest_cycle_s)


@given(
    seed=st.integers(0, 1_000),
    weights=st.lists(st.sampled_from(list(DEFAULT_WEIGHTS.values())), min_size=2, max_size=8),
    pass_tokens=st.sampled_from((500, 2_048, 9_000)),
)
@settings(max_examples=15, deadline=None)
def test_shares_follow_weights_whoever_floods(seed: int, weights: list[float], pass_tokens: int) -> None:
    """Without a cap, and all with more to do than they get: the worst share is within a few per cent of its weight."""
    clock = Clock(seed=seed, cap_fraction=1.0)
    for index, weight in enumerate(weights):
        clock.add(f"t{index}", pass_tokens=pass_tokens, weight=weight, is_flooder=True)
    for _ in range(40 * len(weights)):
        clock.cycle()
    total, sum_of_weights = sum(clock.tokens.values()), sum(weights)
    for tenant_id, tokens in clock.tokens.items():
        fair = total * clock.weights[tenant_id] / sum_of_weights
        assert abs(tokens - fair) <= 2 * (BUDGET + QUANTUM)
