"""The chunked head: bounded memory, and the shapes that come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_builders import VOCAB_SIZE, make_datum, make_datums, make_state, quantum_of
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.domain.ops import LoraSpec
from treadle.engine.base_model import BaseModel
from treadle.engine.head import GROUP_ROWS
from treadle.engine.passes import run_micro_batch, sum_metrics


class LargestTensor(TorchDispatchMode):
    """Remembers the most rows of any [rows, vocabulary] tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == VOCAB_SIZE:
                self.num_rows = max(self.num_rows, tensor.shape[0])
        return out


@pytest.mark.parametrize("forward_only", [False, True])
def test_logits_of_more_than_a_group_never_exist(base: BaseModel, forward_only: bool) -> None:
    rng = np.random.default_rng(0)
    quanta = [
        quantum_of(
            make_state(base, LoraSpec(rank=2, seed=seed)), make_datums(rng, [300, 299]), forward_only=forward_only
        )
        for seed in range(2)
    ]
    with LargestTensor() as watch:
        run_micro_batch(base, quanta)
    assert watch.num_rows == GROUP_ROWS == 256


def test_logprobs_have_the_shape_of_the_targets(base: BaseModel) -> None:
    rng = np.random.default_rng(1)
    datums = [make_datum(rng, 7), make_datum(rng, 9, columns=3), make_datum(rng, 4, columns=1)]
    (result,) = run_micro_batch(base, [quantum_of(make_state(base, LoraSpec(rank=2, seed=0)), datums)])
    assert [array.shape for array in result.logprobs] == [(7,), (9, 3), (4, 1)]
    assert all(array.dtype == np.float32 and array.max() < 0 for array in result.logprobs)
    expected = -sum(
        float((array * datum.inputs["weights"]).sum()) for array, datum in zip(result.logprobs, datums, strict=True)
    )
    assert result.metrics == {"loss:sum": pytest.approx(expected, rel=1e-5)}


def test_one_target_of_several_columns_is_that_target_alone(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(2), 20)
    targets, weights = datum.inputs["target_tokens"], datum.inputs["weights"]
    wide = type(datum)(
        tokens=datum.tokens,
        inputs={
            "target_tokens": np.stack([targets, (targets + 1) % VOCAB_SIZE], axis=1),
            "weights": np.stack([weights, np.zeros_like(weights)], axis=1),
        },
    )
    state = make_state(base, LoraSpec(rank=2, seed=0))
    narrow_quantum, wide_quantum = quantum_of(state, [datum]), quantum_of(state, [wide])
    narrow_result, wide_result = run_micro_batch(base, [narrow_quantum, wide_quantum])
    np.testing.assert_array_equal(narrow_result.logprobs[0], wide_result.logprobs[0][:, 0])
    assert narrow_quantum.scratch is not None
    assert wide_quantum.scratch is not None
    torch.testing.assert_close(narrow_quantum.scratch.flat, wide_quantum.scratch.flat, rtol=1e-5, atol=1e-6)


def test_absent_weights_count_one(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(3), 12)
    bare = type(datum)(tokens=datum.tokens, inputs={"target_tokens": datum.inputs["target_tokens"]})
    (result,) = run_micro_batch(base, [quantum_of(make_state(base, LoraSpec(rank=2, seed=0)), [bare])])
    assert result.metrics["loss:sum"] == pytest.approx(-float(result.logprobs[0].sum()), rel=1e-6)


def test_per_token_clips_replace_the_configured_ones(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(4), 40, "ppo")
    wide_open = {
        "clip_low_threshold": np.zeros(40, dtype=np.float32),
        "clip_high_threshold": np.full(40, 1e9, dtype=np.float32),
    }
    free = type(datum)(tokens=datum.tokens, inputs={**datum.inputs, **wide_open})
    state = make_state(base, LoraSpec(rank=2, seed=0))
    clipped, unclipped, reference = run_micro_batch(
        base,
        [
            quantum_of(state, [datum], "ppo"),
            quantum_of(state, [free], "ppo"),
            quantum_of(state, [free], "importance_sampling"),
        ],
    )
    assert clipped.metrics["clipped_tokens:sum"] > 0
    assert unclipped.metrics["clipped_tokens:sum"] == 0
    assert unclipped.metrics["loss:sum"] == pytest.approx(reference.metrics["loss:sum"], rel=1e-6)
    assert sum_metrics([clipped, unclipped])["loss:sum"] == pytest.approx(
        clipped.metrics["loss:sum"] + unclipped.metrics["loss:sum"]
    )


def test_quantum_without_signal_trains_nothing(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(5), 30)
    datum.inputs["weights"][:] = 0  # type: ignore[index]
    quantum = quantum_of(make_state(base, LoraSpec(rank=2, seed=0)), [datum])
    (result,) = run_micro_batch(base, [quantum])
    assert result.metrics["loss:sum"] == 0
    assert quantum.scratch is not None
    assert not quantum.scratch.flat.any()
