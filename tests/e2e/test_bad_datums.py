"""Datums that cannot be honoured, from the official SDK: each is named by index and field, and training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from e2e_support import ServerProcess, batch, failure_of, logprobs_of, train_step
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

# Far above what any of these takes, far below a hang.
QUICK_S = 20
TOKENS = [10, 11, 12, 13]
TARGETS = [11, 12, 13, 14]
POLICY = {"target_tokens": TARGETS, "logprobs": [-7.0] * 4, "advantages": [1.0, 0.0, -0.5, 2.0]}


def text_datum(tokens: list[int] = TOKENS, **inputs: Any) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


@dataclass(frozen=True)
class BadDatum:
    """A datum, the loss it is sent to, and the words that its error must have besides its index."""

    loss_fn: str
    datum: types.Datum
    words: tuple[str, ...]
    config: Mapping[str, float] = field(default_factory=dict)


def weights(values: Any) -> types.Datum:
    return text_datum(target_tokens=TARGETS, weights=values)


def policy(**changes: Any) -> types.Datum:
    return text_datum(**{**POLICY, **changes})


BAD_DATUMS = {
    "no tokens": BadDatum("cross_entropy", text_datum([], target_tokens=[]), ("model_input", "no tokens")),
    "targets of another length": BadDatum("cross_entropy", text_datum(target_tokens=[1, 2]), ("target_tokens", "[2]")),
    "weights of another length": BadDatum("cross_entropy", weights([1.0]), ("weights", "[1]", "4 tokens")),
    "weights with a column": BadDatum("cross_entropy", weights(torch.ones(4, 1)), ("weights", "[4, 1]")),
    "three dimensions": BadDatum("cross_entropy", weights(torch.ones(4, 1, 1)), ("weights", "[4, 1, 1]")),
    "targets as floats": BadDatum("cross_entropy", text_datum(target_tokens=np.ones(4)), ("target_tokens", "float32")),
    "token out of range": BadDatum(
        "cross_entropy", text_datum([10, 11, 10**6, 13], target_tokens=TARGETS), ("model_input[2] is 1000000",)
    ),
    "negative token": BadDatum("cross_entropy", text_datum([10, -3, 1, 1], target_tokens=TARGETS), ("model_input[1]",)),
    "target out of range": BadDatum(
        "cross_entropy", text_datum(target_tokens=[1, 2, 3, 10**6]), ("target_tokens[3] is 1000000",)
    ),
    "negative target": BadDatum("ppo", policy(target_tokens=[1, -100, 3, 4]), ("target_tokens[1] is -100",)),
    "soft target out of range": BadDatum(
        "cross_entropy", text_datum(target_tokens=torch.tensor([[1, 10**6]] * 4)), ("target_tokens[0, 1]",)
    ),
    "nan weight": BadDatum("cross_entropy", weights([1.0, 1.0, math.nan, 1.0]), ("weights[2] is nan",)),
    "infinite weight": BadDatum("cross_entropy", weights([1.0, -math.inf, 1.0, 1.0]), ("weights[1] is -inf",)),
    "nan advantage": BadDatum("gspo", policy(advantages=[1.0, 1.0, 1.0, math.nan]), ("advantages[3] is nan",)),
    "infinite sampling logprob": BadDatum("dro", policy(logprobs=[-math.inf, 0.0, 0.0, 0.0]), ("logprobs[0] is -inf",)),
    "nan clip": BadDatum("cispo", policy(clip_high_threshold=[1.0, 1.0, math.nan, 1.0]), ("clip_high_threshold[2]",)),
    "crossed clips": BadDatum(
        "ppo",
        policy(clip_low_threshold=[0.5, 0.5, 1.5, 0.5]),
        ("clip_low_threshold[2] = 1.5", "clip_high_threshold = 1.2"),
    ),
    "mask of another length": BadDatum("gspo", policy(sequence_ratio_mask=[1.0]), ("sequence_ratio_mask", "[1]")),
    "mask for a loss without": BadDatum(
        "ppo", policy(sequence_ratio_mask=[1.0] * 4), ("sequence_ratio_mask", "not an input of ppo")
    ),
    "unknown input": BadDatum("cross_entropy", text_datum(target_tokens=TARGETS, mask=np.ones(4)), ("'mask'",)),
    "missing input": BadDatum("importance_sampling", text_datum(target_tokens=TARGETS), ("logprobs, advantages",)),
    "soft targets for a policy": BadDatum(
        "cispo", policy(target_tokens=torch.ones(4, 2, dtype=torch.int64)), ("target_tokens", "[4, 2]")
    ),
    "a ratio that overflows": BadDatum(
        "importance_sampling",
        policy(logprobs=[-7.0, -7.0, -7.0, -500.0]),
        ("the loss at position 3 is not finite", "logprobs[3] = -500.0", "advantages[3] = 2.0"),
    ),
    "a penalty that overflows": BadDatum("dro", policy(logprobs=[-1e30, 0.0, 0.0, 0.0]), ("position 0", "logprobs[0]")),
}


def good_datums(loss_fn: str) -> list[types.Datum]:
    return batch(3) if loss_fn == "cross_entropy" else [policy(), policy(), policy()]


def test_bad_datums_fail_by_name_and_the_run_trains_on(server: ServerProcess) -> None:
    """One run sends them all, so that each also shows that the one before left nothing behind."""
    client, neighbour, untroubled = (server.training_client(seed=7) for _ in range(3))
    losses = [train_step(client, batch()), train_step(untroubled, batch())]
    assert losses[0] == losses[1]
    for name, bad in BAD_DATUMS.items():
        passed = client.forward_backward(
            [*good_datums(bad.loss_fn), bad.datum],
            bad.loss_fn,  # type: ignore[arg-type]
            dict(bad.config),
        )
        beside = neighbour.forward_backward(batch(), "cross_entropy")
        failure = failure_of(passed, timeout_s=QUICK_S)
        assert failure is not None, name
        assert failure.category.value == "user", (name, failure)
        for word in ("datum 3: ", *bad.words):
            assert word in str(failure), (name, word, str(failure))
        beside.result(timeout=QUICK_S)
    # No gradient of theirs is left: the next step is that of a run that never sent them.
    assert failure_of(client.optim_step(types.AdamParams())) is not None
    assert train_step(client, batch(seed=1)) == train_step(untroubled, batch(seed=1))
    after = [run.forward(batch(seed=2), "cross_entropy").result(timeout=QUICK_S) for run in (client, untroubled)]
    assert logprobs_of(after[0]) == logprobs_of(after[1])


ODD_BUT_GOOD = {
    "huge advantages": ("ppo", policy(advantages=[1e15, 0.0, -1e15, 1.0])),
    "huge weights": ("cross_entropy", weights([1e15, -1e15, 0.5, 0.0])),
    "all-zero weights": ("cross_entropy", weights([0.0] * 4)),
    "negative and fractional weights": ("cross_entropy", weights([-1.5, 0.25, 1.0, -0.125])),
    "integer weights": ("cross_entropy", weights(torch.tensor([0, 1, 2, -1]))),
    "no advantage anywhere": ("gspo", policy(advantages=[0.0] * 4)),
    "empty mask": ("gspo", policy(sequence_ratio_mask=[0.0] * 4)),
    "equal clips": ("cispo", policy(clip_low_threshold=[2.0] * 4, clip_high_threshold=[2.0] * 4)),
    "placeholder logprobs without advantage": ("importance_sampling", policy(logprobs=[-7.0, -1e30, -7.0, -7.0])),
    "one token": ("dro", text_datum([5], target_tokens=[6], logprobs=[-7.0], advantages=[1.0])),
}


@pytest.mark.parametrize("name", ODD_BUT_GOOD)
def test_odd_datums_that_mean_something_are_honoured(server: ServerProcess, name: str) -> None:
    loss_fn, datum = ODD_BUT_GOOD[name]
    client = server.training_client()
    output = client.forward_backward([datum], loss_fn).result(timeout=QUICK_S)  # type: ignore[arg-type]
    assert math.isfinite(output.metrics["loss:sum"])
    metrics = client.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=QUICK_S).metrics
    assert metrics is not None
    assert math.isfinite(metrics["update_norm"])
    assert math.isfinite(train_step(client, batch()))


@pytest.mark.parametrize(
    ("loss_fn", "datum"),
    [("ppo", policy(advantages=[1e30, 0.0, -1e30, 1.0])), ("cross_entropy", weights([1e30, -1e30, 0.5, 0.0]))],
)
def test_a_gradient_that_no_step_can_take_is_refused_with_its_request(
    server: ServerProcess, loss_fn: str, datum: types.Datum
) -> None:
    client = server.training_client()
    with pytest.raises(tinker.RequestFailedError, match=r"norm .* over 1e\+18"):
        client.forward_backward([datum], loss_fn).result(timeout=QUICK_S)  # type: ignore[arg-type]
    assert math.isfinite(train_step(client, batch()))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        ("stable_reinforce", "stable_reinforce needs its provenance"),
        ("custom", "custom loss '' does not exist"),
        ("dpo", "'dpo' is not enabled for you.*gspo"),
    ],
)
def test_losses_that_lack_what_they_need_are_refused(server: ServerProcess, loss_fn: str, message: str) -> None:
    client = server.training_client()
    with pytest.raises(tinker.RequestFailedError, match=message) as caught:
        client.forward_backward([policy()], loss_fn).result(timeout=QUICK_S)  # type: ignore[arg-type]
    assert caught.value.category.value == "user"
