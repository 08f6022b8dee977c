"""Workers and servers killed at random under training clients: nothing hangs, nothing goes on from older weights.

Until a run's state outlives its worker, a run may end as lost; it then says so and names its newest checkpoint, from
which the client here goes on. Every loss is compared with that of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tinker
from e2e_support import MODEL, ServerProcess, batch, new_key
from tinker import types

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("default", "ignore::ResourceWarning"),
]

NUM_CLIENTS = 4
NUM_KILLS = 40
# How long any call may take while the server is up; a call is bounded by this plus the time to the next readiness.
MAX_WAIT_S = 30.0
ADAM = types.AdamParams(learning_rate=1e-3)


class Client:
    """One tenant that trains the same sequence of batches, whatever happens, and checks what it is told."""

    def __init__(self, server: ServerProcess, index: int, *, seed: int) -> None:
        self.key = new_key()
        self.losses: dict[int, float] = {}
        self.saves: list[tuple[str, int]] = []
        self._num_saves_of_run = 0
        self._server = server
        self._index = index
        self._random = random.Random(seed * 1000 + index)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Train until told to stop. Raises AssertionError at the first thing that is not as it should be."""
        while not is_over():
            try:
                self._train(is_over)
            except tinker.RequestFailedError as error:
                self._check_loss(error)

    def _check_loss(self, error: tinker.RequestFailedError) -> None:
        assert error.category.value == "server", error
        if "was lost" in str(error) and self._num_saves_of_run:
            # Which one is not compared: a save whose answer was lost may be newer than those this client knows.
            assert "its newest checkpoint is tinker://" in str(error), error

    def _train(self, is_over: Callable[[], bool]) -> None:
        """One run, from a fresh start or the newest checkpoint, until it is over or lost."""
        self._num_saves_of_run = 0
        service = self._server.service(self.key)
        if self.saves:
            path, step = self.saves[-1]
            client = service.create_training_client_from_state_with_optimizer(path)
        else:
            step, client = 0, self.new_run(service)
        while not is_over():
            if self._random.random() < 0.2:
                path = client.save_state(f"at-{step}-{self._random.getrandbits(32):x}").result().path
                self.saves.append((path, step))
                self._num_saves_of_run += 1
                continue
            passed = client.forward_backward(self.batch(step), "cross_entropy")
            stepped = client.optim_step(ADAM)
            loss = passed.result().metrics["loss:sum"]
            assert self.losses.setdefault(step, loss) == loss, f"step {step} from other weights than before"
            metrics = stepped.result().metrics
            step += 1
            assert metrics is not None
            assert metrics["step"] == step, "a step was lost or applied twice"

    def new_run(self, service: tinker.ServiceClient) -> tinker.TrainingClient:
        return service.create_lora_training_client(base_model=MODEL, rank=8, seed=self._index)

    def batch(self, step: int) -> list[types.Datum]:
        """The batch of a step; every second client's is split over cycles and its payload is a blob."""
        shape = (24, 200) if self._index % 2 else (2, 24)
        return batch(*shape, seed=self._index * 1000 + step)

    def undisturbed_losses(self) -> dict[int, float]:
        client = self.new_run(self._server.service(new_key()))
        losses = {}
        for step in range(max(self.losses, default=-1) + 1):
            passed = client.forward_backward(self.batch(step), "cross_entropy")
            client.optim_step(ADAM).result()
            losses[step] = passed.result().metrics["loss:sum"]
        return losses


def kill_something(server: ServerProcess, rng: random.Random) -> None:
    """The worker, or the server with its worker; then wait until it serves again."""
    assert server.process is not None
    if rng.random() < 0.5:
        for worker in psutil.Process(server.process.pid).children():
            worker.kill()
    else:
        server.kill()
        server.start()
    time.sleep(rng.uniform(0.1, 4.0))


def test_clients_survive_forty_kills_without_a_wrong_number(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    is_over = threading.Event()
    split = {"TREADLE_SCHEDULER__CYCLE_BUDGET_TOKENS": "2048"}
    with ServerProcess(tmp_path / "data", env=split) as server, ThreadPoolExecutor(NUM_CLIENTS) as threads:
        clients = [Client(server, index, seed=seed) for index in range(NUM_CLIENTS)]
        running = [threads.submit(client.run, is_over.is_set) for client in clients]
        try:
            time.sleep(3.0)
            for _ in range(NUM_KILLS):
                kill_something(server, rng)
        finally:
            is_over.set()
        for future in running:
            # Each ends its last call; a hang is a failure here.
            future.result(timeout=MAX_WAIT_S)
        assert any(client.saves for client in clients)
        for client in clients:
            expected = client.undisturbed_losses()
            assert client.losses == {step: expected[step] for step in client.losses}
        assert server.terminate() == 0
