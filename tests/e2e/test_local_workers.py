"""Several local worker processes behind one pool: the official SDK notices nothing but speed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tinker
from e2e_support import MODEL, ServerProcess, batch, logprobs_of, new_key, new_run, train_step
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


def train(
    client: tinker.TrainingClient, seed: int, *, before_step: object = None, num_steps: int = NUM_STEPS
) -> list[object]:
    """Every number that a short training gives, a sample of its weights among them."""
    numbers: list[object] = []
    for step in range(num_steps):
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default", "ignore::ResourceWarning")
def test_a_pool_is_scaled_while_tenants_train_and_sample(tmp_path: Path, server: ServerProcess) -> None:
    """Up to two workers and a sampler and back; one more dies in between. Not a number differs."""
    num_tenants, num_steps = 4, 30
    expected = [
        train(new_run(server.service(new_key()), seed=7), tenant, num_steps=num_steps) for tenant in range(num_tenants)
    ]
    env = {"TREADLE_AUTH__METHODS": '["keys"]'}
    data = tmp_path / "data"
    keys = [key_of(data, f"user-{number}") for number in range(num_tenants)]
    admin_key = key_of(data, "ops", is_admin=True)
    with (
        ServerProcess(data, env=env) as own,
        httpx.Client(base_url=f"{own.url}/admin/v1/", headers={"X-API-Key": admin_key}, timeout=60) as admin,
        ThreadPoolExecutor(num_tenants) as threads,
    ):

        def scale(workers: int, samplers: int) -> None:
            body = {"pool": MODEL, "workers": workers, "samplers": samplers}
            assert admin.post("pools/scale", json=body).status_code == 200
            wanted = [*map(str, range(workers)), *(f"s{number}" for number in range(samplers))]
            deadline = time.monotonic() + 120
            while True:
                [shown] = [pool for pool in admin.get("pools").json()["pools"] if pool["name"] == MODEL]
                if (
                    [one["name"] for one in shown["workers"] if one["state"] == "up"]
                    == wanted
                    == [one["name"] for one in shown["workers"]]
                ):
                    return
                assert time.monotonic() < deadline, shown["workers"]
                time.sleep(0.2)

        training = [
            threads.submit(train, new_run(own.service(key), seed=7), tenant, num_steps=num_steps)
            for tenant, key in enumerate(keys)
        ]
        scale(2, 1)
        os.kill(workers_of(own)[1], signal.SIGKILL)
        scale(2, 1)
        scale(1, 0)
        scale(1, 1)
        assert [one.result(timeout=300) for one in training] == expected
        assert own.terminate() == 0


def key_of(data: Path, user: str, *, is_admin: bool = False) -> str:
    """A key as `treadle keys create` prints it."""
    command = [sys.executable, "-m", "treadle.cli", "keys", "create", user, "--data", str(data)]
    command += ["--admin"] if is_admin else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return next(word for word in done.stdout.split() if word.startswith("tml-"))
