"""Custom losses with the official SDK: traced there, run here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tinker
import torch
from e2e_support import ServerProcess, batch, failure_of, new_run
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

TIMEOUT_S = 60


def clipped_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> Any:
    """A loss of one datum that no table has: a clipped ratio whose bounds depend on the datum's length."""
    ratio = torch.exp(logprobs - old_logprobs)
    width = 0.5 / math.sqrt(logprobs.shape[0])
    objective = torch.minimum(ratio * advantages, torch.clamp(ratio, 1 - width, 1 + width) * advantages)
    spread = logprobs[:, None] - logprobs[None, :]
    loss = -objective.mean() + 0.01 * spread.pow(2).mean()
    was_clipped = ((ratio < 1 - width) | (ratio > 1 + width)).float()
    return loss, {"custom/clipped:mean": was_clipped.mean(), "custom/tokens:sum": torch.ones_like(ratio).sum()}


RANKS: Any = {"logprobs": 1, "old_logprobs": 1, "advantages": 1}


def policy_data(client: tinker.TrainingClient, num_datums: int = 3) -> list[types.Datum]:
    """Datums of several lengths with inputs of their own; one of them is not read by the loss."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for index in range(num_datums):
        (plain,) = batch(1, 10 + 3 * index)
        length = plain.model_input.length
        plain.loss_fn_inputs["old_logprobs"] = types.TensorData.from_torch(
            torch.rand(length, generator=generator) * -0.2 - 7.0
        )
        plain.loss_fn_inputs["advantages"] = types.TensorData.from_torch(torch.randn(length, generator=generator))
        plain.loss_fn_inputs["unread"] = types.TensorData.from_torch(torch.ones(length))
        data.append(plain)
    return data


def on_the_client(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """The same loss as a callable, which the SDK runs itself."""
    total = torch.zeros(())
    for datum, values in zip(data, logprobs, strict=True):
        inputs = [datum.loss_fn_inputs[name].to_torch() for name in ("old_logprobs", "advantages")]
        total = total + clipped_ratio(values, *inputs)[0]
    return total, {}


def test_a_handle_runs_on_the_server_and_trains_what_the_client_would(server: ServerProcess) -> None:
    service = server.service()
    handle = service.create_custom_loss(clipped_ratio, RANKS).result(timeout=TIMEOUT_S)
    assert handle.loss_id is not None
    here, there = new_run(service, seed=7), new_run(service, seed=7)
    data = policy_data(here)
    for _ in range(2):
        ours = here.forward_backward_custom(data, handle).result(timeout=TIMEOUT_S)
        theirs = there.forward_backward_custom(data, on_the_client).result(timeout=TIMEOUT_S)
        assert ours.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-5)
        # The server has no surrogate: one pass computed it all.
        assert "surrogate_loss:sum" not in ours.metrics
        assert ours.metrics["custom/tokens:sum"] == sum(datum.model_input.length for datum in data)
        assert 0 < ours.metrics["custom/clipped:mean"] <= 1
        steps = [client.optim_step(types.AdamParams(learning_rate=1e-3)) for client in (here, there)]
        norms = [(step.result(timeout=TIMEOUT_S).metrics or {})["grad_norm"] for step in steps]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert norms[0] > 0


def test_metrics_combine_over_the_chunks_of_one_call(server: ServerProcess) -> None:
    service = server.service()
    client = new_run(service)

    def per_datum(logprobs: torch.Tensor, weight: torch.Tensor) -> Any:
        loss = -(logprobs * weight).sum()
        return loss, {"custom/weight:mean": weight, "custom/weight:sum": weight}

    handle = service.create_custom_loss(per_datum, {"logprobs": 2, "weight": 0}).result(timeout=TIMEOUT_S)
    data = []
    for index in range(1030):
        tokens = [10 + index % 50, 11, 12]
        targets = torch.tensor([[11, 20], [12, 21], [13, 22]])
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens),
                loss_fn_inputs={
                    "target_tokens": types.TensorData.from_torch(targets),
                    "weight": types.TensorData.from_torch(torch.tensor(float(index))),
                },
            )
        )
    output = client.forward_backward_custom(data, handle).result(timeout=TIMEOUT_S)
    assert output.metrics["custom/weight:sum"] == pytest.approx(1029 * 1030 / 2)
    assert output.metrics["custom/weight:mean"] == pytest.approx(1029 / 2)
    assert output.loss_fn_outputs[5]["logprobs"].shape == [3, 2]


def test_what_the_server_does_not_run_is_refused_by_name_when_it_is_created(server: ServerProcess) -> None:
    def contraction(logprobs: torch.Tensor) -> Any:
        return torch.einsum("i,i->", logprobs, logprobs), {}

    with pytest.raises(tinker.RequestFailedError, match=r"einsum .* is not an operation of custom losses"):
        server.service().create_custom_loss(contraction, {"logprobs": 1}).result(timeout=TIMEOUT_S)


def test_a_loss_that_fails_on_a_datum_costs_its_own_request_alone(server: ServerProcess) -> None:
    service = server.service()
    client = new_run(service)

    def needs_eight(logprobs: torch.Tensor) -> Any:
        return -logprobs.view(2, 4).sum(), {}

    def infinite(logprobs: torch.Tensor) -> Any:
        return (logprobs * 0 - 1).log().sum(), {}

    too_short = service.create_custom_loss(needs_eight, {"logprobs": 1}).result(timeout=TIMEOUT_S)
    not_finite = service.create_custom_loss(infinite, {"logprobs": 1}).result(timeout=TIMEOUT_S)
    data = batch(2, 12)
    failure = failure_of(client.forward_backward_custom(data, too_short))
    assert "datum 0: custom loss 'needs_eight': view" in str(failure)
    assert "not a finite" in str(failure_of(client.forward_backward_custom(data, not_finite)))
    assert failure_of(client.optim_step(types.AdamParams())) is not None
    client.forward_backward(data, "cross_entropy").result(timeout=TIMEOUT_S)
    client.optim_step(types.AdamParams()).result(timeout=TIMEOUT_S)


def test_another_tenants_loss_is_unknown(server: ServerProcess) -> None:
    handle = server.service().create_custom_loss(clipped_ratio, RANKS).result(timeout=TIMEOUT_S)
    client = new_run(server.service())
    data = policy_data(client)
    for loss_id in (str(handle.loss_id), "nobody:loss:0"):
        failure = failure_of(client.forward_backward(data, "custom", {"loss_id": loss_id}))
        assert f"custom loss '{loss_id}' does not exist" in str(failure)
