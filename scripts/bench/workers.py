"""What several workers of one pool give: tokens per second of many tenants, and a neighbour's step beside samples.

    python scripts/bench/workers.py [--model 27m] [--rounds 3] [--window-s 12] [--json FILE | --save]

Three servers run side by side, on one thread per worker: one worker, two workers, and one worker with a sampler beside
it. While one is measured the others are idle, and rounds take turns, so that a machine's drift meets all of them.
Training: 8 tenants step in a loop on one worker, then on two; server CPU-seconds are those of all its processes.
Sampling: a tenant steps alone on one worker, then while another one has 8 x 1,024 tokens sampled, by the same worker
and by a sampler of its own. Ratios are formed within a round. Goals: 1.7 times the tokens on two cores; a step of at
most 3 times idle on a shared worker, 1.5 times beside a sampler.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import report
import tinker
from models import make_model
from service import MODEL, RESULT_S, Service, Shape, Trainer
from tinker import types

NUM_TENANTS = 8
NUM_SAMPLES, SAMPLE_TOKENS = 8, 1024
GOALS = {"speedup": 1.7, "shared_step": 3.0, "separate_step": 1.5}
SERVERS = {"one": (1, 0), "two": (2, 0), "apart": (1, 1)}


class Tenant:
    """One run that steps, and what its steps took."""

    def __init__(self, index: int, service: Service, shape: Shape) -> None:
        self._trainer = Trainer(index, service.url, shape)
        self.step_s: list[float] = []

    def step(self) -> None:
        """Pass and step, submitted together."""
        started = time.monotonic()
        self._trainer.step()
        self.step_s.append(time.monotonic() - started)

    def steps_for(self, seconds: float) -> list[float]:
        """Seconds of each step for about so long."""
        ends_at = time.monotonic() + seconds
        return self.steps_while(lambda: time.monotonic() < ends_at)

    def steps_while(self, goes_on: Callable[[], bool]) -> list[float]:
        """Seconds of each step until told otherwise; at least three."""
        self.step_s.clear()
        while goes_on() or len(self.step_s) < 3:
            self.step()
        return list(self.step_s)


def throughput(service: Service, tenants: list[Tenant], shape: Shape, window_s: float) -> dict[str, float]:
    """All tenants at once for so long; what is under way at the end counts with its part of the time."""
    errors: list[BaseException] = []
    started, cpu = time.monotonic(), service.cpu_s()

    def loop(tenant: Tenant) -> None:
        try:
            tenant.steps_for(window_s)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(tenant,), daemon=True) for tenant in tenants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise SystemExit(f"a tenant failed: {errors[0]!r}")
    num_tokens = shape.num_tokens * sum(len(tenant.step_s) for tenant in tenants)
    # Each tenant's rate over its own time: nobody waits for the last step of another.
    rate = sum(shape.num_tokens * len(tenant.step_s) / sum(tenant.step_s) for tenant in tenants)
    wall_s = time.monotonic() - started
    return {
        "tokens_per_s": rate,
        "tokens_per_cpu_s": num_tokens / (service.cpu_s() - cpu),
        "cores_used": (service.cpu_s() - cpu) / wall_s,
    }


class Sampling:
    """A tenant that has 8 x 1,024 tokens of the base model sampled."""

    def __init__(self, service: Service) -> None:
        client = tinker.ServiceClient(base_url=service.url, api_key="tml-bench-sampling")
        self._sampler = client.create_sampling_client(base_model=MODEL).result(timeout=RESULT_S)

    def steps_beside(self, tenant: Tenant, seed: int) -> tuple[list[float], float]:
        """Steps of a neighbour while it lasts, and tokens sampled per second."""
        params = types.SamplingParams(max_tokens=SAMPLE_TOKENS, seed=seed, temperature=1.0)
        started = time.monotonic()
        drawn = self._sampler.sample(types.ModelInput.from_ints([11, 12, 13]), NUM_SAMPLES, params).future()
        # Prefill and the first decode steps are behind it then.
        time.sleep(0.5)
        steps = tenant.steps_while(lambda: not drawn.done())
        result = drawn.result(timeout=RESULT_S)
        num_tokens = sum(len(one.tokens) for one in result.sequences)
        return steps, num_tokens / (time.monotonic() - started)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape = Shape(batch=2, seqlen=64, rank=8)
    model = make_model(folder / "model", args.model)
    with ExitStack() as stack:
        services = {}
        for name, (workers, samplers) in SERVERS.items():
            env = {
                "TREADLE_ENGINE__THREADS": "1",
                "TREADLE_WORKER__COUNT": str(workers),
                "TREADLE_WORKER__SAMPLERS": str(samplers),
                "TREADLE_WORKER__SPARE": "false",
            }
            service = services[name] = Service(model, folder / name, env=env)
            stack.callback(service.kill)
            service.start()
        time.sleep(5)  # the last worker of each is up, and tenants are spread over all
        crowds = {
            name: [Tenant(index, services[name], shape) for index in range(NUM_TENANTS)] for name in ("one", "two")
        }
        victims = {name: Tenant(50, services[name], shape) for name in ("one", "apart")}
        sampling = {name: Sampling(services[name]) for name in ("one", "apart")}
        for tenant in (*crowds["one"], *crowds["two"], *victims.values()):
            tenant.step()
        rounds = []
        for number in range(args.rounds):
            found: dict[str, Any] = {}
            for name in ("one", "two") if number % 2 == 0 else ("two", "one"):
                found[name] = throughput(services[name], crowds[name], shape, args.window_s)
            found["idle_step_s"] = statistics.median(victims["one"].steps_for(args.window_s / 2))
            for name, what in (("one", "shared"), ("apart", "separate")):
                steps, rate = sampling[name].steps_beside(victims[name], seed=number)
                found[f"{what}_step_s"] = statistics.median(steps)
                found[f"{what}_sampled_tokens_per_s"] = rate
            rounds.append(found)
            print(f"round {number + 1}: {found}", flush=True)
    return summed_up(rounds, args.model)


def summed_up(rounds: list[dict[str, Any]], model: str) -> dict[str, Any]:
    def median(of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(of(one) for one in rounds)

    return {
        **report.context(),
        "model": model,
        "rounds": rounds,
        "one_worker": {name: median(lambda r, n=name: r["one"][n]) for name in rounds[0]["one"]},  # type: ignore[misc]
        "two_workers": {name: median(lambda r, n=name: r["two"][n]) for name in rounds[0]["two"]},  # type: ignore[misc]
        "idle_step_s": median(lambda r: r["idle_step_s"]),
        # The inverse of how much longer a step takes: what stands here is better when larger.
        "ratios": {
            "speedup_of_two_workers": median(lambda r: r["two"]["tokens_per_s"] / r["one"]["tokens_per_s"]),
            "idle_to_shared_step": median(lambda r: r["idle_step_s"] / r["shared_step_s"]),
            "idle_to_separate_step": median(lambda r: r["idle_step_s"] / r["separate_step_s"]),
        },
    }


def show(result: dict[str, Any]) -> None:
    ratios = result["ratios"]
    rows = [
        ["8 tenants, two workers to one", ratios["speedup_of_two_workers"], f">= {GOALS['speedup']}"],
        ["step beside samples, one worker", 1 / ratios["idle_to_shared_step"], f"<= {GOALS['shared_step']}"],
        ["step beside samples, sampler apart", 1 / ratios["idle_to_separate_step"], f"<= {GOALS['separate_step']}"],
    ]
    report.print_table(f"Workers, model {result['model']}, one thread each", ["", "ratio", "goal"], rows)
    figures = [[name, result["one_worker"][name], result["two_workers"][name]] for name in result["one_worker"]]
    report.print_table("Training", ["", "one worker", "two workers"], figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "1m", "27m"), default="27m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window-s", type=float, default=12.0)
    report.add_arguments(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    show(result)
    report.write(report.path_of(args, "workers"), result)
    return report.compare(args, result, margin=0.2)


if __name__ == "__main__":
    raise SystemExit(main())
