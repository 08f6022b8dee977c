"""The objective behind stable_reinforce: what docs/losses.md claims of it, claim by claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from treadle.domain.losses import Loss, resolve_loss
from treadle.engine.losses import RATIO_CAP, LossTerms, sequence_lengths, stable_reinforce

Array = NDArray[np.float32]


def column(values: Sequence[float] | NDArray[np.generic]) -> Array:
    return np.asarray(values, dtype=np.float32).reshape(-1, 1)


def inputs_of(sampled: Array, advantages: Array, runs: Array) -> dict[str, Array]:
    return {"sampling_logprobs": sampled, "advantages": advantages, "sampled_runs": runs}


def evaluate(
    logprobs: Array, inputs: Mapping[str, Array], *, kl_coeff: float = 0.0, datums: Sequence[int] | None = None
) -> LossTerms:
    loss = resolve_loss("stable_reinforce", {"kl_coeff": kl_coeff})
    lengths = sequence_lengths(loss, inputs, [len(logprobs)] if datums is None else datums)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return stable_reinforce(torch.from_numpy(logprobs), tensors, loss.config, lengths)


def one_run(num_tokens: int, seed: int = 0, *, spread: float = 0.3) -> tuple[Array, dict[str, Array]]:
    """A run whose trainer and sampler differ by about `spread`."""
    rng = np.random.default_rng(seed)
    sampled = column(rng.normal(-2, 1, num_tokens))
    logprobs = (sampled + rng.normal(0, spread, (num_tokens, 1))).astype(np.float32)
    return logprobs, inputs_of(sampled, column(rng.normal(size=num_tokens)), column(np.ones(num_tokens)))


@pytest.mark.parametrize("kl_coeff", [0.0, 0.5])
def test_on_policy_it_is_plain_reinforce_to_the_bit(kl_coeff: float) -> None:
    logprobs, inputs = one_run(50, spread=0.0)
    terms = evaluate(logprobs, inputs, kl_coeff=kl_coeff)
    np.testing.assert_array_equal(terms.grad.numpy(), -inputs["advantages"])
    np.testing.assert_allclose(terms.loss.numpy(), -inputs["advantages"] * logprobs, rtol=1e-6)
    assert terms.metrics["clipped_tokens:sum"] == 0
    assert terms.metrics["kl_to_sampler:sum"] == 0
    assert terms.metrics["importance_weight:sum"] == terms.metrics["treadle_objective_tokens:sum"] == 50


@given(
    st.lists(st.tuples(st.floats(-300, 300), st.floats(-1e6, 1e6)), min_size=1, max_size=20),
    st.floats(0, 100),
)
def test_the_gradient_is_bounded_whatever_the_policies(rows: list[tuple[float, float]], kl_coeff: float) -> None:
    differences, advantages = (column(values) for values in zip(*rows, strict=True))
    sampled = column(np.full(len(rows), -310.0))
    terms = evaluate(
        sampled + differences, inputs_of(sampled, advantages, column(np.ones(len(rows)))), kl_coeff=kl_coeff
    )
    bound = RATIO_CAP * np.abs(advantages.astype(np.float64)) + kl_coeff
    # Rounding to float32, of numbers below its smallest normal one too.
    assert (np.abs(terms.grad.numpy()) <= bound * (1 + 1e-6) + 1e-38).all()
    assert torch.isfinite(terms.loss).all()


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 3), st.floats(0, 2))
def test_gradient_equals_finite_differences_with_the_weights_held(seed: int, spread: float, kl_coeff: float) -> None:
    logprobs, inputs = one_run(12, seed, spread=spread)
    sampled, advantages = inputs["sampling_logprobs"].astype(np.float64), inputs["advantages"].astype(np.float64)
    exact = logprobs.astype(np.float64)
    weights = min(1.0, np.exp((exact - sampled).mean())) * np.minimum(np.exp(exact - sampled), RATIO_CAP)

    def loss(lp: NDArray[np.float64]) -> NDArray[np.float64]:
        difference = lp - sampled
        inner = np.exp(difference) - 1 - difference
        tangent = RATIO_CAP - 1 - np.log(RATIO_CAP) + (RATIO_CAP - 1) * (difference - np.log(RATIO_CAP))
        return kl_coeff * np.where(difference <= np.log(RATIO_CAP), inner, tangent) - weights * advantages * lp

    step = 1e-6
    terms = evaluate(logprobs, inputs, kl_coeff=kl_coeff)
    np.testing.assert_allclose(terms.loss.numpy(), loss(exact), rtol=1e-5, atol=1e-6)
    slope = (loss(exact + step) - loss(exact - step)) / (2 * step)
    np.testing.assert_allclose(terms.grad.numpy(), slope, rtol=1e-4, atol=1e-5)


def test_the_penalty_estimates_the_divergence_and_its_gradient_without_bias() -> None:
    """In expectation over the sampler's own draws, for policies whose ratios stay below the cap."""
    rng = np.random.default_rng(1)
    q = rng.dirichlet(np.full(20, 5.0))
    theta = np.log(q) + rng.normal(0, 0.2, 20)
    p = np.exp(theta) / np.exp(theta).sum()
    assert (p / q).max() < RATIO_CAP
    inputs = inputs_of(column(np.log(q)), column(np.zeros(20)), column(np.arange(1, 21)))
    terms = evaluate(column(np.log(p)), inputs, kl_coeff=1.0)
    values, slopes = terms.loss.numpy()[:, 0].astype(np.float64), terms.grad.numpy()[:, 0].astype(np.float64)
    assert (values >= 0).all()
    assert q @ values == pytest.approx(float(q @ (np.log(q) - np.log(p))), rel=1e-5)
    # d log p_y / d theta_j = [y = j] - p_j, so d KL(q, p) / d theta_j = p_j - q_j.
    gradient = (q * slopes)[None, :] @ (np.eye(20) - p[None, :])
    np.testing.assert_allclose(gradient[0], p - q, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 5))
def test_the_second_moment_of_a_weight_is_at_most_the_cap(seed: int, spread: float) -> None:
    """Over the sampler's own draws, however far the two policies are apart."""
    rng = np.random.default_rng(seed)
    q, p = rng.dirichlet(np.full(30, 1 / spread)) + 1e-9, rng.dirichlet(np.full(30, 1 / spread)) + 1e-9
    q, p = q / q.sum(), p / p.sum()
    # Each outcome a run of its own, advantage 1: the gradient is minus its weight.
    inputs = inputs_of(column(np.log(q)), column(np.ones(30)), column(np.arange(1, 31)))
    weights = -evaluate(column(np.log(p)), inputs).grad.numpy()[:, 0].astype(np.float64)
    assert q @ weights**2 <= RATIO_CAP * (1 + 1e-5)


def test_a_sequence_that_has_become_unlikely_counts_less_and_a_long_one_does_not_vanish() -> None:
    for num_tokens in (10, 10_000):
        sampled = column(np.full(num_tokens, -2.0))
        inputs = inputs_of(sampled, column(np.ones(num_tokens)), column(np.ones(num_tokens)))
        terms = evaluate(sampled - np.float32(0.1), inputs)
        # Both factors are exp(-0.1), whatever the length: the product of all ratios would be exp(-1000).
        np.testing.assert_allclose(terms.grad.numpy(), -np.exp(-0.2), rtol=1e-5)
        likelier = evaluate(sampled + np.float32(0.1), inputs)
        np.testing.assert_allclose(likelier.grad.numpy(), -np.exp(0.1), rtol=1e-5)


def test_each_run_depends_on_its_own_rows_alone() -> None:
    logprobs, inputs = one_run(60, spread=0.5)
    inputs["sampled_runs"] = column(np.repeat([0, 1, 2, 0, 1], [7, 13, 20, 5, 15]))
    # The last run has the number of the first one, in another datum.
    together = evaluate(logprobs, inputs, kl_coeff=0.1, datums=[45, 15])
    for first, last in ((7, 20), (20, 40), (45, 60)):
        rows = slice(first, last)
        alone = evaluate(logprobs[rows], {name: value[rows] for name, value in inputs.items()}, kl_coeff=0.1)
        assert torch.equal(alone.loss, together.loss[rows])
        assert torch.equal(alone.grad, together.grad[rows])


def test_two_datums_of_one_run_each_are_two_runs() -> None:
    loss = resolve_loss("stable_reinforce", {})
    assert sequence_lengths(loss, {"sampled_runs": column([1, 1, 1, 1])}, [1, 3]) == [1, 3]
    assert sequence_lengths(loss, {"sampled_runs": column([0, 0, 1, 2, 2, 0])}, [6]) == [2, 1, 2, 1]
    assert sequence_lengths(Loss("gspo"), {}, [6]) == [6]


@pytest.mark.parametrize("placeholder", [0.0, -1e30, 3e38])
def test_rows_that_were_not_sampled_add_nothing_whatever_their_placeholder(placeholder: float) -> None:
    logprobs, inputs = one_run(30)
    inputs["sampled_runs"][:9] = 0
    inputs["sampling_logprobs"][:9] = placeholder
    terms = evaluate(logprobs, inputs, kl_coeff=0.5)
    assert not terms.loss[:9].any()
    assert not terms.grad[:9].any()
    assert torch.equal(terms.grad[9:], evaluate(logprobs[9:], {k: v[9:] for k, v in inputs.items()}, kl_coeff=0.5).grad)


def test_metrics_count_what_was_sampled_and_what_was_bounded() -> None:
    sampled = column([-1.0, -1.0, -1.0, -1.0, -9.0])
    inputs = inputs_of(sampled, column([1, 1, 0, -1, 1]), column([1, 1, 1, 1, 0]))
    terms = evaluate(column([-1.0, -0.1, -0.1, -0.1, -1.0]), inputs)
    metrics = {name: value.item() for name, value in terms.metrics.items()}
    assert metrics["treadle_objective_tokens:sum"] == 4
    assert metrics["clipped_tokens:sum"] == 2, "the third has no advantage, the fifth was not sampled"
    assert metrics["importance_weight:sum"] == pytest.approx(1 + 3 * RATIO_CAP)
    assert metrics["kl_to_sampler:sum"] == pytest.approx(3 * (1 - np.log(2) + 0.9 - np.log(2)), rel=1e-5)


def test_a_small_divergence_keeps_its_digits() -> None:
    sampled = column(np.full(1000, -3.0))
    logprobs = sampled + np.float32(1e-3)
    step = (logprobs[0, 0].astype(np.float64) - sampled[0, 0]).item()
    inputs = inputs_of(sampled, column(np.zeros(1000)), column(np.ones(1000)))
    terms = evaluate(logprobs, inputs)
    exact = 1000 * (np.expm1(step) - step)
    assert terms.metrics["kl_to_sampler:sum"].item() == pytest.approx(exact, rel=1e-9)
