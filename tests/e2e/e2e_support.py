"""Starting, killing and talking to a treadle server from tests."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
import tinker
from backends import ready_s, settings_of
from tinker import types

MODEL = "treadle/tiny"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_key() -> str:
    """A key that no other test uses: in open mode, a tenant of its own."""
    return f"tml-test-{uuid.uuid4().hex}"


class ServerProcess:
    """`treadle serve` as a subprocess. Entering starts it and waits for its ready line.

    Without the worker in reserve, whose imports cost seconds of the machine: tests of how fast a server recovers switch
    it on. on_log: called with each line that the server and its workers write to standard error, in a thread of its
    own; without it they go where the test's own do.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        args: Sequence[str] = (),
        env: dict[str, str] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._args = list(args)
        self._env = {"TREADLE_WORKER__SPARE": "false", **settings_of(data_dir), **(env or {})}
        self._on_log = on_log
        self._lines: queue.Queue[str] = queue.Queue()
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        """Start on the same data and port as before, and wait until every pool serves."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start without waiting."""
        command = [sys.executable, "-m", "treadle.cli", "serve", "--port", str(self.port), "--data", str(self.data_dir)]
        self._lines = queue.Queue()
        self.process = subprocess.Popen(
            [*command, *self._args],
            stdout=subprocess.PIPE,
            stderr=None if self._on_log is None else subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **self._env},
        )
        assert self.process.stdout is not None
        threading.Thread(target=_read, args=(self.process.stdout, self._lines.put), daemon=True).start()
        if self._on_log is not None:
            assert self.process.stderr is not None
            threading.Thread(target=_read, args=(self.process.stderr, self._on_log), daemon=True).start()

    def wait_ready(self) -> None:
        """Return at the ready line."""
        line = self._lines.get(timeout=ready_s())
        assert line == f"treadle ready: {self.url}", line

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=timeout_s)

    def service(self, key: str | None = None) -> tinker.ServiceClient:
        """An SDK client with a key of its own."""
        return tinker.ServiceClient(base_url=self.url, api_key=key or new_key())

    def training_client(self, key: str | None = None, *, rank: int = 8, **options: Any) -> tinker.TrainingClient:
        """A fresh LoRA run on the bundled model."""
        return new_run(self.service(key), rank=rank, **options)

    def rest_client(self, key: str) -> tinker.RestClient:
        """The SDK's client for runs, checkpoints and sessions."""
        return tinker.RestClient(base_url=self.url, api_key=key)

    def http(self, key: str | None = None) -> httpx.Client:
        """Raw HTTP against the API."""
        return httpx.Client(base_url=f"{self.url}/api/v1/", headers={"X-API-Key": key or new_key()}, timeout=60)


def _read(stream: IO[str], on_line: Callable[[str], None]) -> None:
    """Hand over each line, and an empty one at the end."""
    with stream:
        for line in stream:
            on_line(line.strip())
    on_line("")


def new_run(service: tinker.ServiceClient, *, rank: int = 8, **options: Any) -> tinker.TrainingClient:
    """A fresh LoRA run of this client, on the bundled model unless `base_model` says otherwise."""
    return service.create_lora_training_client(**{"base_model": MODEL, "rank": rank, **options}).result(timeout=60)


def datum(tokens: Sequence[int], *, weight: float = 1.0) -> types.Datum:
    """Next-token prediction over `tokens`."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={"target_tokens": list(tokens[1:]), "weights": [weight] * (len(tokens) - 1)},
    )


def batch(num_datums: int = 2, num_tokens: int = 16, *, seed: int = 0) -> list[types.Datum]:
    """Deterministic datums of `num_tokens` positions each."""
    return [datum([(seed * 31 + i * 17 + j * 7) % 900 + 10 for j in range(num_tokens + 1)]) for i in range(num_datums)]


def train_step(client: tinker.TrainingClient, data: list[types.Datum], *, lr: float = 1e-3) -> float:
    """One forward_backward and one optim_step, submitted together; the summed loss."""
    passed = client.forward_backward(data, "cross_entropy")
    stepped = client.optim_step(types.AdamParams(learning_rate=lr))
    loss = passed.result(timeout=60).metrics["loss:sum"]
    stepped.result(timeout=60)
    return float(loss)


def logprobs_of(output: types.ForwardBackwardOutput) -> list[list[float]]:
    """Each datum's logprobs."""
    return [list(fields["logprobs"].tolist()) for fields in output.loss_fn_outputs]


def failure_of(future: Any, *, timeout_s: float = 60) -> tinker.RequestFailedError | None:
    """The failure that a future ends in, or None when it has a result. Other errors are raised."""
    try:
        future.result(timeout=timeout_s)
    except tinker.RequestFailedError as error:
        return error
    return None
