"""A server under test that can be killed and started again, and the clients that train on it, for benchmarks of deaths.

Knows the official SDK and processes, and nothing of what is measured. Invariant: a client whose step numbers have a gap
or a repetition stops with an error, so that no figure stands for lost work.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import httpx
import psutil
import tinker
from tinker import types

MODEL = "bench/model"
VOCAB = 4096
ADAM = types.AdamParams(learning_rate=1e-3)
RESULT_S = 180
SERVE = (sys.executable, "-m", "treadle.cli")


class Service:
    """`treadle serve` on a data directory and a port that stay the same over restarts."""

    def __init__(
        self, model: Path, data: Path, *, command: Sequence[str] = SERVE, env: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self.data = data
        options = ["serve", "--port", str(port), "--data", str(data), "--model", f"{MODEL}={model}"]
        self._command = [*command, *options]
        self._env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> float:
        """Start, and return at its ready line; the seconds that took."""
        started = time.monotonic()
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self._env
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == f"treadle ready: {self.url}", line
        return time.monotonic() - started

    def kill(self) -> None:
        """SIGKILL of the server; its worker ends by itself. Idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=60)

    def tree(self) -> list[psutil.Process]:
        """The server and its children."""
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def worker(self) -> psutil.Process:
        """The process that computes: of the children the one that has used most; the spare only imports."""
        return max(self.tree()[1:], key=_cpu_s)

    def cpu_s(self) -> float:
        """CPU seconds of all living processes so far."""
        return sum(_cpu_s(process) for process in self.tree())

    def metric(self, name: str) -> float:
        """The sum of a metric's values; 0 when it has none yet."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@dataclass(frozen=True, slots=True)
class Shape:
    """One client's work per step."""

    batch: int = 4
    seqlen: int = 128
    rank: int = 8

    @property
    def num_tokens(self) -> int:
        return self.batch * self.seqlen


class Trainer:
    """One tenant's run: pass and step submitted together, in a plain loop."""

    def __init__(self, index: int, url: str, shape: Shape) -> None:
        rng = random.Random(index)
        self.data = [
            _datum([rng.randrange(10, VOCAB - 10) for _ in range(shape.seqlen + 1)]) for _ in range(shape.batch)
        ]
        service = tinker.ServiceClient(base_url=url, api_key=f"tml-bench-{index}")
        create = service.create_lora_training_client(base_model=MODEL, rank=shape.rank, seed=index)
        self._client = create.result(timeout=RESULT_S)
        self.losses: list[float] = []
        self.completed: list[float] = []

    def step(self) -> None:
        """One step; its loss and the moment at which it was known are kept."""
        passed = self._client.forward_backward(self.data, "cross_entropy")
        stepped = self._client.optim_step(ADAM)
        self.losses.append(passed.result(timeout=RESULT_S).metrics["loss:sum"])
        metrics = stepped.result(timeout=RESULT_S).metrics
        assert metrics is not None
        assert metrics["num_steps"] == len(self.losses), "a step was lost or applied twice"
        self.completed.append(time.monotonic())

    def submit(self, num_requests: int) -> list[Any]:
        """Small passes and steps in turn, none waited for."""
        futures: list[Any] = []
        while len(futures) < num_requests:
            futures.append(self._client.forward_backward(self.data[:1], "cross_entropy"))
            futures.append(self._client.optim_step(ADAM))
        return futures


class Loop(threading.Thread):
    """A trainer that steps until it is told to stop. `error`: what ended it before."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(daemon=True)
        self.trainer = trainer
        self.is_over = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.is_over.is_set():
                self.trainer.step()
        except BaseException as error:
            self.error = error


def _datum(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
