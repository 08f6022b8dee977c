"""One mixed pass of the engine against peft + transformers, one adapter at a time, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from engine_builders import load_tiny, make_datum, make_state, quantum_of

from treadle.domain.ops import Datum, LoraSpec
from treadle.engine.adapter import TrainingState
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
LOSSES = ("cross_entropy", "importance_sampling", "ppo")


@pytest.fixture(params=[("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False)], ids=str)
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
        loss = LOSSES[index % 3]
        columns = 3 if index == 0 else None
        # The first quantum is longer than one chunk of the head.
        lengths = (150, 140, 1) if index == 0 else (1, 9 + index, 30)
        datums = [make_datum(rng, length, loss, columns=columns) for length in lengths]
        quanta.append(quantum_of(make_state(base, spec), datums, loss))
    results = run_micro_batch(base, quanta)
    for index, (quantum, result) in enumerate(zip(quanta, results, strict=True)):
        assert result.failure is None
        model = load_in_peft(
            directory,
            tmp_path / str(index),
            quantum.state,
            encode_state(quantum.state, base, with_optimizer=False, applied_seq=0),
        )
        logprobs, loss_sum = run_reference(model, quantum.datums, quantum.loss.name, quantum.loss.config)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=1e-5)
        assert result.metrics["loss:sum"] == pytest.approx(loss_sum, rel=RTOL)
        assert_same_gradients(quantum.state, quantum.scratch, model)


def test_exported_adapter_loads_in_peft_without_odd_keys(directory: Path, tmp_path: Path) -> None:
    base = load_tiny(directory)
    state = make_state(base, LoraSpec(rank=4, seed=3))
    files = export_peft(encode_state(state, base, with_optimizer=True, applied_seq=7))
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    model = reference_model(directory)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path)
    report = adapted.load_adapter(tmp_path, adapter_name="again")
    assert not [key for key in report.missing_keys if "lora" in key]
    assert not report.unexpected_keys
    trained = [name for name, _ in adapted.named_parameters() if ".default." in name]
    assert len(trained) == len(state.layout.places)


def reference_model(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def load_in_peft(directory: Path, into: Path, state: TrainingState, data: bytes) -> torch.nn.Module:
    into.mkdir()
    for name, content in export_peft(data).items():
        (into / name).write_bytes(content)
    return peft.PeftModel.from_pretrained(reference_model(directory), into, is_trainable=True)


def run_reference(
    model: torch.nn.Module, datums: Sequence[Datum], loss: str, config: Mapping[str, float]
) -> tuple[list[np.ndarray], float]:
    """Log-probabilities and the summed loss of plain autograd; leaves gradients on the model."""
    logprobs = []
    total = torch.zeros(())
    for datum in datums:
        logits = model(input_ids=torch.from_numpy(datum.tokens.astype(np.int64))[None]).logits[0]
        targets = torch.from_numpy(datum.inputs["target_tokens"])
        picked = logits.log_softmax(-1).gather(1, targets.reshape(len(targets), -1)).reshape(targets.shape)
        total = total + reference_loss(picked, datum, loss, config)
        logprobs.append(picked.detach().numpy())
    total.backward()
    return logprobs, total.item()


def reference_loss(logprobs: torch.Tensor, datum: Datum, loss: str, config: Mapping[str, float]) -> torch.Tensor:
    if loss == "cross_entropy":
        return -(torch.from_numpy(datum.inputs["weights"]) * logprobs).sum()
    ratio = (logprobs - torch.from_numpy(datum.inputs["logprobs"])).exp()
    advantages = torch.from_numpy(datum.inputs["advantages"])
    if loss == "importance_sampling":
        return -(ratio * advantages).sum()
    bounded = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * advantages, bounded * advantages).sum()


def assert_same_gradients(state: TrainingState, scratch: object, model: torch.nn.Module) -> None:
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(theirs) == len(state.layout.places)
    for module in state.weights.modules:
        for which, ours in (("A", scratch.a(module)), ("B", scratch.b(module))):
            reference = theirs[f"base_model.model.{module}.lora_{which}.default.weight"]
            assert reference.abs().max() > 0, f"{module} {which} has no gradient to compare"
            torch.testing.assert_close(ours, reference, rtol=RTOL, atol=RTOL * float(reference.abs().max()))
