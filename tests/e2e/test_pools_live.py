"""A second model comes, is paused, resumed and removed under a live server, with the official SDK as its client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from e2e_support import MODEL, ServerProcess, batch, failure_of, logprobs_of, new_run, train_step
from tinker import types

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default", "ignore::ResourceWarning")]

PATIENCE_S = 90.0
SECOND = "lab/second"


@dataclass
class Operated:
    """A server with keys, and an operator's client."""

    server: ServerProcess
    admin: httpx.Client
    user_key: str

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.admin.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def pool(self, name: str) -> dict[str, Any]:
        answer = self.admin.get("pools")
        assert answer.status_code == 200, answer.text
        return next((dict(pool) for pool in answer.json()["pools"] if pool["name"] == name), {})

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, what
            time.sleep(0.1)

    def command(self, run_id: str, verb: str) -> dict[str, Any]:
        command_id = self.post(f"runs/{run_id}/{verb}")["command_id"]
        found: dict[str, Any] = {}

        def is_over() -> bool:
            found.update(self.admin.get(f"commands/{command_id}").json())
            return found["state"] != "open"

        self.until(is_over, f"{verb} of {run_id}")
        return found


def new_key(data_dir: Path, user: str, *, is_admin: bool = False, env: dict[str, str] | None = None) -> str:
    """A key as `treadle keys create` prints it."""
    command = [sys.executable, "-m", "treadle.cli", "keys", "create", user, "--data", str(data_dir)]
    command += ["--admin"] if is_admin else []
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **(env or {})})
    return next(word for word in done.stdout.split() if word.startswith("tml-"))


@pytest.fixture
def operated(own_server: ServerProcess) -> Iterator[Operated]:
    admin_key = new_key(own_server.data_dir, "ops", is_admin=True)
    user_key = new_key(own_server.data_dir, "alice")
    url = f"{own_server.url}/admin/v1/"
    with httpx.Client(base_url=url, headers={"X-API-Key": admin_key}, timeout=60) as admin:
        yield Operated(own_server, admin, user_key)


def served_models(operated: Operated) -> set[str | None]:
    capabilities = operated.server.rest_client(operated.user_key).get_server_capabilities().result(timeout=60)
    return {model.model_name for model in capabilities.supported_models}


def losses_of(client: tinker.TrainingClient, steps: range) -> list[float]:
    return [train_step(client, batch(seed=step)) for step in steps]


@pytest.mark.slow
def test_a_second_model_comes_and_goes_under_a_live_server(operated: Operated) -> None:
    service = operated.server.service(operated.user_key)
    undisturbed = new_run(service, seed=7)
    expected = losses_of(undisturbed, range(4))
    last = logprobs_of(undisturbed.forward(batch(), "cross_entropy").result(timeout=60))

    # Added: the SDK finds it, and trains on it.
    operated.post("pools", pool=SECOND, source=MODEL)
    operated.until(lambda: bool(operated.pool(SECOND)["is_ready"]), "the second model is ready")
    assert SECOND in served_models(operated)
    client = new_run(service, base_model=SECOND, seed=7)
    assert losses_of(client, range(2)) == expected[:2]
    run_id = client.model_id

    # Paused: the client waits, and is told why.
    operated.post("pools/pause", pool=SECOND, reason="new disks")
    passed = client.forward_backward(batch(seed=2), "cross_entropy")
    stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
    operated.until(lambda: operated.admin.get(f"runs/{run_id}").json()["queued"]["num_ops"] == 2, "both are admitted")
    with operated.server.http(operated.user_key) as http:
        shown = http.get(f"treadle/requests/{run_id}:5").json()
        held = http.post("retrieve_future", json={"request_id": f"{run_id}:5"})
    assert shown["state"] == "queued", shown
    assert shown["reason"] == f"base model {SECOND} is paused by an operator: new disks"
    assert held.status_code == 408
    assert (held.json()["queue_state"], held.json()["queue_state_reason"]) == ("paused_capacity", shown["reason"])
    # The other model does not notice, and a snapshot is taken all the same.
    assert losses_of(new_run(service, seed=7), range(1)) == expected[:1]
    assert operated.command(run_id, "snapshot")["state"] == "done"

    # Evicted in the pause and resumed: not a bit is different.
    evicted = operated.command(run_id, "evict")
    assert evicted["state"] == "done", evicted
    operated.until(lambda: operated.admin.get(f"runs/{run_id}").json()["is_resident"] is False, "it left the worker")
    operated.post("pools/resume", pool=SECOND)
    assert passed.result(timeout=60).metrics["loss:sum"] == expected[2]
    stepped.result(timeout=60)
    assert losses_of(client, range(3, 4)) == expected[3:]
    saved = client.save_state("kept").result(timeout=60).path

    # Removed: persisted, not served, and over a restart too; added again, it goes on.
    operated.post("pools/remove", pool=SECOND, reason="its machine is needed")
    refusal = failure_of(client.forward_backward(batch(), "cross_entropy"))
    assert refusal is not None
    assert "not served" in str(refusal)
    assert SECOND not in served_models(operated)
    operated.until(lambda: operated.pool(SECOND)["leader"] is None, "its leader has let go")
    assert operated.server.terminate() == 0
    operated.server.start()
    assert operated.pool(SECOND)["state"] == "removed"
    assert httpx.get(f"{operated.server.url}/readyz").status_code == 200
    operated.post("pools", pool=SECOND)
    operated.until(lambda: bool(operated.pool(SECOND)["is_ready"]), "it is back")
    resumed = operated.server.service(operated.user_key).create_training_client_from_state(saved).result(timeout=60)
    assert logprobs_of(resumed.forward(batch(), "cross_entropy").result(timeout=60)) == last

    audited = operated.admin.get("audit", params={"subject": f"pool:{SECOND}"}).json()["events"]
    events = [entry["event"] for entry in audited]
    assert sorted(events) == ["pool.added", "pool.added", "pool.paused", "pool.removed", "pool.resumed"]


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_nothing(operated: Operated) -> None:
    operated.post("pools", pool="lab/nothing", source="/nowhere/at/all")
    operated.until(lambda: "does not exist" in operated.pool("lab/nothing")["not_ready_reason"], "it says why")
    assert operated.pool("lab/nothing")["is_ready"] is False
    assert httpx.get(f"{operated.server.url}/readyz").status_code == 200
    new_run(operated.server.service(operated.user_key))
    # A pool of the settings can be removed as well, and stays so over a restart.
    operated.post("pools/remove", pool="lab/nothing")
    operated.post("pools/remove", pool=MODEL, reason="closed")
    operated.until(lambda: operated.pool(MODEL)["leader"] is None, "it is let go")
    assert operated.server.terminate() == 0
    operated.server.start()
    assert operated.pool(MODEL)["state"] == "removed"
    operated.post("pools", pool=MODEL)
    operated.until(lambda: bool(operated.pool(MODEL)["is_ready"]), "it is back")
    new_run(operated.server.service(operated.user_key))


@pytest.mark.slow
@pytest.mark.postgres
def test_two_servers_follow_one_operator(postgres_url: str, tmp_path: Path) -> None:
    """Asked of the standby, done by the leader; what the leader leaves undone, the next one does."""
    env = {"TREADLE_STORE__URL": postgres_url, "TREADLE_BLOBS__URL": str(tmp_path / "blobs")}
    leader, standby = (ServerProcess(tmp_path / name, env=env) for name in ("a", "b"))
    with leader, standby:
        keys = [new_key(leader.data_dir, user, is_admin=user == "ops", env=env) for user in ("ops", "alice")]
        headers = {"X-API-Key": keys[0]}
        with httpx.Client(base_url=f"{standby.url}/admin/v1/", headers=headers, timeout=60) as admin:
            operated = Operated(standby, admin, keys[1])
            client = new_run(standby.service(keys[1]), seed=7)
            expected = losses_of(new_run(leader.service(keys[1]), seed=7), range(3))
            assert losses_of(client, range(1)) == expected[:1]
            holder = operated.pool(MODEL)["leader"]

            asked_at = time.monotonic()
            operated.post("pools/pause", pool=MODEL, reason="upkeep")
            with httpx.Client(base_url=f"{leader.url}/admin/v1/", headers=headers, timeout=60) as there:
                names = ("state", "reason")
                operated.until(
                    lambda: (
                        [tuple(pool[name] for name in names) for pool in there.get("pools").json()["pools"]]
                        == [("paused", "upkeep")]
                    ),
                    "the other server follows",
                )
            print(f"a pause was seen by the other server after {time.monotonic() - asked_at:.2f} s")
            passed = client.forward_backward(batch(seed=1), "cross_entropy")
            stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
            assert operated.command(client.model_id, "snapshot")["state"] == "done"

            leader.kill()
            operated.until(lambda: operated.pool(MODEL)["leader"] not in (None, holder), "the standby leads")
            operated.until(lambda: bool(operated.pool(MODEL)["is_ready"]), "it has loaded")
            assert operated.command(client.model_id, "evict")["state"] == "done"
            assert operated.admin.get(f"runs/{client.model_id}").json()["queued"]["num_ops"] == 2, "still paused"
            operated.post("pools/resume", pool=MODEL)
            assert passed.result(timeout=60).metrics["loss:sum"] == expected[1]
            stepped.result(timeout=60)
            assert losses_of(client, range(2, 3)) == expected[2:]
