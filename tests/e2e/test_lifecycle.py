"""Starting, stopping, killing and locking a server, as its clients and its operator see it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from e2e_support import MODEL, ServerProcess, batch, failure_of, free_port, logprobs_of, new_key, new_run, train_step
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")


def treadle(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line, run to its end."""
    command = [sys.executable, "-m", "treadle.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def test_health_is_the_process_and_readiness_is_the_pool(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    server.launch()
    try:
        reasons = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                answer = httpx.get(f"{server.url}/readyz", timeout=5)
            except httpx.TransportError:
                continue
            assert httpx.get(f"{server.url}/api/v1/healthz", timeout=5).status_code == 200
            if answer.status_code == 200:
                break
            reasons.append(answer.json())
            time.sleep(0.05)
        assert any(MODEL in str(reason) for reason in reasons), "the pool was never reported as loading"
        server.wait_ready()
    finally:
        server.kill()


def test_sigterm_persists_runs_and_a_restart_continues_them(own_server: ServerProcess) -> None:
    client = own_server.training_client()
    data = batch()
    train_step(client, data)
    # An open gradient is part of the state.
    client.forward_backward(data, "cross_entropy").result(timeout=60)
    expected = logprobs_of(client.forward(data, "cross_entropy").result(timeout=60))
    assert own_server.terminate() == 0
    own_server.start()
    assert logprobs_of(client.forward(data, "cross_entropy").result(timeout=60)) == expected
    metrics = client.optim_step(types.AdamParams()).result(timeout=60).metrics
    assert metrics is not None
    assert metrics["num_steps"] == 2


def test_sigkill_with_queued_ops_loses_none_of_them(own_server: ServerProcess) -> None:
    """50 queued ops of 5 clients, each of which goes on from the very weights it would have had."""
    clients = [own_server.training_client(seed=1) for _ in range(5)]
    for client in clients:
        train_step(client, batch())
    futures = []
    for client in clients:
        for _ in range(5):
            futures.append(client.forward_backward(batch(16, 64), "cross_entropy"))
            futures.append(client.optim_step(types.AdamParams()))
    with own_server.http() as http:
        http.get("healthz")
    time.sleep(0.2)
    own_server.kill()
    own_server.start()
    results = [future.result(timeout=60) for future in futures]
    losses = [result.metrics["loss:sum"] for result in results if isinstance(result, types.ForwardBackwardOutput)]
    # Same seed, same batches: five equal curves.
    assert losses == losses[:5] * 5
    for client in clients:
        metrics = client.optim_step(types.AdamParams())
        assert "without a successful forward_backward" in str(failure_of(metrics))
        client.forward_backward(batch(), "cross_entropy").result(timeout=60)
        metrics = client.optim_step(types.AdamParams()).result(timeout=60).metrics
        assert metrics is not None
        assert metrics["num_steps"] == 7


def test_a_run_that_nothing_has_changed_survives_sigkill(own_server: ServerProcess) -> None:
    """Created but untouched, or just saved: the seed or the checkpoint is exactly the state."""
    service = own_server.service()
    fresh = new_run(service, seed=5)
    saved = new_run(service, seed=5)
    data = batch()
    train_step(saved, data)
    saved.save_state("safe").result(timeout=60)
    expected = [logprobs_of(client.forward(data, "cross_entropy").result(timeout=60)) for client in (fresh, saved)]
    own_server.kill()
    own_server.start()
    for client, before in zip((fresh, saved), expected, strict=True):
        assert logprobs_of(client.forward(data, "cross_entropy").result(timeout=60)) == before
        train_step(client, data)


def test_a_restarted_server_admits_new_runs_before_its_model_is_loaded(own_server: ServerProcess) -> None:
    """SDKs ask for a new run for about a minute only, and a large model takes longer to load."""
    new_run(own_server.service(), seed=5)
    own_server.kill()
    own_server.launch()
    with httpx.Client(base_url=f"{own_server.url}/api/v1", headers={"x-api-key": new_key()}, timeout=30) as http:
        session = None
        while session is None:
            try:
                session = http.post("/create_session", json={"tags": [], "sdk_version": "0.38"})
            except httpx.TransportError:
                time.sleep(0.02)
        body = {
            "session_id": session.json()["session_id"],
            "model_seq_id": 0,
            "base_model": MODEL,
            "lora_config": {"rank": 8},
        }
        answer = http.post("/create_model", json=body)
        is_ready = httpx.get(f"{own_server.url}/readyz").status_code == 200
    assert answer.status_code == 200, answer.text
    assert not is_ready, "the model was loaded by then: this proved nothing"
    own_server.wait_ready()


def test_a_killed_worker_is_replaced(server: ServerProcess) -> None:
    import psutil

    client = server.training_client()
    assert server.process is not None
    # With the spare, which would take its place at once.
    for worker in psutil.Process(server.process.pid).children():
        worker.kill()
    sampler = server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    params = types.SamplingParams(max_tokens=4)
    prompt = types.ModelInput.from_ints([10, 11])
    assert sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result(timeout=60).sequences
    train_step(client, batch())


def test_no_worker_outlives_a_killed_server(own_server: ServerProcess) -> None:
    import psutil

    assert own_server.process is not None
    workers = psutil.Process(own_server.process.pid).children()
    assert workers
    own_server.kill()
    deadline = time.monotonic() + 30
    while left := [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_second_server_on_one_data_directory_refuses(server: ServerProcess) -> None:
    second = treadle("serve", "--port", str(free_port()), "--data", str(server.data_dir))
    assert second.returncode != 0
    assert "another treadle server" in second.stderr
    train_step(server.training_client(), batch())


def test_a_server_that_cannot_start_says_why_in_one_line_and_leaves_no_worker(tmp_path: Path) -> None:
    import psutil

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "file").touch()

    # Workers inherit it; whatever else runs on this machine has not.
    mark = {"THIS_TEST": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        reasons = {
            "could not be loaded": ["--port", "0", "--data", str(tmp_path / "a"), "--model", f"x={tmp_path / 'model'}"],
            "cannot be written": ["--port", "0", "--data", str(tmp_path / "file" / "b")],
            "already in use": ["--port", str(taken.getsockname()[1]), "--data", str(tmp_path / "c")],
        }
        for reason, args in reasons.items():
            refused = treadle("serve", *args, **mark)
            assert refused.returncode == 2, refused.stderr
            (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
            assert reason in line
            assert "Traceback" not in refused.stderr
            assert refused.stdout == ""
    processes = psutil.process_iter(["environ"])
    left = [process for process in processes if mark.items() <= (process.info["environ"] or {}).items()]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive


def test_a_drain_during_the_load_is_quick_and_clean(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    server.launch()
    try:
        with httpx.Client() as http:
            while True:
                try:
                    http.get(f"{server.url}/api/v1/healthz")
                    break
                except httpx.TransportError:
                    time.sleep(0.02)
        began = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - began < 20, "it waited for the model"
    finally:
        server.kill()


def test_open_bind_without_keys_refuses_and_says_how_to_fix_it(tmp_path: Path) -> None:
    refused = treadle("serve", "--host", "0.0.0.0", "--port", "0", "--data", str(tmp_path))
    assert refused.returncode != 0
    assert "treadle keys create" in refused.stderr


def test_first_key_ends_open_mode_within_a_second(own_server: ServerProcess) -> None:
    open_key = new_key()
    train_step(own_server.training_client(open_key), batch())
    created = treadle("keys", "create", "alice", "--data", str(own_server.data_dir))
    assert created.returncode == 0, created.stderr
    match = re.search(r"tml-\S+", created.stdout)
    assert match is not None
    key = match[0]
    time.sleep(1.0)
    with own_server.http(open_key) as http:
        assert http.post("create_session", json={}).status_code == 401
    client = own_server.training_client(key)
    train_step(client, batch())
    runs = own_server.rest_client(key).list_training_runs().result(timeout=60).training_runs
    assert [run.training_run_id for run in runs] == [client.model_id]
    listed = treadle("keys", "list", "--data", str(own_server.data_dir))
    assert "alice" in listed.stdout
    assert key not in listed.stdout
    number = re.search(r"\b(\d+)\b.*alice", listed.stdout)
    assert number is not None
    assert treadle("keys", "revoke", number[1], "--data", str(own_server.data_dir)).returncode == 0
    time.sleep(1.1)
    with own_server.http(key) as http:
        assert http.post("create_session", json={}).status_code == 401
    with own_server.http(open_key) as http:
        assert http.post("create_session", json={}).status_code == 401, "revoking the last key must not open the door"


def test_two_models_are_two_pools(tmp_path: Path) -> None:
    from treadle.config import bundled_model_dir

    args = ["--model", MODEL, "--model", f"second={bundled_model_dir()}"]
    with ServerProcess(tmp_path, args=args) as server:
        names = {
            model.model_name
            for model in server.rest_client(new_key()).get_server_capabilities().result(timeout=60).supported_models
        }
        assert {MODEL, "second"} <= names
        client = new_run(server.service(), base_model="second")
        assert client.get_info().model_data.model_name == "second"
        train_step(client, batch())
        train_step(server.training_client(), batch())
