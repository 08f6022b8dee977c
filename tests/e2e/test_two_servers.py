"""Two servers on one PostgreSQL: any of them takes any request, one leads, the other takes over. The real SDK."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import tinker
from e2e_support import MODEL, ServerProcess, batch, logprobs_of, new_key, new_run, train_step
from tinker import types

from treadle.testing.postgres import ThrowAwayPostgres

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default", "ignore::ResourceWarning"),
]

NUM_STEPS = 4
# From the death of the leader to the next completed step. The goal is 5 s on a quiet machine.
TAKEOVER_S = 60.0


@dataclass(frozen=True, slots=True)
class Pair:
    """`leader` was first; `standby` serves HTTP and waits for the lease."""

    leader: ServerProcess
    standby: ServerProcess


@pytest.fixture
def pair(postgres_url: str, tmp_path: Path) -> Iterator[Pair]:
    """Each has a data directory of its own and shares the blobs, as on two machines."""
    env = {
        "TREADLE_STORE__URL": postgres_url,
        "TREADLE_BLOBS__URL": str(tmp_path / "blobs"),
        "TREADLE_WORKER__SPARE": "true",
    }
    leader, standby = (ServerProcess(tmp_path / name, env=env) for name in ("a", "b"))
    with leader, standby:
        yield Pair(leader, standby)


def losses_of(client: tinker.TrainingClient, steps: range) -> list[float]:
    return [train_step(client, batch(seed=step)) for step in steps]


def sampled(service: tinker.ServiceClient) -> list[int]:
    sampler = service.create_sampling_client(base_model=MODEL).result(timeout=60)
    params = types.SamplingParams(max_tokens=8, seed=5)
    answer = sampler.sample(types.ModelInput.from_ints([10, 11, 12]), num_samples=1, sampling_params=params)
    return list(answer.result(timeout=60).sequences[0].tokens)


def test_any_gateway_serves_and_a_takeover_changes_no_number(pair: Pair) -> None:
    # The same run, undisturbed, through the leader itself.
    oracle = new_run(pair.leader.service(), seed=7)
    expected = losses_of(oracle, range(NUM_STEPS))
    last = logprobs_of(oracle.forward(batch(), "cross_entropy").result(timeout=60))
    for server in (pair.leader, pair.standby):
        assert httpx.get(f"{server.url}/readyz").status_code == 200

    service = pair.standby.service(new_key())
    client = new_run(service, seed=7)
    assert client.get_info().model_data.model_name == MODEL
    assert losses_of(client, range(2)) == expected[:2]
    assert sampled(service) == sampled(pair.leader.service())
    saved = client.save_state("early").result(timeout=60).path

    # A step is on its way when the leader dies.
    passed = client.forward_backward(batch(seed=2), "cross_entropy")
    stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
    pair.leader.kill()
    died = time.monotonic()
    assert passed.result(timeout=TAKEOVER_S).metrics["loss:sum"] == expected[2]
    metrics = stepped.result(timeout=TAKEOVER_S).metrics
    assert metrics is not None
    assert metrics["num_steps"] == 3
    print(f"takeover to the next completed step: {time.monotonic() - died:.2f} s")
    assert losses_of(client, range(3, NUM_STEPS)) == expected[3:]
    assert logprobs_of(client.forward(batch(), "cross_entropy").result(timeout=60)) == last
    assert sampled(service)

    # Checkpoints are found from the other server, and the first one comes back as a standby.
    resumed = service.create_training_client_from_state_with_optimizer(saved).result(timeout=60)
    assert losses_of(resumed, range(2, 3)) == expected[2:3]
    pair.leader.start()
    assert httpx.get(f"{pair.leader.url}/readyz").status_code == 200
    through_standby = new_run(pair.leader.service(), seed=7)
    assert losses_of(through_standby, range(1)) == expected[:1]
    # SIGTERM hands over: what the leader held is persisted, the other one goes on from it.
    assert pair.standby.terminate() == 0
    assert losses_of(through_standby, range(1, 2)) == expected[1:2]


def test_a_database_that_restarts_under_load_costs_time_only(pair: Pair, postgres: ThrowAwayPostgres) -> None:
    expected = losses_of(new_run(pair.leader.service(), seed=3), range(NUM_STEPS))
    clients = [new_run(server.service(), seed=3) for server in (pair.leader, pair.standby)]
    losses = [losses_of(client, range(1)) for client in clients]
    running = []
    for client in clients:
        running.append([])
        for step in range(1, 3):
            running[-1].append(client.forward_backward(batch(seed=step), "cross_entropy"))
            client.optim_step(types.AdamParams(learning_rate=1e-3))
    postgres.stop()
    try:
        with pair.standby.http() as http:
            began = time.monotonic()
            answer = http.post("create_session", json={"sdk_version": "0.38.0", "tags": [], "user_metadata": {}})
            assert answer.status_code == 503
            assert "database does not answer" in answer.text
            assert time.monotonic() - began < 10, "it hung instead of answering"
        for server in (pair.leader, pair.standby):
            assert httpx.get(f"{server.url}/readyz", timeout=10).status_code == 503
            assert httpx.get(f"{server.url}/api/v1/healthz", timeout=10).status_code == 200
    finally:
        postgres.start()
    for client, first, futures in zip(clients, losses, running, strict=True):
        first += [future.result(timeout=TAKEOVER_S).metrics["loss:sum"] for future in futures]
        first += losses_of(client, range(3, NUM_STEPS))
        assert first == expected


def used(server: ServerProcess, key: str) -> dict[str, float]:
    """What the tenant used in these hours, by kind: tokens, or how many."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    # The hour before as well: it may have turned since the work was done.
    since, before = ((hour + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ") for hours in (-1, 1))
    with server.http(key) as http:
        answer = http.get("billing/usage/events", params={"starting_on": since, "ending_before": before})
    totals: Counter[str] = Counter()
    for event in answer.raise_for_status().json()["data"]:
        info = event["event_info"]
        totals[info["type"]] += info.get("token_count", info.get("count", 0))
    return dict(totals)


def test_what_one_gateway_began_the_other_goes_on_with(pair: Pair) -> None:
    """Tokens, signed URLs, cancels and usage do not depend on which gateway is asked."""
    key = new_key()
    service = pair.standby.service(key)
    client = new_run(service)
    for server, other in ((pair.leader, pair.standby), (pair.standby, pair.leader)):
        with server.http(key) as http:
            token = http.post("auth/token", json={}).raise_for_status().json()["jwt"]
        with other.http(token) as http:
            assert http.get("auth/apikey/me").raise_for_status().json()["details"]["org_details"]["name"]
            assert http.get("sessions").raise_for_status().json()["sessions"]

    train_step(client, batch())
    exported = client.save_weights_external("shared").result(timeout=60).path
    urls = pair.leader.rest_client(key).get_external_weights_urls(exported).result(timeout=60).urls
    for url in urls.values():
        here, there = (httpx.get(url.replace(pair.leader.url, server.url)) for server in (pair.leader, pair.standby))
        assert here.status_code == there.status_code == 200
        assert here.content == there.content

    sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
    prompt, params = {"chunks": [{"type": "encoded_text", "tokens": [10, 11]}]}, {"max_tokens": 1_500, "stop": []}
    with pair.standby.http(key) as asks, pair.leader.http(key) as cancels:
        body = {"sampling_session_id": sampler._sampling_session_id, "sampling_params": params, "prompt": prompt}
        endless = asks.post("asample", json={**body, "seq_id": 7_000_000_000}).raise_for_status().json()["request_id"]
        # Long enough for the leader's worker to be at it.
        time.sleep(0.3)
        for http in (cancels, asks):
            assert http.post("cancel_future", json={"request_id": endless}).status_code == 200
        for http in (asks, cancels):
            answer = http.post("retrieve_future", json={"request_id": endless}).json()
            assert answer["category"] == "user"
            assert "cancelled" in answer["error"]

    last = sampler.sample(types.ModelInput.from_ints([10, 11, 12]), 2, types.SamplingParams(max_tokens=5, stop=[]))
    assert [len(sequence.tokens) for sequence in last.result(timeout=60).sequences] == [5, 5]
    expected = {"training": 32, "checkpoint": 1, "sampling_prefill": 3, "sampling_sample": 10}
    assert used(pair.leader, key) == used(pair.standby, key) == expected
    # Nothing is counted again by whoever takes over.
    pair.leader.kill()
    train_step(client, batch())
    assert used(pair.standby, key) == {**expected, "training": 64}
