"""Quotas as the official SDK's users meet them: errors that say what to do, and work that waits and then is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_support import ServerProcess, batch, failure_of, new_run
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

TIMEOUT_S = 60


class Operator:
    """An admin key of a server on which every other key is a tenant of its own."""

    def __init__(self, server: ServerProcess, key: str) -> None:
        self.server = server
        self._headers = {"X-API-Key": key}

    def set(self, user_key: str, **limits: int | None) -> None:
        tenant_id = self.read(user_key)["tenant_id"]
        url = f"{self.server.url}/admin/v1/quotas/tenant:{tenant_id}"
        httpx.put(url, json=limits, headers=self._headers).raise_for_status()

    def read(self, user_key: str) -> dict[str, Any]:
        """What a user sees of its quotas."""
        answer = httpx.get(f"{self.server.url}/api/v1/quotas", headers={"X-API-Key": user_key}).raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder: Path = tmp_path_factory.mktemp("quotas")
    key_file = folder / "admin-key"
    env = {"TREADLE_AUTH__METHODS": '["open", "keys"]', "TREADLE_AUTH__BOOTSTRAP_KEY_FILE": str(key_file)}
    with ServerProcess(folder / "data", env=env) as server:
        yield Operator(server, key_file.read_text().strip())


def test_a_run_too_many_is_an_error_and_an_unloaded_one_leaves_its_place(operator: Operator) -> None:
    operator.set("tml-runs", max_models=1, max_lora_rank=4, max_checkpoints=1)
    service = operator.server.service("tml-runs")
    with pytest.raises(Exception, match="quota max_lora_rank: rank 8 is asked for, and your limit is 4"):
        new_run(service, rank=8)
    client = new_run(service, rank=4)
    with pytest.raises(Exception, match="quota max_models: you have 1 of 1 models; unload one"):
        new_run(service, rank=4)
    first, second = client.save_state("one"), client.save_state("two")
    path = first.result(timeout=TIMEOUT_S).path
    failure = failure_of(second)
    assert failure is not None
    assert "quota max_checkpoints: you have 1 of 1 checkpoints; delete one" in str(failure)
    rest = service.create_rest_client()
    rest.delete_checkpoint_from_tinker_path(path).result(timeout=TIMEOUT_S)
    client.save_state("three").result(timeout=TIMEOUT_S)


def test_passes_over_a_rate_wait_and_then_run(operator: Operator) -> None:
    operator.set("tml-trains", trained_tokens_per_minute=32)
    service = operator.server.service("tml-trains")
    client, data = new_run(service), batch(4, 16)
    client.forward_backward(data, "cross_entropy").result(timeout=TIMEOUT_S)
    waiting = client.forward_backward(data, "cross_entropy")
    stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
    with pytest.raises(TimeoutError):
        waiting.result(timeout=2)
    # Another tenant is not concerned.
    other = new_run(operator.server.service("tml-trains-too"))
    other.forward_backward(data, "cross_entropy").result(timeout=TIMEOUT_S)
    operator.set("tml-trains", trained_tokens_per_minute=None, trained_tokens_per_day=10**6)
    assert waiting.result(timeout=TIMEOUT_S).metrics["loss:sum"] > 0
    assert (stepped.result(timeout=TIMEOUT_S).metrics or {})["num_steps"] == 1
    [day] = [one for one in operator.read("tml-trains")["quotas"] if one["quota"] == "trained_tokens_per_day"]
    assert (day["limit"], day["use"]) == (10**6, 2 * 4 * 16)


def test_samples_over_a_rate_come_back_by_themselves(operator: Operator) -> None:
    operator.set("tml-samples", sampled_tokens_per_minute=4)
    service = operator.server.service("tml-samples")
    sampling = service.create_sampling_client(base_model="treadle/tiny")
    params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=1)
    prompt = types.ModelInput.from_ints([1, 2, 3])
    sampling.sample(prompt, 1, params).result(timeout=TIMEOUT_S)
    waiting = sampling.sample(prompt, 1, params)
    with pytest.raises(TimeoutError):
        waiting.result(timeout=2)
    operator.set("tml-samples", sampled_tokens_per_minute=None)
    assert len(waiting.result(timeout=TIMEOUT_S).sequences) == 1
