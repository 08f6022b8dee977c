"""One custom loss three ways: on the server, as the client's surrogate, and by plain autograd on peft. In float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_loss_builders import custom_datum, traced
from engine_builders import load_tiny, make_datum, make_state, quantum_of
from peft_reference import assert_same_gradients, load_in_peft

from treadle.domain.losses import Loss
from treadle.domain.ops import Datum, LoraSpec
from treadle.engine.adapter import AdapterArena
from treadle.engine.files import encode_state
from treadle.engine.passes import QuantumInput, run_micro_batch, sum_metrics
from treadle.engine.state import TrainingState
from treadle.errors import InvalidRequest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

RTOL = 1e-5
LENGTHS = (40, 3, 280)


def contrast(logprobs: torch.Tensor, q: torch.Tensor, beta: torch.Tensor) -> Any:
    """Pairs of tokens, a sequence ratio and a divergence: nothing that acts on each token alone."""
    difference = logprobs - q
    ratio = torch.exp(difference.mean())
    pairs = torch.nn.functional.logsigmoid(beta * (difference[:, None] - difference[None, :]))
    loss = -torch.minimum(ratio, torch.clamp(ratio, 0.9, 1.1)) - pairs.mean() + 0.1 * difference.square().sum()
    return loss, {"custom/ratio:mean": ratio, "custom/pairs:sum": pairs.sum()}


RANKS: Mapping[str, int] = {"logprobs": 1, "q": 1, "beta": 0}


def datums() -> list[Datum]:
    rng = np.random.default_rng(3)
    return [
        custom_datum(
            length,
            seed=length,
            q=rng.normal(-5, 1, length).astype(np.float32),
            beta=np.array(0.3 + 0.1 * index, np.float32),
        )
        for index, length in enumerate(LENGTHS)
    ]


def quantum(state: TrainingState, data: list[Datum], loss: Loss, *, forward_only: bool = False) -> QuantumInput:
    return QuantumInput(state=state, datums=data, loss=loss, scratch=None if forward_only else state.new_scratch())


def arena(of: QuantumInput) -> AdapterArena:
    assert of.scratch is not None
    return of.scratch


def reference(model: torch.nn.Module, data: list[Datum]) -> float:
    """The loss by plain autograd; leaves gradients on the model."""
    total = torch.zeros(())
    for datum in data:
        logits = model(input_ids=torch.from_numpy(datum.tokens.astype(np.int64))[None]).logits[0].float()
        targets = torch.from_numpy(datum.inputs["target_tokens"])
        picked = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        inputs = [torch.from_numpy(np.array(datum.inputs[name])) for name in ("q", "beta")]
        total = total + contrast(picked, *inputs)[0]
    total.backward()
    return total.item()


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_server_surrogate_and_peft_agree(
    architecture: str, model_dir_of: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    directory = model_dir_of(architecture, False)
    base = load_tiny(directory)
    state = make_state(base, LoraSpec(rank=4, seed=5))
    handle, custom = traced(contrast, RANKS)
    data = datums()
    ours = quantum(state, data, Loss("custom", custom=custom))
    (result,) = run_micro_batch(base, [ours])
    assert result.failure is None

    # What forward_backward_custom does with a callable (tinker 0.38, training_client.py).
    cross_entropy = Loss("cross_entropy")
    plain = [replace(datum, inputs={"target_tokens": datum.inputs["target_tokens"]}) for datum in data]
    (forward,) = run_micro_batch(base, [quantum(state, plain, cross_entropy, forward_only=True)])
    weighted, loss_sum = [], 0.0
    for datum, values in zip(data, forward.logprobs, strict=True):
        logprobs = torch.from_numpy(values.copy()).requires_grad_()
        loss, _ = handle.graph(logprobs, *(torch.from_numpy(np.array(datum.inputs[name])) for name in ("q", "beta")))
        loss.backward()
        loss_sum += loss.item()
        assert logprobs.grad is not None
        inputs = {"target_tokens": datum.inputs["target_tokens"], "weights": -logprobs.grad.numpy()}
        weighted.append(replace(datum, inputs=inputs))
    theirs = quantum(state, weighted, cross_entropy)
    (surrogate,) = run_micro_batch(base, [theirs])
    assert surrogate.failure is None
    for mine, one in zip(result.logprobs, forward.logprobs, strict=True):
        np.testing.assert_array_equal(mine, one)
    assert result.metrics["loss:sum"] == pytest.approx(loss_sum, rel=RTOL)
    largest = float(arena(theirs).flat.abs().max())
    torch.testing.assert_close(arena(ours).flat, arena(theirs).flat, rtol=RTOL, atol=RTOL * largest)

    data_bytes = encode_state(state, base, with_optimizer=False, applied_seq=0)
    model = load_in_peft(directory, tmp_path / "peft", data_bytes)
    assert result.metrics["loss:sum"] == pytest.approx(reference(model, data), rel=RTOL)
    assert_same_gradients(arena(ours), model, rtol=10 * RTOL)


def test_bits_do_not_depend_on_the_company(model_dir_of: Callable[[str, bool], Path]) -> None:
    base = load_tiny(model_dir_of("qwen3", True))
    _, custom = traced(contrast, RANKS)
    rng = np.random.default_rng(0)
    state = make_state(base, LoraSpec(rank=4, seed=5))
    alone = quantum(state, datums(), Loss("custom", custom=custom))
    (first,) = run_micro_batch(base, [alone])
    neighbour = make_state(base, LoraSpec(rank=8, seed=6))
    crowd = [
        quantum_of(neighbour, [make_datum(rng, 33, "ppo")], "ppo"),
        quantum(state, datums(), Loss("custom", custom=custom)),
        quantum_of(neighbour, [make_datum(rng, 7, "gspo")], "gspo"),
    ]
    results = run_micro_batch(base, crowd)
    assert results[1].metrics == first.metrics
    assert torch.equal(arena(crowd[1]).flat, arena(alone).flat)


def test_a_loss_that_fails_touches_nobody_else(model_dir_of: Callable[[str, bool], Path]) -> None:
    base = load_tiny(model_dir_of("qwen3", True))
    rng = np.random.default_rng(0)
    state, neighbour = (make_state(base, LoraSpec(rank=4, seed=seed)) for seed in (5, 6))
    _, needs_forty = traced(lambda logprobs: (logprobs.view(4, 10).sum(), {}), {"logprobs": 1})
    data = [replace(datum, inputs={"target_tokens": datum.inputs["target_tokens"]}) for datum in datums()]
    peaceful = [make_datum(rng, 50)]
    alone = quantum_of(neighbour, peaceful)
    (undisturbed,) = run_micro_batch(base, [alone])
    broken = quantum(state, data, Loss("custom", custom=needs_forty))
    beside = quantum_of(neighbour, peaceful)
    failed, result = run_micro_batch(base, [replace(broken, first_datum_index=7), beside])
    assert isinstance(failed.failure, InvalidRequest)
    assert failed.failure.message.startswith("datum 8: custom loss '<lambda>': view (node 'view'): ")
    assert not arena(broken).flat.any()
    assert result.failure is None
    assert result.metrics == undisturbed.metrics
    assert torch.equal(arena(beside).flat, arena(alone).flat)


def test_means_are_over_the_datums_of_the_whole_op(model_dir_of: Callable[[str, bool], Path]) -> None:
    base = load_tiny(model_dir_of("qwen3", True))
    state = make_state(base, LoraSpec(rank=4, seed=5))
    _, custom = traced(contrast, RANKS)
    loss = Loss("custom", custom=custom)
    first, second, third = datums()
    parts = [quantum(state, part, loss, forward_only=True) for part in ([first, second], [third])]
    apart = sum_metrics(run_micro_batch(base, parts))
    each = [sum_metrics(run_micro_batch(base, [quantum(state, [d], loss, forward_only=True)])) for d in datums()]
    mean = sum(metrics["custom/ratio:mean"] for metrics in each) / 3
    assert apart["custom/ratio:mean"] == pytest.approx(mean, rel=1e-6)
    assert apart["custom/pairs:sum"] == pytest.approx(sum(metrics["custom/pairs:sum"] for metrics in each), rel=1e-6)
