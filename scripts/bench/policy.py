"""What planning costs and what it is worth: its time, the reading of queue heads, and fairness beside a flooder.

    python scripts/bench/policy.py [--repetitions 20] [--save]

Goals: under 20 ms to plan 10,000 queued ops of 1,000 tenants, so that planning never shows in a cycle; Jain's index of
at least 0.98 with one flooder among 15 small tenants; a small tenant's step beside a flooder at most one cycle and 10 %
longer than beside 15 others of its size. Times are CPU times of one thread; fairness is counted in virtual time, with
cycles of `FIXED_S + tokens / TOKENS_PER_S`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import report

from treadle.domain.fairness import DEFAULT_WEIGHTS, WeightClass
from treadle.domain.ids import ModelId, PoolName, SessionId, TenantId, op_request_id
from treadle.domain.ops import LoraSpec, OpKind
from treadle.domain.plan import ModelQueue, PolicyInput, PolicyState, QueuedOp
from treadle.domain.records import ModelRecord, NewRequest, SessionRecord
from treadle.domain.states import ModelState, SessionState
from treadle.scheduler.policy import plan_cycle
from treadle.store import Store

PASS, STEP = OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP
SIZES = ((10, 10), (100, 10), (1_000, 10), (10_000, 1))
HEAD_SIZES = ((1, 2), (100, 10), (1_000, 10), (1_000, 100))
POOL = PoolName("bench")
# A worker of 8,192 tokens in half a second, and what every cycle costs.
BUDGET, QUANTUM, CAP_FRACTION = 8_192, 2_048, 0.5
FIXED_S, TOKENS_PER_S = 0.01, 16_384
NUM_SMALL, VIRTUAL_S = 15, 300.0
SMALL_PASSES = (100, 700, 2_048, 5_000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    report.add_arguments(parser)
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "policy", **report.context(), "repetitions": args.repetitions}
    result["planning_cpu_ms"] = [
        plan_times(tenants, ops, steps=steps, repetitions=args.repetitions)
        for tenants, ops in SIZES
        for steps in (False, True)
    ]
    result["heads_cpu_ms"] = [asyncio.run(head_times(*size, repetitions=args.repetitions)) for size in HEAD_SIZES]
    result["fairness"] = [fairness(pass_tokens) for pass_tokens in SMALL_PASSES]
    result["weights"] = by_class()
    result["latency"] = [latency(pass_tokens, think_s) for think_s in (0.0, 0.3) for pass_tokens in SMALL_PASSES[:3]]
    print_tables(result)
    report.write(report.path_of(args, "policy"), result)
    return report.compare(args, result, margin=0.05)


def plan_times(num_tenants: int, ops_per_tenant: int, *, steps: bool, repetitions: int) -> dict[str, Any]:
    """Milliseconds per plan, with the state carried on from plan to plan."""
    given, states = make_input(num_tenants, ops_per_tenant, steps=steps), [PolicyState()]
    # As a server does with what stays.
    gc.collect()
    gc.freeze()

    def plan() -> None:
        planned, state = plan_cycle(replace(given, state=states[-1]))
        assert planned.ops
        states[:] = [state]

    label = f"{num_tenants} tenants x {ops_per_tenant}, {'stepping' if steps else 'accumulating'}"
    return {"label": label, "num_ops": num_tenants * ops_per_tenant, **cpu_ms(plan, repetitions)}


def cpu_ms(call: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Spread over the repetitions; the first call is warm-up."""
    times = []
    for _ in range(repetitions + 1):
        started = time.thread_time()
        call()
        times.append((time.thread_time() - started) * 1e3)
    return report.spread(times[1:])


def make_input(num_tenants: int, ops_per_tenant: int, *, steps: bool) -> PolicyInput:
    """One model per tenant; passes of up to 16 quanta, every second op a step when `steps`."""
    rng = random.Random(0)
    models = []
    for index in range(num_tenants):
        model_id = ModelId(f"session{index}:train:1")
        ops = []
        for seq_id in range(1, ops_per_tenant + 1):
            is_step = steps and seq_id % 2 == 0
            quanta = () if is_step else tuple(rng.randint(16, QUANTUM) for _ in range(rng.randint(1, 16)))
            kind = STEP if is_step else PASS
            ops.append(QueuedOp(op_request_id(model_id, seq_id), seq_id, kind, quanta, queued_s=1.0))
        models.append(ModelQueue(model_id, TenantId(f"tenant{index}"), 1, tuple(ops)))
    return PolicyInput(
        models=tuple(models),
        state=PolicyState(),
        budget_tokens=32_768,
        tenant_cap_tokens=8_192,
        gap_wait_s=30.0,
    )


async def head_times(num_tenants: int, ops_per_tenant: int, *, repetitions: int) -> dict[str, Any]:
    """Milliseconds of CPU, in all threads, to read the queue heads of a full pool; the same rows again each time."""
    with tempfile.TemporaryDirectory() as folder:
        store = await Store.open(f"sqlite:///{folder}/bench.db")
        await fill(store, num_tenants, ops_per_tenant)
        times, num_rows = [], 0
        for _ in range(repetitions + 1):
            started = time.process_time()
            num_rows = sum(len(line) for line in await store.requests.heads(POOL))
            times.append((time.process_time() - started) * 1e3)
        await store.close()
    label = f"{num_tenants} tenants x {ops_per_tenant}"
    # The first reading fetches every row.
    return {"label": label, "num_rows": num_rows, "first": times[0], **report.spread(times[1:])}


async def fill(store: Store, num_tenants: int, ops_per_tenant: int) -> None:
    """One run per tenant, with this many ops in line behind its creation."""
    session_id = SessionId("bench")
    await store.sessions.create(SessionRecord(session_id, TenantId("bench"), SessionState.ACTIVE, 0.0, 0.0), None)
    writes = []
    for index in range(num_tenants):
        model_id, tenant_id = ModelId(f"{index:06d}-bench:train:0"), TenantId(f"tenant{index}")
        record = ModelRecord(
            model_id, session_id, tenant_id, POOL, POOL, "", LoraSpec(rank=8, seed=0), ModelState.CREATING, 0, 0.0, 0.0
        )
        create = request(model_id, tenant_id, 0, OpKind.CREATE_MODEL)
        writes.append(store.models.create(record, create))
    await asyncio.gather(*writes)
    for seq_id in range(1, ops_per_tenant):
        kind = PASS if seq_id % 2 else STEP
        await asyncio.gather(
            *(
                store.requests.add(request(ModelId(f"{i:06d}-bench:train:0"), TenantId(f"tenant{i}"), seq_id, kind))
                for i in range(num_tenants)
            )
        )


def request(model_id: ModelId, tenant_id: TenantId, seq_id: int, kind: OpKind) -> NewRequest:
    quanta = (100,) if kind is PASS else ()
    return NewRequest(
        op_request_id(model_id, seq_id), tenant_id, POOL, kind, seq_id, sum(quanta), quanta, model_id, payload=b"x"
    )


@dataclass
class Run:
    """One run in virtual time. A small one sends a pass and its step, waits for both, thinks; a flooder never waits."""

    tenant_id: TenantId
    pass_tokens: int
    is_flooder: bool
    draw: random.Random
    next_seq_id: int = 1
    num_done: int = 0
    sent_at: float = 0.0
    step_s: list[float] = field(default_factory=list)

    @property
    def model_id(self) -> ModelId:
        return ModelId(f"{self.tenant_id}/0")

    def queue(self, now: float) -> ModelQueue | None:
        if now < self.sent_at:
            return None
        first, num_done = self.next_seq_id, self.num_done
        if self.is_flooder:
            ops = [self._op(PASS, first + i, (QUANTUM,) * 8, 0 if i else num_done) for i in range(8)]
        else:
            starts = range(0, self.pass_tokens, QUANTUM)
            quanta = tuple(min(QUANTUM, self.pass_tokens - start) for start in starts)
            step_seq_id = first + first % 2
            passes = [self._op(PASS, first, quanta, num_done)] if step_seq_id > first else []
            ops = [*passes, self._op(STEP, step_seq_id, (), 0)]
        return ModelQueue(self.model_id, self.tenant_id, first, tuple(ops))

    def _op(self, kind: OpKind, seq_id: int, quanta: tuple[int, ...], num_done: int) -> QueuedOp:
        return QueuedOp(op_request_id(self.model_id, seq_id), seq_id, kind, quanta, num_quanta_done=num_done)


class VirtualClock:
    """The production policy over runs, in virtual time."""

    def __init__(self, *, think_s: float = 0.0) -> None:
        self.runs: dict[ModelId, Run] = {}
        self.weights: dict[TenantId, float] = {}
        self.tokens: dict[TenantId, int] = {}
        self.now = self.longest_cycle_s = 0.0
        self._think_s = think_s
        self._state = PolicyState()

    def add(self, tenant: str, *, pass_tokens: int = 0, weight: float = 1.0, is_flooder: bool = False) -> None:
        run = Run(TenantId(tenant), pass_tokens, is_flooder, random.Random(tenant))
        self.runs[run.model_id], self.weights[run.tenant_id], self.tokens[run.tenant_id] = run, weight, 0

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            queues = [queue for run in self.runs.values() if (queue := run.queue(self.now)) is not None]
            if queues:
                self._cycle(tuple(queues))
            else:
                self.now = min(run.sent_at for run in self.runs.values())

    def _cycle(self, queues: tuple[ModelQueue, ...]) -> None:
        cap = int(BUDGET * CAP_FRACTION) if len(queues) > 1 else BUDGET
        plan, self._state = plan_cycle(PolicyInput(queues, self._state, BUDGET, cap, 30.0, self.weights))
        cycle_s = FIXED_S + plan.num_tokens / TOKENS_PER_S
        self.now += cycle_s
        self.longest_cycle_s = max(self.longest_cycle_s, cycle_s)
        for op in plan.ops:
            run = self.runs[op.model_id]
            self.tokens[run.tenant_id] += op.num_tokens
            run.num_done = 0 if op.is_last_part else op.quantum_stop
            if op.is_last_part:
                run.next_seq_id = op.seq_id + 1
            if op.kind is STEP:
                run.step_s.append(self.now - run.sent_at)
                run.sent_at = self.now + self._think_s * run.draw.expovariate(1.0)

    def jain(self) -> float:
        """Jain's index of served tokens per weight."""
        shares = [count / self.weights[tenant_id] for tenant_id, count in self.tokens.items()]
        return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))

    def step_s(self) -> dict[str, float]:
        """Seconds from sending to result of the small tenants' steps."""
        steps = sorted(seconds for run in self.runs.values() for seconds in run.step_s)
        return {"median": steps[len(steps) // 2], "p95": steps[int(0.95 * len(steps))], "max": steps[-1]}


def fairness(pass_tokens: int) -> dict[str, Any]:
    """One flooder and 15 small tenants, all of whom ask for more than their share."""
    clock = VirtualClock()
    clock.add("flooder", is_flooder=True)
    for index in range(NUM_SMALL):
        clock.add(f"small {index}", pass_tokens=pass_tokens)
    clock.run(VIRTUAL_S)
    label = f"passes of {pass_tokens}"
    # Where the small ones ask for less than their share, the flooder has what they leave, and no index says anything.
    is_contended = NUM_SMALL * pass_tokens >= BUDGET * NUM_SMALL / (NUM_SMALL + 1)
    return {"label": label, "is_contended": is_contended, "ratios": {"jain": clock.jain()} if is_contended else {}}


def by_class() -> dict[str, Any]:
    """Five tenants of each class and a bulk flooder."""
    clock = VirtualClock()
    clock.add("flooder", is_flooder=True, weight=DEFAULT_WEIGHTS[WeightClass.BULK])
    for index in range(NUM_SMALL):
        weight_class = list(WeightClass)[index % 3]
        clock.add(f"{weight_class} {index}", pass_tokens=12_000, weight=DEFAULT_WEIGHTS[weight_class])
    clock.run(VIRTUAL_S)
    return {"ratios": {"jain": clock.jain()}}


def latency(pass_tokens: int, think_s: float) -> dict[str, Any]:
    """A small tenant's step beside a flooder and 14 others, and beside 15 others."""
    found: dict[str, dict[str, float]] = {}
    longest_s = 0.0
    for name, num_small in (("beside 15 others", NUM_SMALL + 1), ("beside a flooder", NUM_SMALL)):
        clock = VirtualClock(think_s=think_s)
        if num_small == NUM_SMALL:
            clock.add("flooder", is_flooder=True)
        for index in range(num_small):
            clock.add(f"small {index}", pass_tokens=pass_tokens)
        clock.run(VIRTUAL_S)
        found[name], longest_s = clock.step_s(), clock.longest_cycle_s
    more_cycles = {
        name: (found["beside a flooder"][name] - 1.1 * found["beside 15 others"][name]) / longest_s
        for name in ("median", "p95")
    }
    label = f"passes of {pass_tokens}, thinking {think_s} s"
    return {"label": label, "step_s": found, "cycle_s": longest_s, "cycles_beyond_10_percent": more_cycles}


def print_tables(result: dict[str, Any]) -> None:
    spread = ("min", "median", "max")
    rows = [[one["label"], *(one[key] for key in spread)] for one in result["planning_cpu_ms"]]
    report.print_table("plan_cycle, CPU ms", ["queued", *spread], rows)
    rows = [
        [one["label"], one["num_rows"], one["first"], *(one[key] for key in spread)] for one in result["heads_cpu_ms"]
    ]
    report.print_table("Reading queue heads, CPU ms", ["queued", "rows", "first", *spread], rows)
    rows = [[one["label"], one["ratios"].get("jain", "not contended")] for one in result["fairness"]]
    rows.append(["three classes of weights", result["weights"]["ratios"]["jain"]])
    report.print_table("Jain's index beside a flooder", ["small tenants", "index"], rows)
    rows = [
        [
            one["label"],
            *(one["step_s"][name]["median"] for name in ("beside 15 others", "beside a flooder")),
            one["cycle_s"],
            *(one["cycles_beyond_10_percent"][name] for name in ("median", "p95")),
        ]
        for one in result["latency"]
    ]
    columns = ["small tenants", "alone s", "flooder s", "cycle s", "cycles over +10 %", "at p95"]
    report.print_table("A small tenant's step", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
