"""A pass on a device that is not the host, without having one: torch's meta device computes shapes and devices alone.

A tensor that was left on the host, a wait for the device amid a pass (`.item()`, a mask that is indexed with) and a
wrong dtype of an `out=` all raise there. Experts are left out: they wait once per layer, by design. So is grouped-mm,
which knows bfloat16 alone there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_builders import make_datum, make_datums, make_model_dir, quantum_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.domain.losses import LOSSES
from treadle.domain.ops import LoraSpec
from treadle.domain.outcome import PoolFacts
from treadle.engine import passes
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.head import HeadResult
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.kernels.segment_loop import SegmentLoop
from treadle.engine.passes import run_micro_batch
from treadle.engine.state import new_training_state

META = torch.device("meta")
_COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)


class OneDevice(TorchDispatchMode):
    """Refuses every operation, but for copies, on tensors of two devices; a number in a host tensor may join in."""

    def __init__(self) -> None:
        super().__init__()
        self.num_on_device = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        given += [part for value in given if isinstance(value, tuple | list) for part in value]
        tensors = [value for value in given if isinstance(value, Tensor) and value.dim()]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) <= 1 or func.overloadpacket in _COPIES, f"{func} takes tensors of {devices}"
        self.num_on_device += "meta" in devices
        return func(*args, **(kwargs or {}))


@pytest.fixture
def numbers_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one wait between forward and backward, which has nothing to read here."""

    def invented(
        outputs: Sequence[HeadResult], segments: Sequence[LoraSegment], d_hidden_TD: Tensor | None
    ) -> list[passes._HostOutput]:
        tensors = [part for output in outputs for part in (output.logprobs, output.losses, *output.metrics.values())]
        assert d_hidden_TD is not None
        assert {tensor.device for tensor in (*tensors, d_hidden_TD)} == {META}
        return [
            passes._HostOutput(
                logprobs=np.zeros(output.logprobs.shape, dtype=np.float32),
                losses=np.zeros(output.losses.shape, dtype=np.float32),
                metrics=dict.fromkeys(output.metrics, 0.0),
                has_finite_gradient=np.ones(segment.stop - segment.start, dtype=np.bool_),
            )
            for output, segment in zip(outputs, segments, strict=True)
        ]

    monkeypatch.setattr(passes, "_to_host", invented)


def base_on_meta(directory: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=getattr(torch, dtype))
    model.requires_grad_(False)
    model.to(META)
    model.tie_weights()
    facts = PoolFacts(
        base_model="local/meta",
        revision="",
        architecture=type(model).__name__,
        vocab_size=config.vocab_size,
        max_context_length=config.max_position_embeddings,
        num_parameters=1,
        dtype=dtype,
        device="meta",
        numerics_profile="",
        source_dir="",
        tokenizer_dir="",
    )
    monkeypatch.setattr("treadle.engine.base_model.numerics_profile", lambda base: "meta")
    return BaseModel(model, device=META, facts=facts, kernel=SegmentLoop())


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("qwen3", "float32"), ("llama", "bfloat16"), ("qwen3", "bfloat16")]
)
@pytest.mark.usefixtures("numbers_invented")
def test_a_pass_stays_on_its_device_and_never_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: str
) -> None:
    base = base_on_meta(make_model_dir(tmp_path, architecture, tied=False), dtype, monkeypatch)
    rng = np.random.default_rng(0)
    states = [new_training_state(base, LoraSpec(rank=rank, seed=rank, train_mlp=rank != 8)) for rank in (1, 8, 4)]
    for recompute in Recompute:
        base.use_buckets((512,) if recompute is Recompute.NONE else ())
        quanta = [
            quantum_of(states[index % 3], make_datums(rng, [33, 5 + index, 33], loss), loss)
            for index, loss in enumerate(LOSSES)
        ]
        quanta.append(quantum_of(states[0], [make_datum(rng, 300, columns=2)], forward_only=True))
        with OneDevice() as seen:
            results = run_micro_batch(base, quanta, recompute=recompute)
        assert seen.num_on_device > 100
        assert all(result.failure is None for result in results)
