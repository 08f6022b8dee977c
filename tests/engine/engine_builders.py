"""Small random base models, datums and adapters for the engine's tests. Nothing here is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from treadle.domain.losses import Loss, resolve_loss
from treadle.domain.ops import Datum, LoraSpec
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.passes import QuantumInput
from treadle.engine.state import TrainingState, new_training_state

VOCAB_SIZE = 160
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Far above the usual 0.02, so that logits and gradients are not all alike.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 2,
}

_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


# Eight experts of which a row uses three: some have few rows or none. The second layer is dense in "qwen3_moe_mixed".
_MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
_KINDS: Mapping[str, tuple[type, type, Mapping[str, object]]] = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
    # Llama's options that Qwen3 does not have: biases everywhere, and rescaled rotary frequencies.
    "llama": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA_ROPE},
    ),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, _MOE),
    "qwen3_moe_mixed": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {**_MOE, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
}


def make_model_dir(directory: Path, architecture: str, *, tied: bool, seed: int = 0, **sizes: object) -> Path:
    """A saved random model of one of the kinds above, in float32. sizes: settings other than above."""
    config_class, model_class, extra = _KINDS[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**{**_SIZES, **extra, **sizes}, tie_word_embeddings=tied))
        # Norm weights start at 1 and biases at 0; other values show whether they are honoured.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.data.normal_(0, 0.3)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    return directory


def load_tiny(directory: Path, *, num_threads: int = 1, dtype: str = "float32") -> BaseModel:
    """A base model from make_model_dir."""
    return load_base_model(str(directory), name="local/tiny", device="cpu", dtype=dtype, num_threads=num_threads)


def make_datum(
    rng: np.random.Generator,
    length: int,
    loss: str = "cross_entropy",
    *,
    columns: int | None = None,
    idle: float = 1 / 3,
) -> Datum:
    """A datum with every required input of the loss; the share `idle` of its positions carries no gradient."""
    shape = (length,) if columns is None else (length, columns)
    inputs: dict[str, NDArray[np.generic]] = {"target_tokens": rng.integers(0, VOCAB_SIZE, shape)}
    signal = rng.normal(size=shape).astype(np.float32) * (rng.random(shape) >= idle)
    if loss == "cross_entropy":
        inputs["weights"] = signal.astype(np.float32)
    elif loss == "stable_reinforce":
        # A prompt, and two runs of sampled tokens right behind one another.
        runs = np.repeat([0, 1, 2], np.diff([0, length // 4, length * 2 // 3, length]))
        inputs["sampled_runs"] = runs.astype(np.float32)
        inputs["advantages"] = (signal * (runs != 0)).astype(np.float32)
        inputs["sampling_logprobs"] = rng.normal(-5.0, 1.0, shape).astype(np.float32)
    else:
        inputs["advantages"] = signal.astype(np.float32)
        inputs["logprobs"] = rng.normal(-5.0, 1.0, shape).astype(np.float32)
    return Datum(tokens=rng.integers(0, VOCAB_SIZE, length).astype(np.int32), inputs=inputs)


def make_datums(
    rng: np.random.Generator, lengths: Sequence[int], loss: str = "cross_entropy", *, idle: float = 1 / 3
) -> tuple[Datum, ...]:
    """One datum per length."""
    return tuple(make_datum(rng, length, loss, idle=idle) for length in lengths)


def make_state(base: BaseModel, spec: LoraSpec, *, b_scale: float = 0.05) -> TrainingState:
    """A fresh run whose B is not zero, so that every gradient is alive. Depends on the spec's seed alone."""
    state = new_training_state(base, spec)
    generator = torch.Generator().manual_seed(spec.seed + 1_000_003)
    for module in state.weights.modules:
        b = state.weights.b(module)
        b.copy_(torch.empty(b.shape).normal_(0, b_scale, generator=generator))
    return state


def quantum_of(
    state: TrainingState, datums: Sequence[Datum], loss: str | Loss = "cross_entropy", *, forward_only: bool = False
) -> QuantumInput:
    """A quantum with a scratch of its own."""
    resolved = resolve_loss(loss, {}) if isinstance(loss, str) else loss
    return QuantumInput(
        state=state, datums=datums, loss=resolved, scratch=None if forward_only else state.new_scratch()
    )
