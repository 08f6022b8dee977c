"""The whole server under the official SDK: what 1, 4 and 8 clients get out of it, and what it costs.

    python scripts/bench/server.py [--json benchmarks/results/NAME.json]

Starts `treadle serve` on the 1M model, runs clients of 4 x 128 tokens at rank 8 (forward_backward and optim_step
submitted together), and beside it, in the same run, the bare PEFT loop as the ceiling to compare with.
Server CPU-seconds are those of all its processes; losses must fall, or the run is void. Two waits are measured on the
idle server: what a step takes beyond its compute, and how long after a step the first token of its weights comes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import httpx
import numpy as np
import psutil
import report
import tinker
from models import make_model
from tinker import types

from treadle.domain.ids import ModelId
from treadle.domain.losses import resolve_loss
from treadle.domain.ops import Datum, PassOp
from treadle.wire.passes import encode_pass

MODEL = "bench/model"
VOCAB = 4096
RESULT_S = 120


@dataclass(frozen=True)
class Load:
    """One client's work per step, and how many steps are timed after the warm-up."""

    batch: int
    seqlen: int
    rank: int
    steps: int
    warmup: int


class BenchServer:
    """`treadle serve` and its process tree."""

    def __init__(self, model: Path, data: Path) -> None:
        command = [sys.executable, "-m", "treadle.cli", "serve", "--port", "0", "--data", str(data)]
        started = time.monotonic()
        self.process = subprocess.Popen(
            [*command, "--model", f"{MODEL}={model}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().removeprefix("treadle ready: ")
        self.ready_s = time.monotonic() - started
        self.peak_rss = 0
        self._watch = threading.Thread(target=self._watch_memory, daemon=True)
        self._watch.start()

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU seconds of all processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

    def _watch_memory(self) -> None:
        while self.process.poll() is None:
            try:
                self.peak_rss = max(self.peak_rss, sum(process.memory_info().rss for process in self._tree()))
            except psutil.Error:
                return
            time.sleep(0.2)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=30)


class Client(threading.Thread):
    """One tenant that trains behind a barrier with the others."""

    def __init__(self, index: int, server: BenchServer, load: Load, barrier: threading.Barrier) -> None:
        super().__init__(daemon=True)
        rng = random.Random(index)
        self.data = [_datum([rng.randrange(10, VOCAB - 10) for _ in range(load.seqlen + 1)]) for _ in range(load.batch)]
        service = tinker.ServiceClient(base_url=server.url, api_key=f"tml-bench-{index}")
        self.trainer = service.create_lora_training_client(base_model=MODEL, rank=load.rank).result(timeout=RESULT_S)
        self.load = load
        self.barrier = barrier
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(self.load.warmup):
                self._step()
            self.barrier.wait()
            self.step_s.clear()
            for _ in range(self.load.steps):
                self._step()
            self.barrier.wait()
        except BaseException as error:
            self.error = error
            self.barrier.abort()

    def _step(self) -> None:
        started = time.monotonic()
        passed = self.trainer.forward_backward(self.data, "cross_entropy")
        stepped = self.trainer.optim_step(types.AdamParams(learning_rate=1e-3))
        self.losses.append(passed.result(timeout=RESULT_S).metrics["loss:sum"])
        stepped.result(timeout=RESULT_S)
        self.step_s.append(time.monotonic() - started)


def _datum(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def train(server: BenchServer, load: Load, num_clients: int) -> dict[str, float]:
    """Timed steps of `num_clients` clients at once."""
    barrier = threading.Barrier(num_clients + 1)
    clients = [Client(index, server, load, barrier) for index in range(num_clients)]
    for client in clients:
        client.start()
    try:
        barrier.wait()
        started, cpu = time.monotonic(), server.cpu_s()
        barrier.wait()
    except threading.BrokenBarrierError:
        raise SystemExit(f"a client failed: {[client.error for client in clients if client.error]}") from None
    wall_s, cpu_s = time.monotonic() - started, server.cpu_s() - cpu
    for client in clients:
        assert client.losses[-1] < client.losses[0], "the loss did not fall: the figures are void"
    steps = sorted(value for client in clients for value in client.step_s)
    num_tokens = num_clients * load.steps * load.batch * load.seqlen
    return {
        "tokens_per_cpu_s": num_tokens / cpu_s,
        "tokens_per_s": num_tokens / wall_s,
        "steps_per_s": num_clients * load.steps / wall_s,
        "step_p50_s": _percentile(steps, 50),
        "step_p95_s": _percentile(steps, 95),
    }


def _percentile(ordered: Sequence[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def create_model_s(server: BenchServer, repetitions: int) -> list[float]:
    """Seconds from POST create_model to get_info's answer, on an existing session, over raw HTTP."""
    taken = []
    with httpx.Client(base_url=f"{server.url}/api/v1/", headers={"X-API-Key": "tml-bench-create"}, timeout=60) as http:
        session_id = http.post("create_session", json={"sdk_version": "0.38.0"}).json()["session_id"]
        for index in range(repetitions):
            body = {"session_id": session_id, "model_seq_id": index, "base_model": MODEL, "lora_config": {"rank": 8}}
            started = time.monotonic()
            request_id = http.post("create_model", json=body).json()["request_id"]
            while (answer := http.post("retrieve_future", json={"request_id": request_id})).status_code == 408:
                pass
            info = http.post("get_info", json={"model_id": answer.json()["model_id"]})
            taken.append(time.monotonic() - started)
            assert info.json()["lora_rank"] == 8
    return taken


def idle_overhead_s(server: BenchServer, repetitions: int) -> list[float]:
    """Wall seconds of one small step on an idle server minus what its worker computed, step by step.

    The SDK's own time is in it. The gather window is not waited for, because the optim_step is there at once.
    """
    load = Load(batch=1, seqlen=16, rank=8, steps=repetitions, warmup=3)
    client = Client(90, server, load, threading.Barrier(1))
    overheads = []
    for _ in range(load.warmup + repetitions):
        computed = _computed_s(server)
        client._step()
        overheads.append(client.step_s[-1] - (_computed_s(server) - computed))
    return overheads[load.warmup :]


def idle_request_overhead_s(server: BenchServer, repetitions: int) -> list[float]:
    """The same over raw HTTP, without the SDK: from the first byte of the pass to the result of the step."""
    overheads = []
    with httpx.Client(base_url=f"{server.url}/api/v1/", headers={"X-API-Key": "tml-bench-raw"}, timeout=60) as http:

        def result_of(submitted: httpx.Response) -> dict[str, Any]:
            body = {"request_id": submitted.raise_for_status().json()["request_id"]}
            while (answer := http.post("retrieve_future", json=body)).status_code == 408:
                pass
            return answer.json() if "json" in answer.headers["content-type"] else {}

        session_id = http.post("create_session", json={"sdk_version": "0.38.0"}).json()["session_id"]
        body = {"session_id": session_id, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 8}}
        model_id = result_of(http.post("create_model", json=body))["model_id"]
        tokens = np.arange(10, 26, dtype=np.int32)
        datum = Datum(tokens=tokens, inputs={"target_tokens": tokens.astype(np.int64)})
        for seq_id in range(1, 2 * repetitions, 2):
            op = PassOp(ModelId(model_id), seq_id, (datum,), resolve_loss("cross_entropy", {}), forward_only=False)
            step = {"model_id": model_id, "seq_id": seq_id + 1, "adam_params": {"learning_rate": 1e-3}}
            computed, started = _computed_s(server), time.monotonic()
            passed = http.post("forward_backward", content=encode_pass(op))
            stepped = http.post("optim_step", json=step)
            for submitted in (passed, stepped):
                assert "error" not in result_of(submitted)
            overheads.append(time.monotonic() - started - (_computed_s(server) - computed))
    return overheads


def first_token_s(server: BenchServer, repetitions: int) -> list[float]:
    """Seconds from an optim_step's result to the first token sampled from the weights it made, with the SDK.

    That is save_weights_and_get_sampling_client, and a sample of one token.
    """
    client = Client(91, server, Load(batch=1, seqlen=16, rank=8, steps=repetitions, warmup=1), threading.Barrier(1))
    prompt = types.ModelInput.from_ints(list(range(10, 26)))
    params = types.SamplingParams(max_tokens=1, seed=1, stop=[])
    taken = []
    for _ in range(1 + repetitions):
        client._step()
        started = time.monotonic()
        sampler = client.trainer.save_weights_and_get_sampling_client().result(timeout=RESULT_S)
        response = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result(timeout=RESULT_S)
        taken.append(time.monotonic() - started)
        assert len(response.sequences[0].tokens) == 1
    return taken[1:]


def _computed_s(server: BenchServer) -> float:
    text = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": "tml-bench-90"}).text
    lines = [line for line in text.splitlines() if line.startswith("treadle_cycle_seconds_sum")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def sampled_tokens_per_s(server: BenchServer, num_samples: int, num_tokens: int) -> float:
    """Tokens per second of samples that all run at once, each with a prompt of 16 tokens."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-bench-sample")
    sampler = service.create_sampling_client(base_model=MODEL).result(timeout=RESULT_S)
    rng = random.Random(0)

    def sample(index: int) -> int:
        prompt = types.ModelInput.from_ints([rng.randrange(10, VOCAB - 10) for _ in range(16)])
        params = types.SamplingParams(max_tokens=num_tokens, seed=index, stop=[])
        response = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result(timeout=RESULT_S)
        return sum(len(sequence.tokens) for sequence in response.sequences)

    with ThreadPoolExecutor(num_samples) as threads:
        list(threads.map(sample, range(num_samples)))
        started = time.monotonic()
        num_sampled = sum(threads.map(sample, range(num_samples)))
        return num_sampled / (time.monotonic() - started)


def peft_tokens_per_cpu_s(model: Path, load: Load, repetitions: int) -> list[float]:
    """The bare PEFT loop of one tenant, in a process of its own."""
    script = Path(__file__).with_name("peft_baseline.py")
    options = ["--batch", str(load.batch), "--seqlen", str(load.seqlen), "--rank", str(load.rank)]
    runs = [
        subprocess.run([sys.executable, script, model, *options], capture_output=True, text=True, check=True)
        for _ in range(repetitions)
    ]
    return [float(json.loads(run.stdout.splitlines()[-1])["tokens_per_cpu_s"]) for run in runs]


def repeated(measure: Callable[[], dict[str, float]], repetitions: int) -> dict[str, dict[str, float]]:
    """Each figure's spread over repetitions."""
    runs = [measure() for _ in range(repetitions)]
    return {name: report.spread([run[name] for run in runs]) for name in runs[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--size", choices=["1m", "27m"], default="1m")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    load = Load(batch=4, seqlen=128, rank=8, steps=args.steps, warmup=3)
    result: dict[str, Any] = {**report.context(), "config": vars(load) | {"model": args.size}}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), args.size)
        peft = peft_tokens_per_cpu_s(model, load, args.repetitions)
        server = BenchServer(model, Path(folder) / "data")
        try:
            result["ready_s"] = server.ready_s
            result["peft_tokens_per_cpu_s"] = report.spread(peft)
            result["create_model_s"] = report.spread(create_model_s(server, 10))
            result["idle_overhead_s"] = report.spread(idle_overhead_s(server, 20))
            result["idle_request_overhead_s"] = report.spread(idle_request_overhead_s(server, 20))
            result["first_token_s"] = report.spread(first_token_s(server, 10))
            result["clients"] = {
                str(count): repeated(lambda count=count: train(server, load, count), args.repetitions)  # type: ignore[misc]
                for count in args.clients
            }
            result["sampled_tokens_per_s"] = {
                str(count): sampled_tokens_per_s(server, count, 64) for count in (1, 8, 32)
            }
            result["peak_rss_mb"] = server.peak_rss / 2**20
        finally:
            result["exit_status"] = server.stop()
    show(result, statistics.median(peft))
    report.write(args.json, result)
    return 0


def show(result: dict[str, Any], peft: float) -> None:
    """The tables."""
    names = ("tokens_per_cpu_s", "tokens_per_s", "steps_per_s", "step_p50_s", "step_p95_s")
    rows = []
    for count, figures in result["clients"].items():
        medians = [figures[name]["median"] for name in names]
        rows.append([count, *medians, medians[0] / peft, peft / medians[0]])
    columns = ["clients", "tok/CPU-s", "tok/s", "steps/s", "p50 s", "p95 s", "x bare PEFT", "CPU-s / bare PEFT's"]
    report.print_table("Training, 4 x 128 tokens per step, rank 8 (medians)", columns, rows)
    facts = [
        ["bare PEFT, tokens per CPU-second", peft],
        ["create_model to get_info, s", result["create_model_s"]["median"]],
        ["idle step beyond its compute, with the SDK, s", result["idle_overhead_s"]["median"]],
        ["idle step beyond its compute, raw HTTP, s", result["idle_request_overhead_s"]["median"]],
        ["optim_step done to first token of its weights, SDK, s", result["first_token_s"]["median"]],
        ["ready, s", result["ready_s"]],
        ["peak RSS of all processes, MB", result["peak_rss_mb"]],
        *[[f"sampled tokens/s, {count} at once", value] for count, value in result["sampled_tokens_per_s"].items()],
    ]
    report.print_table("The rest (medians)", ["figure", "value"], facts)


if __name__ == "__main__":
    raise SystemExit(main())
