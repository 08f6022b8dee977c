"""Losses against float64 numpy, and their closed-form gradients against finite differences and autograd.

Tolerances: 1e-5 relative for values and 1e-4 for differences, both a few times float32's rounding of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from treadle.domain.losses import LOSSES, Loss, resolve_loss
from treadle.engine.losses import (
    SEQUENCE_LOSSES,
    TOKEN_LOSSES,
    LossTerms,
    rows_with_gradient,
    sequence_lengths,
)

LENGTHS = (20, 1, 43)
NUM_ROWS = sum(LENGTHS)
# A prompt and two runs side by side; one token; three runs with other tokens between two of them.
RUNS = np.repeat([0, 1, 2, 1, 0, 1, 0, 2, 3], [6, 9, 5, 1, 11, 8, 3, 20, 1])

Array64 = NDArray[np.float64]
Inputs64 = Mapping[str, Array64]


def make_inputs(columns: int = 1, *, seed: int = 4) -> dict[str, NDArray[np.float32]]:
    """Every input that any loss takes, float32 [T, K]; every seventh token has no advantage."""
    rng = np.random.default_rng(seed)
    shape = (NUM_ROWS, columns)
    advantages = rng.normal(size=shape)
    advantages[::7] = 0
    inputs = {
        "weights": advantages,
        "advantages": advantages,
        "logprobs": rng.normal(-2, 0.4, shape),
        "clip_low_threshold": rng.uniform(0.5, 0.9, shape),
        "clip_high_threshold": rng.uniform(1.1, 1.5, shape),
        "sequence_ratio_mask": rng.integers(0, 2, shape) * rng.normal(size=shape),
        "sampling_logprobs": rng.normal(-2, 0.4, shape),
        "sampled_runs": np.broadcast_to(RUNS[:, None], shape),
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def make_logprobs(columns: int = 1, *, seed: int = 5) -> Array64:
    """Log-probabilities that float32 holds exactly."""
    values = np.random.default_rng(seed).normal(-2, 0.4, (NUM_ROWS, columns))
    return values.astype(np.float32).astype(np.float64)


def evaluate(loss: Loss, logprobs: Array64, inputs: Mapping[str, NDArray[np.float32]]) -> LossTerms:
    """The engine's terms, from float32."""
    lp = torch.from_numpy(logprobs.astype(np.float32))
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    if loss.name in SEQUENCE_LOSSES:
        return SEQUENCE_LOSSES[loss.name](lp, tensors, loss.config, sequence_lengths(loss, inputs, LENGTHS))
    return TOKEN_LOSSES[loss.name](lp, tensors, loss.config)


def datum_slices(lengths: Sequence[int]) -> list[slice]:
    stops = np.cumsum(lengths)
    return [slice(int(stop) - length, int(stop)) for stop, length in zip(stops, lengths, strict=True)]


def sequence_ratio(logprobs: Array64, inputs: Inputs64) -> Array64:
    ratio = np.empty_like(logprobs)
    for rows in datum_slices(LENGTHS):
        counted = inputs["sequence_ratio_mask"][rows] != 0
        difference = (logprobs - inputs["logprobs"])[rows][counted]
        ratio[rows] = np.exp(difference.mean()) if counted.any() else 1.0
    return ratio


def sampled_runs(inputs: Inputs64) -> list[NDArray[np.int64]]:
    """The rows of each run, found row by row."""
    runs: dict[tuple[int, float], list[int]] = {}
    for index, rows in enumerate(datum_slices(LENGTHS)):
        for row in range(rows.start, rows.stop):
            if inputs["sampled_runs"][row, 0] != 0:
                runs.setdefault((index, float(inputs["sampled_runs"][row, 0])), []).append(row)
    return [np.array(rows) for rows in runs.values()]


def importance_weights(logprobs: Array64, inputs: Inputs64) -> Array64:
    """stable_reinforce: min(1, geometric mean of the run's ratios) * min(ratio, 2), 0 where nothing was sampled."""
    weights = np.zeros_like(logprobs)
    difference = logprobs - inputs["sampling_logprobs"]
    for rows in sampled_runs(inputs):
        weights[rows] = min(1.0, np.exp(difference[rows].mean())) * np.minimum(np.exp(difference[rows]), 2.0)
    return weights


def kl_terms(logprobs: Array64, inputs: Inputs64) -> Array64:
    """r - 1 - log r, beyond r = 2 its tangent."""
    difference = logprobs - inputs["sampling_logprobs"]
    inner = np.exp(difference) - 1 - difference
    outer = (1 - np.log(2)) + (difference - np.log(2))
    return np.where(inputs["sampled_runs"] != 0, np.where(difference <= np.log(2), inner, outer), 0.0)


def frozen_factors(loss: Loss, logprobs: Array64, inputs: Inputs64) -> Array64:
    """What the loss does not differentiate, at these log-probabilities: sg[...] of the formulas."""
    if loss.name == "cispo":
        ratio = np.exp(logprobs - inputs["logprobs"])
        return np.clip(ratio, inputs["clip_low_threshold"], inputs["clip_high_threshold"])
    if loss.name == "gspo":
        return sequence_ratio(logprobs, inputs) / np.exp(logprobs)
    if loss.name == "stable_reinforce":
        return importance_weights(logprobs, inputs)
    return np.ones_like(logprobs)


def reference_loss(loss: Loss, logprobs: Array64, inputs: Inputs64, frozen: Array64) -> Array64:
    """The documented formula in float64, term by term."""
    advantages = inputs["advantages"]
    match loss.name:
        case "cross_entropy":
            return -inputs["weights"] * logprobs
        case "importance_sampling":
            return -inputs["weights"] * np.exp(logprobs - inputs["logprobs"]) * advantages
        case "cispo":
            return -frozen * logprobs * advantages
        case "dro":
            penalty = 0.5 * loss.config["beta"] * (logprobs - inputs["logprobs"]) ** 2
            return -(logprobs * advantages - penalty)
        case "stable_reinforce":
            return loss.config["kl_coeff"] * kl_terms(logprobs, inputs) - frozen * advantages * logprobs
        case "ppo" | "gspo":
            ratio = np.exp(logprobs - inputs["logprobs"]) if loss.name == "ppo" else frozen * np.exp(logprobs)
            bounded = np.clip(ratio, inputs["clip_low_threshold"], inputs["clip_high_threshold"])
            return -np.minimum(ratio * advantages, bounded * advantages)
    raise AssertionError(loss.name)


def in_float64(inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, Array64]:
    return {name: value.astype(np.float64) for name, value in inputs.items()}


def finite_difference(loss: Loss, logprobs: Array64, inputs: Inputs64) -> Array64:
    """d loss / d logprob by central differences, everything under sg[] held fixed. Losses are sums over tokens."""
    frozen, step = frozen_factors(loss, logprobs, inputs), 1e-6
    above = reference_loss(loss, logprobs + step, inputs, frozen)
    return (above - reference_loss(loss, logprobs - step, inputs, frozen)) / (2 * step)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_equals_numpy_and_gradient_equals_finite_differences(name: str) -> None:
    loss = resolve_loss(name, {})
    columns = 3 if LOSSES[name].allows_target_columns else 1
    inputs, logprobs = make_inputs(columns), make_logprobs(columns)
    inputs64 = in_float64(inputs)
    terms = evaluate(loss, logprobs, inputs)
    assert terms.loss.dtype == terms.grad.dtype == torch.float32
    expected = reference_loss(loss, logprobs, inputs64, frozen_factors(loss, logprobs, inputs64))
    np.testing.assert_allclose(terms.loss.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(terms.grad.numpy(), finite_difference(loss, logprobs, inputs64), rtol=1e-4, atol=1e-5)
    assert all(metric.endswith(":sum") and metric.count(":") == 1 for metric in terms.metrics)


def autograd_reference(loss: Loss, lp: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The formulas as the documentation writes them, for torch to differentiate; float64."""
    advantages, difference = inputs["advantages"], lp - inputs["logprobs"]
    if loss.name == "dro":
        return -(lp * advantages - 0.5 * loss.config["beta"] * difference.square()).sum()
    ratio = difference.exp()
    if loss.name == "gspo":
        parts = []
        for rows in datum_slices(LENGTHS):
            counted = inputs["sequence_ratio_mask"][rows] != 0
            s = difference[rows][counted].mean().exp().detach()
            parts.append(s * lp[rows].exp() / lp[rows].exp().detach())
        ratio = torch.cat(parts)
    bounded = torch.maximum(torch.minimum(ratio, inputs["clip_high_threshold"]), inputs["clip_low_threshold"])
    if loss.name == "cispo":
        return -(bounded.detach() * lp * advantages).sum()
    return -torch.minimum(ratio * advantages, bounded * advantages).sum()


@pytest.mark.parametrize("name", ["ppo", "cispo", "dro", "gspo"])
def test_gradient_equals_autograd_of_the_documented_formula(name: str) -> None:
    loss = resolve_loss(name, {})
    inputs, logprobs = make_inputs(), make_logprobs()
    # The one-token datum is not counted anywhere else, and its mean must exist for the reference.
    inputs["sequence_ratio_mask"][20] = 1
    if name == "ppo":
        # Exactly on policy, where both branches of the minimum are equal.
        logprobs[:8] = inputs["logprobs"][:8]
    variable = torch.from_numpy(logprobs).requires_grad_()
    reference = autograd_reference(
        loss, variable, {key: torch.from_numpy(value).double() for key, value in inputs.items()}
    )
    reference.backward()
    terms = evaluate(loss, logprobs, inputs)
    assert variable.grad is not None
    assert terms.loss.sum().item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(terms.grad.double(), variable.grad, rtol=1e-4, atol=1e-6)
    assert terms.grad.any()


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_clipped_tokens_are_those_that_lost_their_gradient(name: str) -> None:
    inputs = make_inputs()
    terms = evaluate(resolve_loss(name, {}), make_logprobs(seed=6) + (0.4 if name == "gspo" else 0.0), inputs)
    num_clipped = int(((terms.grad.numpy() == 0) & (inputs["advantages"] != 0)).sum())
    assert 0 < num_clipped == int(terms.metrics["clipped_tokens:sum"])


def test_cispo_counts_tokens_beyond_its_bounds_and_they_keep_their_gradient() -> None:
    inputs = make_inputs()
    logprobs = make_logprobs()
    ratio = np.exp(logprobs - inputs["logprobs"])
    beyond = (ratio < inputs["clip_low_threshold"]) | (ratio > inputs["clip_high_threshold"])
    beyond &= inputs["advantages"] != 0
    terms = evaluate(resolve_loss("cispo", {}), logprobs, inputs)
    assert 0 < beyond.sum() == int(terms.metrics["clipped_tokens:sum"])
    assert terms.grad.numpy()[beyond].all()


def test_dro_without_a_penalty_is_a_plain_policy_gradient() -> None:
    inputs = make_inputs()
    terms = evaluate(resolve_loss("dro", {"beta": 0.0}), make_logprobs(), inputs)
    np.testing.assert_array_equal(terms.grad.numpy(), -inputs["advantages"])


def test_gspo_of_a_datum_depends_on_its_own_rows_alone() -> None:
    loss = resolve_loss("gspo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0})
    inputs, logprobs = make_inputs(), make_logprobs()
    together = evaluate(loss, logprobs, inputs)
    for rows in datum_slices(LENGTHS):
        tensors = {name: torch.from_numpy(value[rows]) for name, value in inputs.items()}
        lp = torch.from_numpy(logprobs[rows].astype(np.float32))
        alone = SEQUENCE_LOSSES["gspo"](lp, tensors, loss.config, [len(lp)])
        assert torch.equal(alone.loss, together.loss[rows])
        assert torch.equal(alone.grad, together.grad[rows])


def test_gspo_with_an_empty_mask_has_the_ratio_one() -> None:
    inputs = make_inputs()
    inputs["sequence_ratio_mask"][:] = 0
    terms = evaluate(resolve_loss("gspo", {}), make_logprobs(), inputs)
    np.testing.assert_array_equal(terms.grad.numpy(), -inputs["advantages"])


def test_gspo_of_a_long_datum_keeps_digits_that_its_bounds_need() -> None:
    num_tokens = 100_000
    logprobs = np.full((num_tokens, 1), -0.5, dtype=np.float32)
    sampled = (logprobs - np.float32(3e-4)).astype(np.float32)
    inputs = {
        "logprobs": sampled,
        "advantages": np.ones_like(logprobs),
        "sequence_ratio_mask": np.ones_like(logprobs),
        "clip_low_threshold": np.zeros_like(logprobs),
        "clip_high_threshold": np.full_like(logprobs, 2.0),
    }
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    terms = SEQUENCE_LOSSES["gspo"](torch.from_numpy(logprobs), tensors, {}, [num_tokens])
    exact = np.exp((logprobs.astype(np.float64) - sampled).mean())
    assert -terms.grad[0].item() == pytest.approx(exact, abs=1e-7)


def test_rows_without_signal_are_known_beforehand() -> None:
    inputs = make_inputs(columns=2)
    inputs["weights"][1] = inputs["advantages"][1] = (0, 0.5)
    has_signal = (inputs["weights"] != 0).any(axis=1)
    assert not has_signal.all()
    for name in LOSSES:
        loss = resolve_loss(name, {"beta": 0.0} if name == "dro" else {})
        is_read = RUNS != 0 if name == "stable_reinforce" else np.ones(NUM_ROWS, dtype=np.bool_)
        np.testing.assert_array_equal(rows_with_gradient(loss, inputs), has_signal & is_read)
        flat = {key: value[:, 0] for key, value in inputs.items()}
        np.testing.assert_array_equal(rows_with_gradient(loss, flat), (flat["weights"] != 0) & is_read)
    with_penalty = resolve_loss("stable_reinforce", {"kl_coeff": 0.1})
    np.testing.assert_array_equal(rows_with_gradient(with_penalty, inputs), RUNS != 0)
    assert rows_with_gradient(resolve_loss("dro", {}), inputs).all(), "dro's penalty acts on every token"


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"cross_entropy"}))
def test_rows_said_to_have_no_gradient_have_none(name: str) -> None:
    inputs = make_inputs()
    loss = resolve_loss(name, {})
    grad = evaluate(loss, make_logprobs(), inputs).grad.numpy()
    assert not grad[~rows_with_gradient(loss, inputs)].any()


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_a_token_without_advantage_adds_nothing_whatever_its_placeholder(name: str) -> None:
    inputs = make_inputs()
    inputs["sequence_ratio_mask"][:] = inputs["advantages"] != 0
    idle = inputs["advantages"] == 0
    loss, logprobs = resolve_loss(name, {}), make_logprobs()
    before = evaluate(loss, logprobs, inputs)
    inputs["logprobs"][idle] = -1e4
    after = evaluate(loss, logprobs, inputs)
    assert not after.loss.numpy()[idle].any()
    assert not after.grad.numpy()[idle].any()
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.grad, after.grad)


def test_a_token_of_weight_zero_adds_nothing_to_importance_sampling() -> None:
    """Twinkle's GRPO script masks the prompt by weights, and its placeholders may be any numbers."""
    inputs = make_inputs()
    idle = np.arange(len(inputs["weights"])) % 2 == 0
    inputs["weights"] = np.where(idle[:, None], 0, 1).astype(np.float32)
    inputs["advantages"][:] = 1.5
    loss, logprobs = resolve_loss("importance_sampling", {}), make_logprobs()
    before = evaluate(loss, logprobs, inputs)
    inputs["logprobs"][idle] = -1e4
    after = evaluate(loss, logprobs, inputs)
    assert not after.loss.numpy()[idle].any()
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.grad, after.grad)


def test_gspo_without_advantages_is_zero_even_at_an_infinite_ratio() -> None:
    inputs = make_inputs()
    inputs["advantages"][:] = 0
    inputs["sequence_ratio_mask"][:] = 1
    inputs["logprobs"][:] = -1e30
    terms = evaluate(resolve_loss("gspo", {}), make_logprobs(), inputs)
    assert not terms.loss.any()
    assert not terms.grad.any()


def _negative(values: NDArray[np.float32]) -> None:
    values[:] = -np.abs(values) - 0.25


def _zero(values: NDArray[np.float32]) -> None:
    values[:] = 0


def _huge(values: NDArray[np.float32]) -> None:
    values *= np.float32(1e30)


@pytest.mark.parametrize("change", [_negative, _zero, _huge])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_any_finite_signal_has_the_documented_loss(name: str, change: Callable[[NDArray[np.float32]], None]) -> None:
    loss = resolve_loss(name, {})
    inputs, logprobs = make_inputs(), make_logprobs()
    change(inputs["weights"])
    inputs["advantages"] = inputs["weights"]
    if name == "importance_sampling":
        # Its signal is the product of the two, which must not be beyond float32 itself.
        inputs["weights"] = np.ones_like(inputs["weights"])
    inputs64 = in_float64(inputs)
    terms = evaluate(loss, logprobs, inputs)
    expected = reference_loss(loss, logprobs, inputs64, frozen_factors(loss, logprobs, inputs64))
    np.testing.assert_allclose(terms.loss.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(terms.grad).all()


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_bounded_losses_survive_an_infinite_ratio(name: str) -> None:
    inputs = make_inputs()
    inputs["advantages"][:] = 1
    inputs["logprobs"][:] = -200
    terms = evaluate(resolve_loss(name, {}), make_logprobs(), inputs)
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(terms.grad).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(LOSSES)), st.floats(0.1, 20))
def test_gradient_equals_finite_differences_for_any_inputs(seed: int, name: str, scale: float) -> None:
    loss = resolve_loss(name, {})
    inputs, logprobs = make_inputs(seed=seed), make_logprobs(seed=seed + 1)
    inputs["logprobs"] = (logprobs + (inputs["logprobs"] + 2) * scale / 10).astype(np.float32)
    inputs64 = in_float64(inputs)
    expected = finite_difference(loss, logprobs, inputs64)
    grad = evaluate(loss, logprobs, inputs).grad.numpy()
    # Within a step of a kink the difference quotient lies between two slopes, and is neither.
    frozen = frozen_factors(loss, logprobs, inputs64)
    ratio = np.exp(logprobs - inputs64["logprobs"]) if name == "ppo" else frozen * np.exp(logprobs)
    near = np.zeros_like(ratio, dtype=bool)
    if name in ("ppo", "gspo"):
        for bound in ("clip_low_threshold", "clip_high_threshold"):
            near |= np.abs(ratio - inputs64[bound]) < 1e-5 * ratio
    np.testing.assert_allclose(grad[~near], expected[~near], rtol=2e-4, atol=1e-4)
