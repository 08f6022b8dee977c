"""Time passes over a real server: what piles up is swept, and a client that was silent goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tinker
from e2e_support import ServerProcess, batch, failure_of, new_key, new_run, train_step

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

SOAK = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "soak.py"
PATIENCE_S = 60.0


def soak(folder: Path, *, seconds: int, clients: int) -> dict[str, Any]:
    """Run the soak to its end; what it measured. Fails when something kept growing."""
    out = folder / "soak.json"
    command = [sys.executable, str(SOAK), "--seconds", str(seconds), "--clients", str(clients), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def check_swept(found: dict[str, Any]) -> None:
    """Less is there at the end than was made."""
    last, num_steps = found["samples"][-1], sum(found["steps"])
    # Two ops, a save and a sample per step, at least.
    assert last["rows of requests"] < 4 * num_steps
    assert last["rows of sampling_sessions"] < num_steps
    assert last["rows of snapshots"] <= 2 * last["rows of models"]
    assert last["rows of results"] <= last["rows of requests"]


@pytest.mark.slow
def test_short_soak(tmp_path: Path) -> None:
    found = soak(tmp_path, seconds=14, clients=3)
    assert sum(found["steps"]) >= 6, "too slow to say anything"
    check_swept(found)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_long_soak(tmp_path: Path) -> None:
    """Ten minutes; `scripts/test -m slow tests/e2e/test_soak.py`."""
    check_swept(soak(tmp_path, seconds=600, clients=4))


def test_silent_client_goes_on_with_the_same_numbers(server: ServerProcess, tmp_path: Path) -> None:
    expected_client = new_run(server.service(), seed=7)
    expected = [train_step(expected_client, batch(seed=step)) for step in range(6)]

    is_put_away = threading.Event()

    def on_log(line: str) -> None:
        if "runs put away" in line and "num_runs=0" not in line:
            is_put_away.set()

    # The SDK's heartbeats come every 10 s: between two of them the session expires, and the next one wakes it.
    settings = {"TREADLE_RETENTION__SWEEP_INTERVAL_S": "0.2", "TREADLE_RETENTION__SESSION_SILENCE_S": "1"}
    with ServerProcess(tmp_path, env=settings, on_log=on_log) as own:
        key = new_key()
        service = own.service(key)
        client = new_run(service, seed=7)
        losses = [train_step(client, batch(seed=step)) for step in range(2)]
        path = client.save_state("kept").result(timeout=PATIENCE_S).path
        for start in (2, 4):
            is_put_away.clear()
            assert is_put_away.wait(PATIENCE_S), "the run never left its worker"
            assert [run.training_run_id for run in runs_of(own, key)] == [client.model_id]
            losses += [train_step(client, batch(seed=step)) for step in range(start, start + 2)]
        assert losses == expected
        loaded = service.create_training_client_from_state_with_optimizer(path).result(timeout=PATIENCE_S)
        assert [train_step(loaded, batch(seed=step)) for step in range(2, 6)] == expected[2:]
        assert not any(run.corrupted for run in runs_of(own, key))


def test_version_that_was_swept_is_never_answered_with_other_weights(tmp_path: Path) -> None:
    is_swept = threading.Event()
    settings = {
        "TREADLE_RETENTION__SWEEP_INTERVAL_S": "0.2",
        "TREADLE_RETENTION__SAMPLER_VERSIONS": "1",
        "TREADLE_RETENTION__SAMPLER_VERSION_S": "1",
    }

    def on_log(line: str) -> None:
        if "sampler_versions=1" in line:
            is_swept.set()

    with ServerProcess(tmp_path, env=settings, on_log=on_log) as own:
        client = own.training_client()
        train_step(client, batch(), lr=0.1)
        old = client.save_weights_and_get_sampling_client().result(timeout=PATIENCE_S)
        expected = sample(old)
        train_step(client, batch(), lr=0.1)
        newest = client.save_weights_and_get_sampling_client().result(timeout=PATIENCE_S)
        of_newest = sample(newest)
        assert is_swept.wait(PATIENCE_S)
        refused = failure_of(ask(old))
        assert refused is not None, expected
        assert refused.category.value == "user"
        assert "no longer kept" in str(refused)
        assert sample(newest) == of_newest


def ask(sampler: tinker.SamplingClient) -> Any:
    params = tinker.SamplingParams(max_tokens=4, seed=1)
    return sampler.sample(tinker.ModelInput.from_ints([1, 2, 3]), num_samples=1, sampling_params=params)


def sample(sampler: tinker.SamplingClient) -> list[int]:
    return list(ask(sampler).result(timeout=PATIENCE_S).sequences[0].tokens)


def runs_of(server: ServerProcess, key: str) -> list[Any]:
    return list(server.rest_client(key).list_training_runs().result(timeout=PATIENCE_S).training_runs)
