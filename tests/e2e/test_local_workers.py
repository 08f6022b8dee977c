"""Several local worker processes behind one pool: the official SDK notices nothing but speed."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import tinker
from e2e_support import ServerProcess, batch, logprobs_of, new_key, new_run, train_step
from tinker import types

NUM_STEPS = 6


def workers_of(server: ServerProcess) -> list[int]:
    """Pids of the server's worker processes, in the order of their start."""
    assert server.process is not None
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            ppid = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (folder / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if ppid == server.process.pid and b"treadle.executor.child" in command:
            found.append(int(folder.name))
    return sorted(found)


def train(client: tinker.TrainingClient, seed: int, *, before_step: object = None) -> list[object]:
    """Every number that a short training gives, a sample of its weights among them."""
    numbers: list[object] = []
    for step in range(NUM_STEPS):
        if callable(before_step):
            before_step(step)
        numbers.append(train_step(client, batch(seed=seed + step)))
    numbers.append(logprobs_of(client.forward(batch(seed=seed), "cross_entropy").result(timeout=60)))
    sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
    drawn = sampler.sample(
        types.ModelInput.from_ints([1, 2, 3]), 1, types.SamplingParams(max_tokens=8, seed=seed)
    ).result(timeout=60)
    numbers.append([(list(one.tokens), list(one.logprobs or ())) for one in drawn.sequences])
    return numbers


@pytest.mark.filterwarnings("default", "ignore::ResourceWarning")
def test_two_tenants_on_two_workers_go_on_when_one_of_them_is_killed(tmp_path: Path, server: ServerProcess) -> None:
    expected = [train(new_run(server.service(new_key()), seed=7), tenant) for tenant in (0, 1)]
    with ServerProcess(tmp_path / "data", args=["--workers", "2"]) as two:
        before = workers_of(two)
        assert len(before) == 2
        clients = [new_run(two.service(new_key()), seed=7) for _ in range(2)]
        found: list[list[object]] = [[], []]

        def kill(step: int) -> None:
            if step == NUM_STEPS // 2:
                os.kill(before[0], signal.SIGKILL)

        def run(tenant: int) -> None:
            found[tenant] = train(clients[tenant], tenant, before_step=kill if tenant == 0 else None)

        threads = [threading.Thread(target=run, args=(tenant,)) for tenant in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == expected
        assert two.terminate() == 0
