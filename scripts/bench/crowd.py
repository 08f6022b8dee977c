"""Two hundred samples at once through the SDK, again and again: no error, how long they take, and what memory it costs.

    python scripts/bench/crowd.py [--save] [--samples 200] [--tokens 32] [--rounds 5]

`treadle serve` on the bundled model; half of the samples are of the base model, half of an adapter that was just handed
over. Each round submits all of them at once and waits for each; the first one is for warming up and is not quoted.
Memory is the resident set of the server and of its worker: before the first round, the peak within each round, sampled
twenty times a second, and after each. Growth is what a round leaves behind over the round before it. Every sample must
have its tokens, and equal seeds equal tokens in every round, or the run is void.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import psutil
import report
import tinker
from service import ADAM, MODEL, RESULT_S, Service
from tinker import types

from treadle.config import bundled_model_dir

WATCH_EVERY_S = 0.05
PROMPT = types.ModelInput.from_ints(list(range(20, 36)))


class Memory(threading.Thread):
    """The most that each process holds, in MiB, until `stop`."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        super().__init__(daemon=True)
        self._processes = processes
        self._stopped = threading.Event()
        self.peak = dict.fromkeys(processes, 0.0)

    def run(self) -> None:
        """Look again and again."""
        while True:
            for name, held in resident(self._processes).items():
                self.peak[name] = max(self.peak[name], held)
            if self._stopped.wait(WATCH_EVERY_S):
                return

    def stop(self) -> dict[str, float]:
        """The peaks."""
        self._stopped.set()
        self.join()
        return self.peak


def resident(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: process.memory_info().rss / 2**20 for name, process in processes.items()}


def crowd(samplers: list[tinker.SamplingClient], num_samples: int, num_tokens: int) -> tuple[list[float], list[Any]]:
    """Seconds until each sample's answer, and the tokens of each."""
    started = time.monotonic()
    ended = [0.0] * num_samples
    futures: list[Any] = []

    def note(index: int) -> Any:
        return lambda _: ended.__setitem__(index, time.monotonic() - started)

    for index in range(num_samples):
        params = types.SamplingParams(max_tokens=num_tokens, seed=index, stop=[])
        future = samplers[index % len(samplers)].sample(PROMPT, 1, params).future()
        future.add_done_callback(note(index))
        futures.append(future)
    answers = [future.result(timeout=RESULT_S) for future in futures]
    tokens = [list(answer.sequences[0].tokens) for answer in answers]
    if any(len(one) != num_tokens for one in tokens):
        raise SystemExit("void: a sample has not all of its tokens")
    return ended, tokens


def adapter_of(service: tinker.ServiceClient) -> tinker.SamplingClient:
    """Weights of one step, handed over a moment ago."""
    training = service.create_lora_training_client(base_model=MODEL, rank=16, seed=1).result(timeout=RESULT_S)
    tokens = list(range(20, 53))
    datum = types.Datum(types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})
    training.forward_backward([datum], "cross_entropy").result(timeout=RESULT_S)
    training.optim_step(ADAM).result(timeout=RESULT_S)
    return training.save_weights_and_get_sampling_client().result(timeout=RESULT_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="at least three; the first one is not quoted")
    report.add_arguments(parser)
    args = parser.parse_args()
    context = report.context()
    with tempfile.TemporaryDirectory(prefix="bench-crowd-") as folder:
        server = Service(bundled_model_dir(), Path(folder) / "data", env={"TREADLE_WORKER__SPARE": "false"})
        try:
            server.start()
            rounds, before = _rounds(server, args)
        finally:
            if server.process is not None:
                server.stop()
    quoted = rounds[1:]
    growth = {
        name: statistics.median(later["after"][name] - earlier["after"][name] for earlier, later in pairwise(quoted))
        for name in before
    }
    result = {
        **context,
        "config": {"samples": args.samples, "tokens": args.tokens, "rounds": args.rounds},
        "before_mib": before,
        "rounds": rounds,
        "growth_mib_per_round": growth,
        "errors": 0,
        "ratios": {},
    }
    report.write(report.path_of(args, "crowd"), result)
    columns = ["round", "all s", "p50 s", "p95 s", "tokens/s", *(f"{name} peak, after" for name in before)]
    rows = [
        (
            str(number) if number else "warm-up",
            *(round(one[what], 2) for what in ("all_s", "p50_s", "p95_s")),
            round(one["tokens_per_s"]),
            *(f"{one['peak'][name]:.0f}, {one['after'][name]:.0f}" for name in before),
        )
        for number, one in enumerate(rounds)
    ]
    report.print_table(f"{args.samples} samples of {args.tokens} tokens at once (MiB)", columns, rows)
    report.print_table(
        "Memory in MiB", ["process", "before", "growth per round"], [(n, before[n], growth[n]) for n in before]
    )
    return 0


def _rounds(server: Service, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    client = tinker.ServiceClient(base_url=server.url, api_key="tml-bench-crowd")
    base = client.create_sampling_client(base_model=MODEL).result(timeout=RESULT_S)
    samplers = [base, adapter_of(client)]
    assert server.process is not None
    processes = {"server": psutil.Process(server.process.pid), "worker": server.worker()}
    before = resident(processes)
    rounds: list[dict[str, Any]] = []
    first: list[Any] = []
    for _ in range(args.rounds):
        memory = Memory(processes)
        memory.start()
        seconds, tokens = crowd(samplers, args.samples, args.tokens)
        peak = memory.stop()
        first = first or tokens
        if tokens != first:
            raise SystemExit("void: equal seeds had other tokens")
        seconds.sort()
        rounds.append(
            {
                "all_s": seconds[-1],
                "p50_s": statistics.median(seconds),
                "p95_s": seconds[len(seconds) * 95 // 100],
                "tokens_per_s": args.samples * args.tokens / seconds[-1],
                "peak": peak,
                "after": resident(processes),
            }
        )
    return rounds, before


if __name__ == "__main__":
    raise SystemExit(main())
