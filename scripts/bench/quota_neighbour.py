"""What a tenant feels of a neighbour at its quota: one that offers exactly its rate, against ten times that.

    python scripts/bench/quota_neighbour.py [--pairs 8] [--window-s 20] [--json benchmarks/results/NAME.json]

Starts `treadle serve` on the 1M model. The victim trains small steps in a closed loop, with the SDK. The neighbour, in
a process of its own at the lowest priority, sends passes of a fixed size with the SDK at a fixed pace and waits for
none; its quota is trained_tokens_per_minute, its bucket is emptied before each window, and what it has queued goes
after it. Windows of the two paces take turns, the order of each pair is drawn, and the change of the victim's p99 is
formed within a pair: a machine's drift meets both. Goal: the median change is below 10 %.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import httpx
import numpy as np
import report
import tinker
from models import make_model
from service import ADAM, MODEL, RESULT_S, VOCAB, Service
from tinker import types

GOAL = 0.10
VICTIM, NEIGHBOUR = "tml-bench-victim", "tml-bench-neighbour"
# Tokens of one pass of either.
VICTIM_TOKENS, NEIGHBOUR_TOKENS = 64, 256
NUM_RUNS = 4
QUOTA = "trained_tokens_per_minute"
# Of the victim; the last one, of all the server's processes, hardly feels what else the machine does.
FIGURES = ("p50_ms", "p99_ms", "server_cpu_ms_per_step")


class Operator:
    """The admin API of the server under test, as far as quotas go."""

    def __init__(self, url: str, key: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)
        self._admin = {"X-API-Key": key}
        self.tenant_id = str(self._own()["tenant_id"])

    def set(self, limit: int | None) -> None:
        """The neighbour's rate from now on."""
        body = {QUOTA: limit, "max_queued_tokens": 20_000}
        path = f"/admin/v1/quotas/tenant:{self.tenant_id}"
        self._client.put(path, json=body, headers=self._admin).raise_for_status()

    def use(self, quota: str) -> int:
        """What the neighbour uses of a quota."""
        return int(next(one["use"] or 0 for one in self._own()["quotas"] if one["quota"] == quota))

    def _own(self) -> dict[str, Any]:
        answer = self._client.get("/api/v1/quotas", headers={"X-API-Key": NEIGHBOUR}).raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


class Neighbour:
    """The other process: says when its runs are there, and empties the bucket until it is told a pace."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, __file__, "--offer", url]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._heard("ready")

    def _heard(self, word: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line == word, f"the neighbour said {line!r}, not {word!r}"

    def go(self, tokens_per_s: float) -> None:
        """Offer this from now on, until `stop`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens_per_s}\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """End it; what it has queued stays."""
        self._process.kill()
        self._process.wait()


def offer(url: str) -> None:
    """The neighbour's own program."""
    os.nice(19)
    service = tinker.ServiceClient(base_url=url, api_key=NEIGHBOUR)
    clients = [
        service.create_lora_training_client(base_model=MODEL, rank=8, seed=number).result(timeout=RESULT_S)
        for number in range(NUM_RUNS)
    ]
    data = [_datum(random.Random(1), NEIGHBOUR_TOKENS)]
    print("ready", flush=True)
    told: list[float] = []
    listener = threading.Thread(target=lambda: told.append(float(sys.stdin.readline())))
    listener.start()
    while not told:
        _wait_for([client.forward_backward(data, "cross_entropy") for client in clients * 2], told)
    pace = NEIGHBOUR_TOKENS / told[0]
    futures: list[Any] = []
    due = time.monotonic()
    number = 0
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        due += pace
        client = clients[number % NUM_RUNS]
        number += 1
        futures.append(client.forward_backward(data, "cross_entropy"))
        if number % (4 * NUM_RUNS) == 0:
            futures += [each.optim_step(ADAM) for each in clients]


def _wait_for(futures: Sequence[Any], told: Sequence[float]) -> None:
    """Return when these are done, or something was told."""
    for future in futures:
        while not told:
            try:
                future.result(timeout=0.2)
                break
            except TimeoutError:
                continue


def measure(
    service: Service, operator: Operator, victim: Any, *, limit: int, factor: int, window_s: float
) -> dict[str, Any]:
    """The victim's steps in one window beside a neighbour that offers `factor` times its quota."""
    operator.set(limit)
    neighbour = Neighbour(service.url)
    try:
        _until(lambda: operator.use(QUOTA) >= limit * 0.95)
        neighbour.go(factor * limit / 60)
        _steps(victim, warmup_s=0, window_s=window_s / 5)
        cpu_s = service.cpu_s()
        steps = _steps(victim, warmup_s=0, window_s=window_s)
        cpu_s = service.cpu_s() - cpu_s
        queued = operator.use("max_queued_tokens")
    finally:
        neighbour.stop()
        # Without a rate what is left goes quickly, and counts nothing for the next window.
        operator.set(None)
        _until(lambda: operator.use("max_queued_tokens") == 0)
        operator.set(limit)
    return {
        "p50_ms": float(np.percentile(steps, 50)) * 1000,
        "p99_ms": float(np.percentile(steps, 99)) * 1000,
        "steps_ms": [round(step * 1000, 1) for step in steps],
        "neighbours_queued_tokens": queued,
        "server_cpu_ms_per_step": cpu_s * 1000 / len(steps),
    }


def _steps(victim: Any, *, warmup_s: float, window_s: float) -> list[float]:
    data = [_datum(random.Random(2), VICTIM_TOKENS)]
    steps: list[float] = []
    began = time.monotonic()
    while (now := time.monotonic()) < began + warmup_s + window_s:
        passed, stepped = victim.forward_backward(data, "cross_entropy"), victim.optim_step(ADAM)
        passed.result(timeout=RESULT_S)
        stepped.result(timeout=RESULT_S)
        if now >= began + warmup_s:
            steps.append(time.monotonic() - now)
    return steps


def _until(is_so: Any, *, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def _datum(rng: random.Random, num_tokens: int) -> types.Datum:
    tokens = [rng.randrange(10, VOCAB - 10) for _ in range(num_tokens + 1)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * num_tokens},
    )


def changes(pairs: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """By how much ten times the quota changes the victim's figure against once, over the pairs."""
    return report.spread([pair["ten"][key] / pair["once"][key] - 1 for pair in pairs])


def pooled(pairs: Sequence[dict[str, Any]], percent: float) -> dict[str, float]:
    """The same figures over all windows of a kind together, and their change."""
    once, ten = (
        float(np.percentile([step for pair in pairs for step in pair[kind]["steps_ms"]], percent))
        for kind in ("once", "ten")
    )
    return {"once_ms": once, "ten_ms": ten, "change": ten / once - 1}


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    key_file = folder / "admin-key"
    env = {
        "TREADLE_AUTH__METHODS": '["open", "keys"]',
        "TREADLE_AUTH__BOOTSTRAP_KEY_FILE": str(key_file),
        "TREADLE_WORKER__SPARE": "false",
    }
    service = Service(make_model(folder, args.size), folder / "data", env=env)
    service.start()
    pairs: list[dict[str, Any]] = []
    try:
        operator = Operator(service.url, key_file.read_text().strip())
        client = tinker.ServiceClient(base_url=service.url, api_key=VICTIM)
        victim = client.create_lora_training_client(base_model=MODEL, rank=8, seed=1).result(timeout=RESULT_S)
        alone = [statistics.median(_steps(victim, warmup_s=2, window_s=5)) * 1000]
        order = random.Random(args.seed)
        for number in range(args.pairs):
            kinds = [("once", 1), ("ten", 10)]
            order.shuffle(kinds)
            pair: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
            for name, factor in kinds:
                pair[name] = measure(service, operator, victim, limit=args.limit, factor=factor, window_s=args.window_s)
            pairs.append(pair)
            shown = {name: f"{pair[name]['p50_ms']:.0f} / {pair[name]['p99_ms']:.0f} ms" for name, _ in kinds}
            print(f"pair {number + 1}: load {pair['load']}, p50 / p99: {shown}", flush=True)
        assert service.stop() == 0
    finally:
        service.kill()
    found = {"alone_p50_ms": alone[0], "limit": args.limit, "window_s": args.window_s, "pairs": pairs}
    found |= {f"change_of_{key}": changes(pairs, key) for key in FIGURES}
    return found | {"pooled_p50": pooled(pairs, 50), "pooled_p99": pooled(pairs, 99)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--window-s", type=float, default=20)
    parser.add_argument("--limit", type=int, default=24_000, help=f"the neighbour's {QUOTA}")
    parser.add_argument("--size", choices=["tiny", "1m", "27m"], default="1m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offer", default=None, help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.offer is not None:
        offer(args.offer)
        return 0
    result: dict[str, Any] = report.context()
    with tempfile.TemporaryDirectory() as folder:
        result |= run(args, Path(folder))
    rows = [
        [f"pair {number}", *(pair[kind][key] for key in ("p50_ms", "p99_ms") for kind in ("once", "ten"))]
        for number, pair in enumerate(result["pairs"], 1)
    ]
    columns = ["the victim's step, ms", "p50 at 1x", "p50 at 10x", "p99 at 1x", "p99 at 10x"]
    report.print_table(f"Beside a neighbour with {args.limit} tokens per minute", columns, rows)
    for key in FIGURES:
        change = result[f"change_of_{key}"]
        print(f"change of {key}: median {change['median']:+.1%} ({change['min']:+.1%} to {change['max']:+.1%})")
    for percent in (50, 99):
        over_all = result[f"pooled_p{percent}"]
        print(f"p{percent} over all windows: {over_all['once_ms']:.0f} and {over_all['ten_ms']:.0f} ms")
    print(f"median change of p99 below {GOAL:.0%}: {result['change_of_p99_ms']['median'] < GOAL}")
    report.write(report.path_of(args, "quota_neighbour"), result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
