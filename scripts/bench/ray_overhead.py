"""What Ray adds to a cycle, and how long the pause is after an actor was killed, beside the local executor's.

    python scripts/bench/ray_overhead.py [--save] [--rounds 120] [--kills 3]

One worker of each kind on the bundled model with one thread, both loaded, driven by hand (no server). A round is one
cycle with one forward and backward and one step on each side, in turns; the overhead is the difference of the two
within a round. Then each is killed while it holds a run, and the time until a new worker has restored the run from its
snapshot and has done its next step is the pause. All numbers of both sides are equal to the bit, or the run is void.
Goals: the median overhead under 10 ms, the pause within 8 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report

from treadle.blobs.local import LocalBlobs
from treadle.config import ExecutorSettings, bundled_model_dir
from treadle.errors import WorkerDied
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.executor.ray import RayCluster, RayExecutor
from treadle.executor.spare import Spare
from treadle.testing.driver import Driver, pass_logprobs, started
from treadle.testing.executor_contract import LORA, Run

GOAL_OVERHEAD_MS, GOAL_PAUSE_S = 10.0, 8.0
WARM_UP = 10
# A spare is started two seconds after its worker; its imports and its warm-up take the rest.
SPARE_READY_S = 20.0
MakeExecutor = Callable[[], LocalExecutor | RayExecutor]


async def step_of(driver: Driver, run: Run, seed: int) -> tuple[float, np.ndarray]:
    """One cycle of a pass and a step: seconds, and the pass's logprobs."""
    backward, step = run.backward(seed=seed), run.step()
    started_at = time.perf_counter()
    passed, stepped = await driver.run(backward, step)
    seconds = time.perf_counter() - started_at
    assert passed.failure is None, passed.failure
    assert stepped.failure is None, stepped.failure
    return seconds, pass_logprobs(passed)[0]


async def overhead(local: MakeExecutor, ray: MakeExecutor, rounds: int) -> dict[str, Any]:
    """Cycles in turns."""
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    async with started(local()) as on_local, started(ray()) as on_ray:
        sides = {"local": (on_local, Run(on_local)), "ray": (on_ray, Run(on_ray))}
        for driver, run in sides.values():
            await driver.run(run.create())
        for index in range(WARM_UP + rounds):
            numbers = {}
            for name, (driver, run) in sides.items():
                took_s, numbers[name] = await step_of(driver, run, index)
                if index >= WARM_UP:
                    seconds[name].append(took_s)
            assert np.array_equal(numbers["local"], numbers["ray"]), "the two sides disagree: the run is void"
    added = [1000 * (ray_s - local_s) for local_s, ray_s in zip(seconds["local"], seconds["ray"], strict=True)]
    return {
        "local_ms": report.spread([1000 * value for value in seconds["local"]]),
        "ray_ms": report.spread([1000 * value for value in seconds["ray"]]),
        "overhead_ms": report.spread(added),
        "overhead_p95_ms": statistics.quantiles(added, n=20)[-1],
    }


async def pause(make: MakeExecutor) -> dict[str, float]:
    """Seconds from the kill to the death, to a worker that has loaded, and to the next step's result."""
    async with started(make()) as driver:
        run, undisturbed = await Run(driver).trained(), await Run(driver).trained()
        key = await driver.snapshot(run.tag(2))
        restore = driver.restore_item(run.tag(2), LORA, key)
        _, expected = await step_of(driver, undisturbed, 5)
        await asyncio.sleep(SPARE_READY_S)
        assert driver.executor.pid is not None  # type: ignore[attr-defined]
        killed_at = time.perf_counter()
        os.kill(driver.executor.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with contextlib.suppress(WorkerDied):
            while True:
                await driver.executor.evict([])
        died_s = time.perf_counter() - killed_at
        facts = driver.facts
    async with started(make()) as driver:
        loaded_s = time.perf_counter() - killed_at
        assert driver.facts == facts
        run.driver = driver
        await driver.run_cycle(restores=[restore])
        _, numbers = await step_of(driver, run, 5)
        pause_s = time.perf_counter() - killed_at
    assert np.array_equal(numbers, expected), "the restored run is not the undisturbed one"
    return {"death_s": died_s, "loaded_s": loaded_s, "pause_s": pause_s}


async def measure(directory: Path, rounds: int, kills: int) -> dict[str, Any]:
    """Everything, on one cluster."""
    LocalBlobs(directory / "blobs")
    config = WorkerConfig(
        base_model="treadle/tiny",
        source=str(bundled_model_dir()),
        revision=None,
        device="cpu",
        dtype="float32",
        num_threads=1,
        blobs_url=str(directory / "blobs"),
        max_running_samples=16,
        max_cached_tokens=0,
        log_level="warning",
    )
    cluster, spare = RayCluster(ExecutorSettings(kind="ray"), log_level="warning"), Spare()

    def local() -> LocalExecutor:
        return LocalExecutor(config, name="local", spare=spare)

    def ray() -> RayExecutor:
        return RayExecutor(config, name="ray", cluster=cluster)

    try:
        results: dict[str, Any] = {"cycle": await overhead(local, ray, rounds)}
        pauses: dict[str, list[dict[str, float]]] = {"local": [], "ray": []}
        for _ in range(kills):
            pauses["local"].append(await pause(local))
            pauses["ray"].append(await pause(ray))
    finally:
        spare.stop()
        await cluster.stop()
    results["pause"] = {
        name: {key: report.spread([one[key] for one in of_side]) for key in of_side[0]}
        for name, of_side in pauses.items()
    }
    results["ratios"] = {
        "goal over overhead": GOAL_OVERHEAD_MS / max(results["cycle"]["overhead_ms"]["median"], 0.001),
        "goal over pause": GOAL_PAUSE_S / results["pause"]["ray"]["pause_s"]["median"],
    }
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--kills", type=int, default=3)
    report.add_arguments(parser)
    arguments = parser.parse_args()
    document = {"context": report.context()}
    with tempfile.TemporaryDirectory() as directory:
        document |= asyncio.run(measure(Path(directory), arguments.rounds, arguments.kills))
    cycle, paused = document["cycle"], document["pause"]
    rows = [
        ["cycle, local", f"{cycle['local_ms']['median']:.2f} ms", ""],
        ["cycle, ray", f"{cycle['ray_ms']['median']:.2f} ms", ""],
        ["added by ray, median", f"{cycle['overhead_ms']['median']:.2f} ms", f"< {GOAL_OVERHEAD_MS:.0f} ms"],
        ["added by ray, p95", f"{cycle['overhead_p95_ms']:.2f} ms", ""],
    ]
    for name in ("local", "ray"):
        goal = f"< {GOAL_PAUSE_S:.0f} s" if name == "ray" else ""
        rows += [
            [f"kill to death, {name}", f"{paused[name]['death_s']['median']:.2f} s", ""],
            [f"kill to next step, {name}", f"{paused[name]['pause_s']['median']:.2f} s", goal],
        ]
    report.print_table("Ray beside the local executor", ["", "median", "goal"], rows)
    report.write(report.path_of(arguments, "ray_overhead"), document)
    return report.compare(arguments, document, margin=0.5)


if __name__ == "__main__":
    sys.exit(main())
