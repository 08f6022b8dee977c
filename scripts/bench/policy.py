"""How long planning one cycle takes, over queues of growing size. Prints one JSON document.

    python scripts/bench/policy.py [--repetitions 20]

The goal is under 20 ms for 10,000 queued ops of 1,000 tenants, so that planning never shows in a cycle.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time

from treadle.domain.ids import ModelId, TenantId, op_request_id
from treadle.domain.ops import OpKind
from treadle.domain.plan import ModelQueue, PolicyInput, PolicyState, QueuedOp
from treadle.scheduler.policy import plan_cycle

SIZES = ((10, 10), (100, 10), (1_000, 10), (10_000, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    repetitions = parser.parse_args().repetitions
    results = []
    for num_tenants, ops_per_tenant in SIZES:
        for pattern in ("accumulating", "stepping"):
            policy_input = make_input(num_tenants, ops_per_tenant, steps=pattern == "stepping")
            times_ms = measure(policy_input, repetitions=repetitions)
            results.append(
                {
                    "num_tenants": num_tenants,
                    "num_ops": num_tenants * ops_per_tenant,
                    "pattern": pattern,
                    "plan_ms_min": round(min(times_ms), 3),
                    "plan_ms_median": round(statistics.median(times_ms), 3),
                    "plan_ms_max": round(max(times_ms), 3),
                }
            )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(
        json.dumps(
            {
                "benchmark": "policy",
                "commit": commit,
                "machine": platform.machine(),
                "python": platform.python_version(),
                "repetitions": repetitions,
                "results": results,
            },
            indent=2,
        )
    )


def make_input(num_tenants: int, ops_per_tenant: int, *, steps: bool) -> PolicyInput:
    """One model per tenant; passes of up to 16 quanta, every second op a step when `steps`."""
    rng = random.Random(0)
    models = []
    for index in range(num_tenants):
        model_id = ModelId(f"session{index}:train:1")
        ops = []
        for seq_id in range(1, ops_per_tenant + 1):
            is_step = steps and seq_id % 2 == 0
            quanta = () if is_step else tuple(rng.randint(16, 2_048) for _ in range(rng.randint(1, 16)))
            kind = OpKind.OPTIM_STEP if is_step else OpKind.FORWARD_BACKWARD
            ops.append(QueuedOp(op_request_id(model_id, seq_id), seq_id, kind, quanta, queued_s=1.0))
        models.append(ModelQueue(model_id, TenantId(f"tenant{index}"), 1, tuple(ops)))
    return PolicyInput(
        models=tuple(models),
        state=PolicyState(),
        budget_tokens=32_768,
        tenant_cap_tokens=8_192,
        gap_wait_s=30.0,
    )


def measure(policy_input: PolicyInput, *, repetitions: int) -> list[float]:
    """Milliseconds per plan, with the state carried on from plan to plan; the first plan is warm-up."""
    state = policy_input.state
    times_ms = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        plan, state = plan_cycle(
            PolicyInput(
                models=policy_input.models,
                state=state,
                budget_tokens=policy_input.budget_tokens,
                tenant_cap_tokens=policy_input.tenant_cap_tokens,
                gap_wait_s=policy_input.gap_wait_s,
            )
        )
        times_ms.append((time.perf_counter() - started) * 1e3)
        assert plan.ops
    return times_ms[1:]


if __name__ == "__main__":
    main()
