"""Weights saved without a name, while the blob store is away and processes are killed: the SDK's client samples on."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest
from e2e_support import ServerProcess, batch, train_step
from tinker import types

pytestmark = pytest.mark.slow

PROMPT = types.ModelInput.from_ints([11, 12, 13, 14, 15])
GREEDY = types.SamplingParams(max_tokens=8, seed=1, temperature=0.0, stop=[])


def kill_worker(server: ServerProcess) -> None:
    assert server.process is not None
    for child in psutil.Process(server.process.pid).children():
        child.kill()


def kill_server(server: ServerProcess) -> None:
    server.kill()
    server.start()


def kill_both(server: ServerProcess) -> None:
    kill_worker(server)
    kill_server(server)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("strike", [kill_worker, kill_server, kill_both])
def test_an_answered_save_is_sampled_after_any_death(
    own_server: ServerProcess, strike: Callable[[ServerProcess], None]
) -> None:
    client = own_server.training_client(seed=1)
    data, blobs = batch(), own_server.data_dir / "blobs"
    train_step(client, data, lr=1e-2)
    # No blob can be begun: what is saved now is in memory alone.
    (blobs / ".incoming").rmdir()
    before = set(blobs.rglob("*.safetensors"))
    sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
    (first,) = sampler.sample(PROMPT, 1, GREEDY).result(timeout=60).sequences
    train_step(client, data, lr=1e-2)
    assert set(blobs.rglob("*.safetensors")) == before
    if strike is not kill_worker:
        (blobs / ".incoming").mkdir()
    strike(own_server)
    (again,) = sampler.sample(PROMPT, 1, GREEDY).result(timeout=60).sequences
    assert (list(again.tokens), again.logprobs) == (list(first.tokens), first.logprobs)
    (blobs / ".incoming").mkdir(exist_ok=True)
    wait_for(lambda: bool(set(blobs.rglob("*.safetensors")) - before))
    # And training goes on, with a newer version.
    train_step(client, data, lr=1e-2)
    newer = client.save_weights_and_get_sampling_client().result(timeout=60)
    (other,) = newer.sample(PROMPT, 1, GREEDY).result(timeout=60).sequences
    assert other.logprobs != first.logprobs
    assert own_server.terminate() == 0
