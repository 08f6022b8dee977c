"""A server whose samples are drawn by vLLM, through the official SDK; what vLLM is not for comes from the worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tinker
from e2e_support import ServerProcess, batch, new_key, new_run, train_step
from tinker import types

from treadle.testing.vllm_environment import NOT_FOUND, find_vllm_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# A vLLM that is started again, on a machine that is busy with other tests.
START_S = 300
PROMPT = types.ModelInput.from_ints([56, 276, 620])
GREEDY = types.SamplingParams(max_tokens=12, temperature=0.0, seed=1)


def vllm_children(server: ServerProcess) -> list[int]:
    """Pids of the server's vLLM processes that speak with it."""
    assert server.process is not None
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (folder / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if parent == server.process.pid and b"treadle.executor.vllm_child" in command:
            found.append(int(folder.name))
    return found


def drawn(client: tinker.SamplingClient, params: types.SamplingParams) -> list[tuple[list[int], list[float]]]:
    answer = client.sample(PROMPT, 2, params).result(timeout=START_S)
    return [(list(one.tokens), list(one.logprobs or ())) for one in answer.sequences]


@pytest.mark.filterwarnings("default", "ignore::ResourceWarning")
def test_train_and_sample_with_vllm(tmp_path: Path, server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    python = find_vllm_python()
    if python is None:
        pytest.skip(NOT_FOUND)
    monkeypatch.setenv("E2E_SAMPLER", "vllm")
    monkeypatch.setenv("E2E_VLLM_PYTHON", str(python))

    def story(on: ServerProcess, *, kill: bool = False) -> list[object]:
        service = on.service(new_key())
        run = new_run(service, seed=7)
        base = service.create_sampling_client(base_model="treadle/tiny")
        found: list[object] = [drawn(base, GREEDY)]
        for step in range(3):
            train_step(run, batch(seed=step))
            sampler = run.save_weights_and_get_sampling_client().result(timeout=60)
            found.append(drawn(sampler, GREEDY))
            # About the prompt: only the built-in sampler answers, with the weights just saved.
            found.append(sampler.compute_logprobs(PROMPT).result(timeout=120))
            if kill and step == 1:
                (pid,) = vllm_children(on)
                os.kill(pid, signal.SIGKILL)
        return found

    expected = story(server)
    env = {
        "TREADLE_SAMPLER__VLLM__CPU_CACHE_BYTES": str(128 * 2**20),
        "TREADLE_ENGINE__THREADS": "1",
    }
    with ServerProcess(tmp_path / "data", env=env) as with_vllm:
        assert len(vllm_children(with_vllm)) == 1
        assert_alike(story(with_vllm), expected)
        # Its death costs time, and neither a sample nor another number.
        assert_alike(story(with_vllm, kill=True), expected)
        assert with_vllm.terminate() == 0


def assert_alike(actual: list[object], expected: list[object]) -> None:
    """The same greedy tokens, and log-probabilities as far as two engines agree in float32."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert isinstance(ours, list)
        assert isinstance(theirs, list)
        for one, other in zip(ours, theirs, strict=True):
            if isinstance(one, tuple):
                assert one[0] == other[0]
                np.testing.assert_allclose(one[1], other[1], atol=1e-4)
            elif one is None or other is None:
                assert one is other
            else:
                assert abs(one - other) < 1e-4
