"""Losses against numpy formulas, and their closed-form gradients against autograd and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from treadle.domain.losses import resolve_loss
from treadle.engine.losses import LOSS_FUNCTIONS, rows_with_gradient

NUM_ROWS = 64


def make_inputs(columns: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(4)
    shape = (NUM_ROWS, columns)
    advantages = rng.normal(size=shape).astype(np.float32)
    advantages[::7] = 0
    return {
        "weights": advantages,
        "advantages": advantages,
        "logprobs": rng.normal(-2, 0.4, shape).astype(np.float32),
        "clip_low_threshold": rng.uniform(0.5, 0.9, shape).astype(np.float32),
        "clip_high_threshold": rng.uniform(1.1, 1.5, shape).astype(np.float32),
    }


def numpy_loss(name: str, logprobs: NDArray[np.float64], inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    if name == "cross_entropy":
        return -inputs["weights"] * logprobs
    ratio = np.exp(logprobs - inputs["logprobs"])
    if name == "importance_sampling":
        return -ratio * inputs["advantages"]
    bounded = np.clip(ratio, inputs["clip_low_threshold"], inputs["clip_high_threshold"])
    return -np.minimum(ratio * inputs["advantages"], bounded * inputs["advantages"])


@pytest.mark.parametrize("name", sorted(LOSS_FUNCTIONS))
def test_loss_equals_numpy_and_gradient_equals_finite_differences(name: str) -> None:
    inputs = make_inputs(columns=3 if name == "cross_entropy" else 1)
    logprobs = np.random.default_rng(5).normal(-2, 0.4, inputs["weights"].shape)
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    terms = LOSS_FUNCTIONS[name](torch.from_numpy(logprobs.astype(np.float32)), tensors, resolve_loss(name, {}).config)
    np.testing.assert_allclose(terms.loss.numpy(), numpy_loss(name, logprobs, inputs), rtol=1e-5, atol=1e-6)
    step = 1e-6
    difference = numpy_loss(name, logprobs + step, inputs) - numpy_loss(name, logprobs - step, inputs)
    np.testing.assert_allclose(terms.grad.numpy(), difference / (2 * step), rtol=1e-4, atol=1e-5)
    assert all(metric.endswith(":sum") and metric.count(":") == 1 for metric in terms.metrics)


def test_ppo_gradient_equals_autograd_and_counts_clipped_tokens() -> None:
    inputs = {key: torch.from_numpy(value) for key, value in make_inputs(columns=1).items()}
    logprobs = torch.from_numpy(np.random.default_rng(6).normal(-2, 0.4, (NUM_ROWS, 1)).astype(np.float32))
    # Exactly on policy, where both branches of the minimum are equal.
    logprobs[:8] = inputs["logprobs"][:8]
    variable = logprobs.clone().requires_grad_()
    ratio = (variable - inputs["logprobs"]).exp()
    bounded = torch.maximum(torch.minimum(ratio, inputs["clip_high_threshold"]), inputs["clip_low_threshold"])
    reference = -torch.minimum(ratio * inputs["advantages"], bounded * inputs["advantages"])
    reference.sum().backward()
    terms = LOSS_FUNCTIONS["ppo"](logprobs, inputs, {})
    torch.testing.assert_close(terms.loss, reference.detach())
    assert variable.grad is not None
    torch.testing.assert_close(terms.grad, variable.grad)
    num_clipped = int(((terms.grad == 0) & (inputs["advantages"] != 0)).sum())
    assert 0 < num_clipped == int(terms.metrics["clipped_tokens:sum"])


def test_rows_without_signal_are_known_beforehand() -> None:
    inputs = make_inputs(columns=2)
    inputs["weights"][1] = (0, 0.5)
    expected = (inputs["weights"] != 0).any(axis=1)
    assert not expected.all()
    for name in LOSS_FUNCTIONS:
        np.testing.assert_array_equal(rows_with_gradient(name, inputs), expected)
        flat = {key: value[:, 0] for key, value in inputs.items()}
        np.testing.assert_array_equal(rows_with_gradient(name, flat), flat["weights"] != 0)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo"])
def test_a_token_without_advantage_adds_nothing_whatever_its_placeholder(name: str) -> None:
    inputs = {
        "logprobs": torch.tensor([-1e4, -2.0]),
        "advantages": torch.tensor([0.0, 1.0]),
        "clip_low_threshold": torch.full((2,), 0.8),
        "clip_high_threshold": torch.full((2,), 1.2),
    }
    terms = LOSS_FUNCTIONS[name](torch.tensor([-3.0, -2.0]), inputs, {})
    assert terms.loss.tolist() == [0.0, -1.0]
    assert terms.grad.tolist() == [0.0, -1.0]
