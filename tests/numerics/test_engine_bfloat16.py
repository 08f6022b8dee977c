"""A bfloat16 base model against the same one in float32: within rounding, not within 1e-4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from engine_builders import load_tiny, make_datums, make_state, quantum_of

from treadle.domain.ops import LoraSpec
from treadle.engine.passes import run_micro_batch


def test_bfloat16_gradients_point_where_float32_ones_do(model_dir_of: Callable[[str, bool], Path]) -> None:
    datums = make_datums(np.random.default_rng(0), [40, 25, 60])
    gradients, losses = [], []
    for dtype in ("float32", "bfloat16"):
        base = load_tiny(model_dir_of("qwen3", True), dtype=dtype)
        assert base.dtype == getattr(torch, dtype)
        quantum = quantum_of(make_state(base, LoraSpec(rank=8, seed=0)), datums)
        (result,) = run_micro_batch(base, [quantum])
        assert quantum.scratch is not None
        gradients.append(quantum.scratch.flat)
        losses.append(result.metrics["loss:sum"])
    # bfloat16 has 8 bits of mantissa and this model's activations are far larger than a real one's.
    relative_error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-4 < float(relative_error) < 0.05
    assert abs(losses[1] - losses[0]) < 0.05 * abs(losses[0])
