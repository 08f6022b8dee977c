"""The engine behind a real server: all losses, mixture-of-experts models, idle runs, long datums, a lost device."""

from __future__ import annotations

import math
import os
import stat
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tinker
from e2e_support import MODEL, ServerProcess, batch, datum, failure_of, logprobs_of, new_key, new_run, train_step
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

STEP_METRICS = {"grad_norm", "update_norm", "num_steps", "learning_rate", "skipped_passes"}
LENGTH = 6


def policy_datum(seed: int, **extra: Any) -> types.Datum:
    """A datum for the policy losses, its sampling logprobs close to those of an untrained model."""
    rng = np.random.default_rng(seed)
    row = rng.integers(10, 150, LENGTH + 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(row[:-1].tolist()),
        loss_fn_inputs={
            "target_tokens": row[1:].tolist(),
            "logprobs": rng.normal(-6.9, 0.3, LENGTH).astype(np.float32),
            "advantages": rng.normal(size=LENGTH).astype(np.float32),
            **extra,
        },
    )


CLIPS = {
    "clip_low_threshold": [0.0, 0.1, 0.0, 0.2, 0.0, 0.0],
    "clip_high_threshold": [9.0, 8.0, 9.0, 9.0, 7.0, 9.0],
}
LOSSES: dict[str, tuple[list[types.Datum], dict[str, float] | None]] = {
    "cross_entropy": (batch(2, LENGTH), None),
    "importance_sampling": ([policy_datum(1), policy_datum(2)], None),
    "ppo": ([policy_datum(3), policy_datum(4, **CLIPS)], {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}),
    "cispo": ([policy_datum(5, **CLIPS), policy_datum(6)], {"clip_high_threshold": 5.0}),
    "dro": ([policy_datum(7), policy_datum(8)], {"beta": 0.1}),
    "gspo": ([policy_datum(9, **CLIPS, sequence_ratio_mask=[0.0, 1.0, 1.0, 0.0, 1.0, 1.0])], None),
}


def run_loss(client: tinker.TrainingClient, loss_fn: str) -> types.ForwardBackwardOutput:
    data, config = LOSSES[loss_fn]
    return client.forward_backward(data, loss_fn, config).result(timeout=60)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_every_loss_trains_and_its_step_says_what_it_did(server: ServerProcess, loss_fn: str) -> None:
    client = server.training_client()
    before = run_loss(client, loss_fn)
    assert [len(row) for row in logprobs_of(before)] == [LENGTH] * len(LOSSES[loss_fn][0])
    # One that is refused, so that the step has something to count.
    assert failure_of(client.forward_backward([datum([10, 10**6, 11])], "cross_entropy")) is not None
    metrics = client.optim_step(types.AdamParams(learning_rate=2e-3)).result(timeout=60).metrics
    assert metrics is not None
    assert metrics.keys() == STEP_METRICS
    assert metrics["num_steps"] == 1
    assert metrics["learning_rate"] == 2e-3
    assert metrics["skipped_passes"] == 1
    assert metrics["grad_norm"] > 0
    assert 0 < metrics["update_norm"] < 10
    after = run_loss(client, loss_fn)
    assert math.isfinite(after.metrics["loss:sum"])
    assert after.metrics["loss:sum"] < before.metrics["loss:sum"]
    assert logprobs_of(after) != logprobs_of(before)
    second = client.optim_step(types.AdamParams(learning_rate=1e-4, grad_clip_norm=1e-3)).result(timeout=60).metrics
    assert second is not None
    assert (second["num_steps"], second["skipped_passes"]) == (2, 0)
    assert second["grad_norm"] > 1e-3, "the norm before clipping"


def test_masks_and_clips_of_single_tokens_are_honoured(server: ServerProcess) -> None:
    """What a datum brings for a token changes its loss; equal to what is the default anyway, it changes nothing."""
    client = server.training_client()

    def loss(loss_fn: str, **extra: Any) -> float:
        output = client.forward([policy_datum(9, **extra)], loss_fn).result(timeout=60)  # type: ignore[arg-type]
        return float(output.metrics["loss:sum"])

    default = {"clip_low_threshold": [0.8] * LENGTH, "clip_high_threshold": [1.2] * LENGTH}
    assert loss("ppo", **default) == loss("ppo")
    assert loss("ppo", clip_low_threshold=[1.2] * LENGTH, clip_high_threshold=[1.2] * LENGTH) != loss("ppo")
    assert loss("gspo", sequence_ratio_mask=[1.0] * LENGTH) == loss("gspo")
    assert loss("gspo", sequence_ratio_mask=[1.0, 0.0, 0.0, 0.0, 0.0, 1.0]) != loss("gspo")


def moe_model_dir(directory: Path) -> Path:
    """A small Qwen3-MoE model with random weights, and no tokenizer."""
    import torch
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=1_000,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


def test_two_tenants_train_a_mixture_of_experts_sample_from_it_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    args = ["--model", f"local/moe={moe_model_dir(tmp_path / 'moe')}"]
    with ServerProcess(tmp_path / "data", args=args) as server:

        def train(client: tinker.TrainingClient, *, seed: int, num_steps: int) -> list[float]:
            return [train_step(client, batch(2, 12, seed=seed), lr=1e-2) for _ in range(num_steps)]

        def of_tenant(seed: int) -> list[float]:
            key = new_key()
            client = new_run(server.service(key), base_model="local/moe", rank=4 * seed, seed=seed)
            losses = train(client, seed=seed, num_steps=4)
            path = client.save_state("half").result(timeout=60).path
            losses += train(client, seed=seed, num_steps=2)
            restored = server.service(key).create_training_client_from_state_with_optimizer(path).result(timeout=60)
            assert train(restored, seed=seed, num_steps=2) == losses[-2:]
            check_sampler(client, seed)
            return losses

        def check_sampler(client: tinker.TrainingClient, seed: int) -> None:
            """Sampled tokens have the logprobs that the trainer computes for them."""
            sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
            prompt = [20 + seed, 21, 22]
            params = types.SamplingParams(max_tokens=5, seed=seed, stop=[])
            sampled = sampler.sample(types.ModelInput.from_ints(prompt), 1, params).result(timeout=60).sequences[0]
            tokens = [*prompt, *sampled.tokens]
            (trained,) = logprobs_of(client.forward([datum(tokens)], "cross_entropy").result(timeout=60))
            assert sampled.logprobs is not None
            np.testing.assert_allclose(trained[len(prompt) - 1 :], sampled.logprobs, atol=1e-4)

        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(of_tenant, (1, 2)))
        assert together == [of_tenant(1), of_tenant(2)]
        assert all(losses[-1] < 0.8 * losses[0] for losses in together)
        assert server.terminate() == 0


def worker_of(server: ServerProcess) -> psutil.Process:
    assert server.process is not None
    (worker,) = psutil.Process(server.process.pid).children()
    return worker


def parked_files(server: ServerProcess) -> list[os.stat_result]:
    """What the worker holds open in the directory for parked runs."""
    directory = str(server.data_dir.resolve() / "parked")
    found = []
    for descriptor in Path(f"/proc/{worker_of(server).pid}/fd").iterdir():
        try:
            if os.readlink(descriptor).startswith(directory):
                found.append(descriptor.stat())
        except FileNotFoundError:
            continue
    return found


def wait_until(is_so: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


def parked_bytes(server: ServerProcess) -> int:
    return sum(status.st_size for status in parked_files(server))


def test_idle_runs_lie_in_a_nameless_file_until_they_are_used_or_drained(tmp_path: Path) -> None:
    env = {"TREADLE_WORKER__PARK_AFTER_S": "0.2"}
    with ServerProcess(tmp_path / "data", env=env) as server:
        key = new_key()
        client, other = server.training_client(key, seed=1), server.training_client(key, seed=1)
        for one in (client, other):
            train_step(one, batch())
        one_run = 3 * 4 * num_adapter_elements()
        wait_until(lambda: parked_bytes(server) == 2 * one_run)
        (status,) = parked_files(server)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_nlink == 0
        assert list((server.data_dir / "parked").iterdir()) == []
        second = train_step(client, batch())
        # The other is still parked when the server drains, and must be saved all the same.
        wait_until(lambda: parked_bytes(server) == 2 * one_run)
        assert server.terminate() == 0
        server.start()
        assert train_step(other, batch()) == second
        assert math.isfinite(train_step(client, batch()))
        wait_until(lambda: parked_bytes(server) == 2 * one_run)
        server.kill()
        assert list((server.data_dir / "parked").iterdir()) == [], "nothing outlives the worker"


def test_unloading_parked_runs_frees_their_place(tmp_path: Path) -> None:
    env = {"TREADLE_WORKER__PARK_AFTER_S": "0.2"}
    key = new_key()
    with ServerProcess(tmp_path / "data", env=env) as server:
        clients = [server.training_client(key) for _ in range(2)]
        wait_until(lambda: parked_bytes(server) == 2 * 3 * 4 * num_adapter_elements())
        with server.http(key) as http:
            for client in clients:
                assert http.post("unload_model", json={"model_id": client.model_id}).status_code == 200
        wait_until(lambda: parked_bytes(server) == 0)


def num_adapter_elements() -> int:
    """Numbers of a rank-8 adapter of the bundled model."""
    from treadle.config import bundled_model_dir
    from treadle.domain.ops import LoraSpec
    from treadle.engine.adapter import adapter_layout
    from treadle.engine.base_model import load_base_model

    base = load_base_model(str(bundled_model_dir()), name=MODEL, device="cpu", dtype="float32", num_threads=1)
    return adapter_layout(base.groups, LoraSpec(rank=8, seed=0)).num_elements


@contextmanager
def server_with_patched_worker(tmp_path: Path, patch: str) -> Iterator[ServerProcess]:
    """A server in whose workers `patch` runs before anything else does."""
    lines = [
        "import sys",
        "if 'treadle.executor.child' in sys.orig_argv:",
        textwrap.indent(textwrap.dedent(patch), "    "),
    ]
    directory = tmp_path / "patch"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text("\n".join(lines))
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    with ServerProcess(tmp_path / "data", env={"PYTHONPATH": path}) as server:
        yield server


SMALL_MEMORY = """
    from treadle.engine import memory
    memory._MAX_CPU_ROOM_BYTES = 6 * 2**20
"""


def test_a_datum_longer_than_memory_holds_is_refused_by_name_and_may_still_be_looked_at(tmp_path: Path) -> None:
    with server_with_patched_worker(tmp_path, SMALL_MEMORY) as server:
        client = server.training_client()
        data = [*batch(1, 12), *batch(1, 600)]
        with pytest.raises(tinker.RequestFailedError, match=r"datum 1 has 600 tokens; .* memory holds") as caught:
            client.forward_backward(data, "cross_entropy").result(timeout=60)
        assert caught.value.category.value == "user"
        # Each of these would fit, but not the two together, and a quantum is never cut.
        with pytest.raises(tinker.RequestFailedError, match=r"datums 0 to 1 together have 240 tokens.*fewer datums"):
            client.forward_backward(batch(2, 120), "cross_entropy").result(timeout=60)
        looked = client.forward(data, "cross_entropy").result(timeout=60)
        assert [len(row) for row in logprobs_of(looked)] == [12, 600]
        assert math.isfinite(train_step(client, batch()))


# The token that breaks the device is far from those that `batch` makes.
LOST_DEVICE = """
    import torch
    from treadle.worker import micro_batches
    real = micro_batches.run_micro_batch

    def losing_the_device(base, quanta, **options):
        if any(5 in datum.tokens for quantum in quanta for datum in quantum.datums):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return real(base, quanta, **options)

    micro_batches.run_micro_batch = losing_the_device
"""


def test_a_lost_device_ends_the_worker_and_the_next_one_goes_on_with_the_same_weights(tmp_path: Path) -> None:
    with server_with_patched_worker(tmp_path, LOST_DEVICE) as server:
        fresh, stepped, guilty, undisturbed = (server.training_client(seed=seed) for seed in (0, 1, 2, 1))
        losses = [train_step(stepped, batch()) for _ in range(2)]
        worker = worker_of(server)
        failure = failure_of(guilty.forward_backward([datum([4, 5, 6])], "cross_entropy"))
        assert failure is not None
        assert failure.category.value == "server"
        wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
        # Nothing had changed this one since it was created, so it is made again.
        assert math.isfinite(train_step(fresh, batch()))
        # Steps that are in no snapshot are run again.
        losses.append(train_step(stepped, batch()))
        assert losses == [train_step(undisturbed, batch()) for _ in range(3)]
        # Only its request failed, not the run.
        assert math.isfinite(train_step(guilty, batch()))
