"""What clients feel when a process dies: SIGKILL of the worker, of the server, and a restart with a long queue.

    python scripts/bench/recovery.py [--save] [--kills 20] [--restarts 5] [--queued 1000]

Eight clients train on the 1M model (4 x 128 tokens per step, rank 8) with the official SDK, in plain loops. A pause is
the time between a client's last completed step before a kill and its next one; it includes an ordinary step, whose
median stands beside it. Workers are killed twice over: so far apart that the spare is ready again, which the goal is
for, and in a row, where the next worker may have to import everything first. After a server's death most of a pause is
the SDK's own: it waits 1, 2, 4 and more seconds between tries. Every client checks that its step numbers have no gap
and no repetition, or the run is void.
"""

from __future__ import annotations

import argparse
import signal
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import report
from models import make_model
from service import RESULT_S, Loop, Service, Shape, Trainer

NUM_CLIENTS = 8
# Steps of every client between two kills, so that each kill meets clients that are under way again; and as many as it
# takes until the next spare worker has its imports done.
STEPS_BETWEEN = 5
STEPS_TO_SPARE = 40
GOAL_WORKER_P95_S = 5.0


def train_on(loops: Sequence[Loop], num_steps: int) -> None:
    """Return once every client has completed so many more steps."""
    wanted = [len(loop.trainer.completed) + num_steps for loop in loops]
    deadline = time.monotonic() + RESULT_S
    while any(len(loop.trainer.completed) < count for loop, count in zip(loops, wanted, strict=True)):
        errors = [loop.error for loop in loops if loop.error is not None]
        if errors or time.monotonic() > deadline:
            raise SystemExit(f"void: {errors or 'a client hangs'}")
        time.sleep(0.01)


def pauses(
    loops: Sequence[Loop], strike: Callable[[], None], repetitions: int, *, steps_between: int = STEPS_BETWEEN
) -> list[float]:
    """The pause of every client at every one of so many deaths."""
    found: list[float] = []
    for _ in range(repetitions):
        train_on(loops, steps_between)
        at = time.monotonic()
        strike()
        # One may have completed between the moment and the blow.
        train_on(loops, 2)
        found += [_pause(loop.trainer.completed, at) for loop in loops]
    return found


def _pause(completed: Sequence[float], at: float) -> float:
    """The longest time between two completed steps of which the second is behind a moment, two steps on."""
    first = next(index for index, one in enumerate(completed) if one > at)
    around = completed[first - 1 : first + 2]
    return max(later - earlier for earlier, later in pairwise(around))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        "max": ordered[-1],
        "count": len(ordered),
    }


def ordinary_step_s(loops: Sequence[Loop]) -> dict[str, float]:
    """What a step takes while nobody dies."""
    train_on(loops, STEPS_BETWEEN)
    counts = [len(loop.trainer.completed) for loop in loops]
    train_on(loops, 2 * STEPS_BETWEEN)
    steps = []
    for loop, count in zip(loops, counts, strict=True):
        steps += [later - earlier for earlier, later in pairwise(loop.trainer.completed[count - 1 :])]
    return percentiles(steps)


def restart_with_queue(service: Service, trainers: Sequence[Trainer], num_requests: int) -> dict[str, float]:
    """A server that is killed with so many acknowledged requests in its queue: all must complete after the restart."""
    worker = service.worker()
    # Nothing is computed while the queue fills.
    worker.send_signal(signal.SIGSTOP)
    futures = [trainer.submit(-(-num_requests // len(trainers))) for trainer in trainers]
    deadline = time.monotonic() + RESULT_S
    while (num_queued := _num_queued(service.data)) < num_requests:
        assert time.monotonic() < deadline, f"only {num_queued} requests were queued"
        time.sleep(0.02)
    killed_at = time.monotonic()
    service.kill()
    worker.kill()
    ready_s = service.start()
    results = [[future.result(timeout=RESULT_S) for future in ours] for ours in futures]
    complete_s = time.monotonic() - killed_at
    for ours, trainer in zip(results, trainers, strict=True):
        steps = [result.metrics["num_steps"] for result in ours[1::2]]
        before = len(trainer.losses)
        assert steps == [before + 1 + index for index in range(len(steps))], "a step was lost or applied twice"
    return {"queued": num_queued, "ready_s": ready_s, "all_complete_s": complete_s}


def _num_queued(data: Path) -> int:
    """Acknowledged requests that are not over."""
    with closing(sqlite3.connect(data / "treadle.db")) as database:
        (count,) = database.execute("SELECT count(*) FROM requests WHERE state = 'queued'").fetchone()
    return int(count)


def measure(service: Service, args: argparse.Namespace) -> dict[str, Any]:
    """Everything, in the order of how much it disturbs what comes after."""
    shape = Shape()
    trainers = [Trainer(index, service.url, shape) for index in range(NUM_CLIENTS)]
    loops = [Loop(trainer) for trainer in trainers]
    for loop in loops:
        loop.start()
    found: dict[str, Any] = {"config": asdict(shape) | {"clients": NUM_CLIENTS, "model": args.size}}
    found["ordinary_step_s"] = ordinary_step_s(loops)

    def kill_worker() -> None:
        service.worker().kill()

    apart = pauses(loops, kill_worker, args.kills, steps_between=STEPS_TO_SPARE)
    found["worker_death_pause_s"] = percentiles(apart)
    found["worker_deaths_in_a_row_pause_s"] = percentiles(pauses(loops, kill_worker, args.kills))
    ready_s: list[float] = []

    def restart() -> None:
        service.kill()
        ready_s.append(service.start())

    found["server_death_pause_s"] = percentiles(pauses(loops, restart, args.restarts))
    found["server_ready_s"] = report.spread(ready_s)
    for loop in loops:
        loop.is_over.set()
    for loop in loops:
        loop.join(timeout=RESULT_S)
        assert loop.error is None, loop.error
    found["restart_with_queue"] = restart_with_queue(service, trainers, args.queued)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of the worker")
    parser.add_argument("--restarts", type=int, default=5, help="kills of the server")
    parser.add_argument("--queued", type=int, default=1000)
    parser.add_argument("--size", choices=["tiny", "1m", "27m"], default="1m")
    report.add_arguments(parser)
    args = parser.parse_args()
    result: dict[str, Any] = report.context()
    with tempfile.TemporaryDirectory() as folder:
        service = Service(make_model(Path(folder), args.size), Path(folder) / "data")
        result["first_ready_s"] = service.start()
        try:
            result |= measure(service, args)
            result["exit_status"] = service.stop()
        finally:
            service.kill()
    show(result)
    report.write(report.path_of(args, "recovery"), result)
    return 0


def show(result: dict[str, Any]) -> None:
    """The table."""
    names = {
        "an ordinary step": "ordinary_step_s",
        f"worker killed, {STEPS_TO_SPARE} steps apart": "worker_death_pause_s",
        f"worker killed, {STEPS_BETWEEN} steps apart": "worker_deaths_in_a_row_pause_s",
        "server killed": "server_death_pause_s",
    }
    rows = [[name, *(result[key][part] for part in ("p50", "p95", "max", "count"))] for name, key in names.items()]
    report.print_table("Pauses of eight clients, seconds", ["what", "p50", "p95", "max", "count"], rows)
    queue = result["restart_with_queue"]
    print(
        f"restart with {queue['queued']} queued requests: ready after {queue['ready_s']:.1f} s, "
        f"all complete {queue['all_complete_s']:.1f} s after the kill"
    )
    is_met = result["worker_death_pause_s"]["p95"] < GOAL_WORKER_P95_S
    print(f"worker death p95 under {GOAL_WORKER_P95_S} s: {is_met}; load at start {result['load_average_at_start']}")


if __name__ == "__main__":
    raise SystemExit(main())
