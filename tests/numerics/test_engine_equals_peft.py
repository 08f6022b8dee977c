"""One mixed pass of the engine against peft + transformers, one adapter at a time, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
from engine_builders import load_tiny, make_datum, make_state, quantum_of
from peft_reference import assert_same_gradients, load_in_peft, reference_model, run_reference, write_adapter

from treadle.domain.losses import LOSSES
from treadle.domain.ops import LoraSpec
from treadle.engine.files import encode_state, export_peft
from treadle.engine.passes import run_micro_batch

# peft's own business: it calls what transformers deprecates, and says that tied heads need care when merged.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

RTOL = 1e-4
FLAGS = [
    (attn, mlp, unembed)
    for attn in (True, False)
    for mlp in (True, False)
    for unembed in (True, False)
    if attn or mlp or unembed
]


@pytest.fixture(
    params=[
        (architecture, tied)
        for architecture in ("qwen3", "llama", "qwen3_moe", "qwen3_moe_mixed")
        for tied in (True, False)
    ],
    ids=str,
)
def directory(request: pytest.FixtureRequest, model_dir_of: Callable[[str, bool], Path]) -> Path:
    return model_dir_of(*request.param)


def test_mixed_pass_equals_each_adapter_alone_in_peft(directory: Path, tmp_path: Path) -> None:
    base = load_tiny(directory)
    rng = np.random.default_rng(1)
    quanta = []
    for index, (attn, mlp, unembed) in enumerate(FLAGS):
        spec = LoraSpec(
            rank=(1, 3, 8, 16)[index % 4], seed=index, train_attn=attn, train_mlp=mlp, train_unembed=unembed
        )
        loss = tuple(LOSSES)[index % len(LOSSES)]
        columns = 3 if index == 0 else None
        # The first quantum is longer than one chunk of the head.
        lengths = (150, 140, 1) if index == 0 else (1, 9 + index, 30)
        datums = [make_datum(rng, length, loss, columns=columns) for length in lengths]
        quanta.append(quantum_of(make_state(base, spec), datums, loss))
    results = run_micro_batch(base, quanta)
    for index, (quantum, result) in enumerate(zip(quanta, results, strict=True)):
        assert result.failure is None
        data = encode_state(quantum.state, base, with_optimizer=False, applied_seq=0)
        model = load_in_peft(directory, tmp_path / str(index), data)
        logprobs, loss_sum = run_reference(model, quantum.datums, quantum.loss.name, quantum.loss.config)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=1e-5)
        assert result.metrics["loss:sum"] == pytest.approx(loss_sum, rel=RTOL)
        assert quantum.scratch is not None
        assert_same_gradients(quantum.scratch, model, rtol=RTOL)


def test_exported_adapter_loads_in_peft_without_odd_keys(directory: Path, tmp_path: Path) -> None:
    base = load_tiny(directory)
    state = make_state(base, LoraSpec(rank=4, seed=3))
    files = export_peft(encode_state(state, base, with_optimizer=True, applied_seq=7))
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    adapter = write_adapter(tmp_path / "adapter", files)
    adapted = peft.PeftModel.from_pretrained(reference_model(directory), adapter)
    report = adapted.load_adapter(adapter, adapter_name="again")
    assert not [key for key in report.missing_keys if "lora" in key]
    assert not report.unexpected_keys
    trained = [name for name, _ in adapted.named_parameters() if ".default." in name]
    assert len(trained) == len(state.layout.places)
