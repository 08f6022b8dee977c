"""Custom losses and stable_reinforce: how a request is cut, what it runs beside and how often changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_loss_builders import custom_datum, traced
from engine_builders import load_tiny, make_datums, make_state, quantum_of

from treadle.domain.losses import SAMPLED_RUNS, SAMPLING_LOGPROBS, Loss, resolve_loss
from treadle.domain.ops import Datum, LoraSpec
from treadle.engine.passes import QuantumInput, run_micro_batch

LENGTHS = (40, 3, 130, 64)


def contrast(logprobs: torch.Tensor, q: torch.Tensor) -> Any:
    """Pairs of tokens and a sequence ratio: nothing that acts on each token alone."""
    difference = logprobs - q
    pairs = torch.nn.functional.logsigmoid(difference[:, None] - difference[None, :])
    return -torch.exp(difference.mean()) - pairs.mean(), {"custom/pairs:sum": pairs.sum()}


def custom() -> tuple[Loss, list[Datum]]:
    _, loss = traced(contrast, {"logprobs": 1, "q": 1})
    rng = np.random.default_rng(3)
    data = [custom_datum(n, seed=n, q=rng.normal(-5, 1, n).astype(np.float32)) for n in LENGTHS]
    return Loss("custom", custom=loss), data


def reinforce() -> tuple[Loss, list[Datum]]:
    rng = np.random.default_rng(4)
    data = []
    for n in LENGTHS:
        # A prompt, and two turns of a conversation where there is room for them.
        runs = np.ones(n, np.float32)
        runs[n // 2 :] = 2
        runs[: n // 4] = 0
        inputs = {
            SAMPLING_LOGPROBS: rng.normal(-5, 0.3, n).astype(np.float32),
            SAMPLED_RUNS: runs,
            "advantages": rng.normal(size=n).astype(np.float32),
        }
        data.append(custom_datum(n, seed=n, **inputs))
    return resolve_loss("stable_reinforce", {"kl_coeff": 0.2}), data


@pytest.mark.parametrize("make", [custom, reinforce])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuts_company_and_repetition_change_no_bit(
    make: Callable[[], tuple[Loss, list[Datum]]], dtype: str, model_dir_of: Callable[[str, bool], Path]
) -> None:
    base = load_tiny(model_dir_of("qwen3", True), dtype=dtype)
    loss, data = make()
    company = [
        quantum_of(make_state(base, LoraSpec(rank=2, seed=99)), make_datums(np.random.default_rng(5), [21, 70])),
        quantum_of(make_state(base, LoraSpec(rank=4, seed=98)), make()[1][:2], make()[0]),
    ]

    def run(batches: Sequence[Sequence[int]], *, beside: Sequence[QuantumInput] = ()) -> list[bytes]:
        """The gradient, and each datum's logprobs and its part of the metrics; one quantum per datum."""
        state = make_state(base, LoraSpec(rank=8, seed=1))
        scratch = state.new_scratch()
        found: dict[int, bytes] = {}
        for batch in batches:
            quanta = [QuantumInput(state=state, datums=[data[i]], loss=loss, scratch=scratch) for i in batch]
            results = run_micro_batch(base, [*beside[:1], *quanta, *beside[1:]])
            assert all(result.failure is None for result in results), results
            for i, result in zip(batch, results[len(beside[:1]) :], strict=False):
                found[i] = result.logprobs[0].tobytes() + repr(sorted(result.metrics.items())).encode()
        assert float(scratch.flat.abs().max()) > 0
        return [scratch.flat.numpy().tobytes(), *(found[i] for i in sorted(found))]

    whole = run([[0, 1, 2, 3]])
    assert whole == run([[0, 1, 2, 3]])
    assert whole == run([[0], [1], [2], [3]])
    assert whole == run([[0, 1], [2, 3]], beside=company)
    assert whole == run([[0], [1, 2], [3]], beside=company[:1])
