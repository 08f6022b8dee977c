"""From a step's result to the first token of the new weights, through the SDK, in a loop that samples every step.

    python scripts/bench/handoff.py [--save] [--rounds 60] [--rank 16]

Three servers on the bundled model, whose rounds take turns: versions handed over in shared memory, the same with the
sampler in a process of its own, and versions that are durable before their save is answered, as it was. A round is one
step, then save_weights_and_get_sampling_client and one token from it. The share of the durable write is the difference
of the first and the last, formed within a round. Every round checks that the token's logprob is not the one of the
round before, or the run is void: it would be the old version. Goal: p50 under 50 ms beyond the gather window.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import report
import tinker
from service import ADAM, MODEL, RESULT_S, SERVE, Service
from tinker import types

from treadle.config import bundled_model_dir
from treadle.config.tree import SchedulerSettings

GOAL_P50_MS = 50.0
# The server as it is, save that its workers get no place in shared memory.
DURABLE_FIRST = (
    sys.executable,
    "-c",
    """
from treadle.executor.messages import WorkerConfig
made = WorkerConfig.__init__
WorkerConfig.__init__ = lambda self, **fields: made(self, **{**fields, "staging_dir": None})
from treadle.cli.app import main
main()
""",
)
SIDES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "shared memory": (SERVE, {}),
    "shared memory, own sampler": (SERVE, {"TREADLE_WORKER__SAMPLERS": "1"}),
    "durable first": (DURABLE_FIRST, {}),
}
PROMPT = types.ModelInput.from_ints([11, 12, 13, 14, 15])
ONE_TOKEN = types.SamplingParams(max_tokens=1, seed=1, temperature=0.0, stop=[])


class Tenant:
    """One run that is sampled behind every step."""

    def __init__(self, url: str, rank: int) -> None:
        service = tinker.ServiceClient(base_url=url, api_key="tml-bench-handoff")
        create = service.create_lora_training_client(base_model=MODEL, rank=rank, seed=1)
        self._client = create.result(timeout=RESULT_S)
        tokens = list(range(20, 53))
        self._data = [
            types.Datum(types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})
        ]
        self._last = 0.0

    def round(self) -> dict[str, float]:
        """Milliseconds of the save, of the sample behind it, and of both."""
        self._client.forward_backward(self._data, "cross_entropy").result(timeout=RESULT_S)
        self._client.optim_step(ADAM).result(timeout=RESULT_S)
        started = time.perf_counter()
        sampler = self._client.save_weights_and_get_sampling_client().result(timeout=RESULT_S)
        saved = time.perf_counter()
        answer = sampler.sample(PROMPT, 1, ONE_TOKEN).result(timeout=RESULT_S)
        ended = time.perf_counter()
        (logprob,) = answer.sequences[0].logprobs or [0.0]
        if logprob in (0.0, self._last):
            raise SystemExit(f"void: logprob {logprob} after {self._last}: these are not the new weights")
        self._last = logprob
        return {"save": (saved - started) * 1e3, "sample": (ended - saved) * 1e3, "both": (ended - started) * 1e3}


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rank", type=int, default=16)
    report.add_arguments(parser)
    args = parser.parse_args()
    context = report.context()
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="bench-handoff-") as folder:
        services = {
            side: Service(bundled_model_dir(), Path(folder) / str(number), command=command, env=env)
            for number, (side, (command, env)) in enumerate(SIDES.items())
        }
        try:
            for service in services.values():
                service.start()
            tenants = {side: Tenant(service.url, args.rank) for side, service in services.items()}
            for tenant in tenants.values():
                for _ in range(5):
                    tenant.round()
            for _ in range(args.rounds):
                for side, tenant in tenants.items():
                    rounds[side].append(tenant.round())
        finally:
            for service in services.values():
                if service.process is not None:
                    service.stop()
    result = _result(context, args, rounds)
    report.write(report.path_of(args, "handoff"), result)
    rows = [
        (side, part, round(found["p50"], 1), round(found["p95"], 1))
        for side, parts in result["milliseconds"].items()
        for part, found in parts.items()
    ]
    report.print_table("From optim_step to the first token of its weights", ["side", "ms of", "p50", "p95"], rows)
    report.print_table("In short", ["what", "value"], list(result["summary"].items()))
    return report.compare(args, result, margin=args.margin or 0.3)


def _result(
    context: dict[str, Any], args: argparse.Namespace, rounds: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    found = {
        side: {part: percentiles([one[part] for one in done]) for part in ("save", "sample", "both")}
        for side, done in rounds.items()
    }
    window_ms = SchedulerSettings().gather_window_ms
    pairs = list(zip(rounds["shared memory"], rounds["durable first"], strict=True))
    durable_ms = statistics.median(before["both"] - now["both"] for now, before in pairs)
    beyond = {side: parts["both"]["p50"] - window_ms for side, parts in found.items()}
    return {
        **context,
        "config": {"rounds": args.rounds, "rank": args.rank, "gather_window_ms": window_ms},
        "milliseconds": found,
        "summary": {
            "goal_p50_ms_beyond_the_window": GOAL_P50_MS,
            **{f"p50_ms_beyond_the_window, {side}": round(value, 1) for side, value in beyond.items()},
            "p50_ms_of_the_durable_write_before": round(durable_ms, 1),
        },
        "ratios": {
            "durable first / shared memory": statistics.median(before["both"] / now["both"] for now, before in pairs)
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
