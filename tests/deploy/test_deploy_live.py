"""Everything that compose.yaml runs, run here by its own commands, under the real SDK. No containers are needed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker
from deploy_stack import Stack, can_contain
from tinker import types

from treadle.blobs import open_blobs
from treadle.config import load_settings
from treadle.testing.postgres import why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.postgres,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default", "ignore::ResourceWarning"),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

PATIENCE_S = 180.0
MODEL = "treadle/tiny"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """All services without a profile, in the order that their dependencies ask for."""
    with Stack(tmp_path) as stack:
        for name in ("secrets", "postgres", "minio", "bucket", "ray-head", "ray-worker", "gateway"):
            if name in ("secrets", "bucket"):
                done = stack.run(name)
                assert done.returncode == 0, done.stderr
            else:
                stack.start(name)
        yield stack


def data(seed: int) -> list[types.Datum]:
    tokens = [(seed * 31 + j * 7) % 900 + 10 for j in range(17)]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 16}
    return [types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)]


def step(client: tinker.TrainingClient, seed: int) -> float:
    passed = client.forward_backward(data(seed), "cross_entropy")
    stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
    loss = passed.result(timeout=PATIENCE_S).metrics["loss:sum"]
    stepped.result(timeout=PATIENCE_S)
    return float(loss)


def new_run(stack: Stack, key: str) -> tuple[tinker.ServiceClient, tinker.TrainingClient]:
    service = tinker.ServiceClient(base_url=stack.url, api_key=key)
    return service, service.create_lora_training_client(base_model=MODEL, rank=8, seed=3).result(timeout=PATIENCE_S)


def test_services_of_compose_train_sample_and_survive(stack: Stack) -> None:
    # The first key: shown once, by its own service, and by nothing else.
    shown = stack.run("first-key")
    assert shown.returncode == 0, shown.stderr
    key = shown.stdout.strip()
    assert key.startswith("tml-")
    again = stack.run("first-key")
    assert (again.returncode, again.stdout) == (1, "")
    assert "shown before" in again.stderr

    # Training, sampling and a checkpoint, on a worker that Ray placed.
    service, client = new_run(stack, key)
    losses = [step(client, seed) for seed in range(3)]
    assert losses[0] > 0
    saved = client.save_state("here").result(timeout=PATIENCE_S).path
    sampler = client.save_weights_and_get_sampling_client().result(timeout=PATIENCE_S)
    prompt = types.ModelInput.from_ints([10, 11, 12])
    params = types.SamplingParams(max_tokens=8, seed=5)
    drawn = sampler.sample(prompt, 1, params).result(timeout=PATIENCE_S).sequences[0].tokens
    assert len(drawn) == 8
    assert "Ray cluster ready" in stack.log("gateway")
    settings = load_settings(stack.folder / "etc/treadle.toml")
    assert any(True for _ in open_blobs(settings.blobs_url).iter_keys()), "checkpoints are in the bucket"
    assert not (settings.data_dir / "blobs").exists()
    assert not (settings.data_dir / "treadle.db").exists(), "the queue is in PostgreSQL"

    # A restart of the server is a pause.
    logprobs = (
        client.forward(data(7), "cross_entropy").result(timeout=PATIENCE_S).loss_fn_outputs[0]["logprobs"].tolist()
    )
    assert stack.terminate("gateway") == 0
    stack.start("gateway")
    after = client.forward(data(7), "cross_entropy").result(timeout=PATIENCE_S).loss_fn_outputs[0]["logprobs"].tolist()
    assert after == logprobs, "the very same bits"

    # So is the end of a Ray node with the worker on it.
    stack.kill("ray-worker")
    passed = client.forward_backward(data(3), "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-3))
    stack.start("ray-worker")
    losses.append(float(passed.result(timeout=PATIENCE_S).metrics["loss:sum"]))

    # The same numbers as a run that nothing happened to.
    _, undisturbed = new_run(stack, key)
    assert [step(undisturbed, seed) for seed in range(4)] == losses
    resumed = service.create_training_client_from_state_with_optimizer(saved).result(timeout=PATIENCE_S)
    assert step(resumed, 3) == losses[3]

    # Metrics, with the key that Prometheus gets.
    made = stack.run("metrics-key")
    assert made.returncode == 0, made.stderr
    assert made.stdout == "", "the key is in its file only"
    file = stack.folder / "run/metrics/key"
    assert stack.run("metrics-key").returncode == 0, "a second start changes nothing"
    answer = httpx.get(f"{stack.url}/metrics", headers={"Authorization": f"Bearer {file.read_text().strip()}"})
    assert "treadle_cycles_total" in answer.text
    assert httpx.get(f"{stack.url}/metrics").status_code == 401

    # Passwords and keys are in their files, for those who may read them, and in no log.
    secrets = [key, file.read_text().strip(), *(
        (stack.folder / "run" / name).read_text().strip() for name in ("postgres/password", "s3/password", "ray/token")
    )]  # fmt: skip
    for name in ("postgres", "minio", "ray-head", "ray-worker", "gateway"):
        log = stack.log(name)
        assert not [secret for secret in secrets if secret in log], name
    for name in ("postgres/pgpass", "s3/credentials", "ray/token"):
        assert stat.S_IMODE(os.stat(stack.folder / "run" / name).st_mode) == 0o600
    assert stack.terminate("gateway") == 0


def test_head_that_restarts_is_a_pause(stack: Stack) -> None:
    if not can_contain():
        pytest.skip("without namespaces, Ray takes the nodes that are left for a running head")
    key = stack.run("first-key").stdout.strip()
    _, client = new_run(stack, key)
    losses = [step(client, seed) for seed in range(2)]
    stack.kill("ray-head")
    # Docker starts it again, and every node that has lost it.
    passed = client.forward_backward(data(2), "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-3))
    stack.kill("ray-worker")
    stack.start("ray-head")
    stack.start("ray-worker")
    losses.append(float(passed.result(timeout=PATIENCE_S).metrics["loss:sum"]))
    stack.wait_healthy("gateway")
    _, undisturbed = new_run(stack, key)
    assert [step(undisturbed, seed) for seed in range(3)] == losses
