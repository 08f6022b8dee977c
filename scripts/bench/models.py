"""The random-weight models that figures are quoted on.

    python scripts/bench/models.py DIR [1m] [27m]

CPU: Qwen3 shapes of 1M and 27M parameters (and "tiny", for tests of the benchmarks), vocabulary 4,096, context 4,096,
tied embeddings, written to a directory. Accelerator: the shapes of Qwen3-0.6B, 4B and 8B, made on the device and never
written. Weights are random, so losses mean nothing; speed does.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 256,
    },
    "1m": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "27m": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}
# Source: config.json of Qwen/Qwen3-0.6B, Qwen/Qwen3-4B and Qwen/Qwen3-8B.
_QWEN3 = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
}
DEVICE_SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "4b": _QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}


def make_model(root: Path, size: str) -> Path:
    """The directory of the model of this size, made if it is not there."""
    directory = root / f"qwen3-{size}"
    if (directory / "model.safetensors").exists():
        return directory
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    Qwen3ForCausalLM(model_config(size)).to(torch.float32).save_pretrained(directory)
    return directory


def model_config(size: str) -> Qwen3Config:
    """The configuration of a model of SHAPES or DEVICE_SHAPES."""
    shape = SHAPES[size] if size in SHAPES else DEVICE_SHAPES[size]
    defaults = {"vocab_size": 4096, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    options = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 1e6}
    return Qwen3Config(**(defaults | options | shape))


def model_on_device(size: str, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """A frozen random model that exists on the device alone; its weights are drawn there."""
    generator_state = torch.get_rng_state()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = Qwen3ForCausalLM(model_config(size))
    finally:
        torch.set_default_dtype(default)
        torch.set_rng_state(generator_state)
    model.requires_grad_(False)
    model.train(False)
    return model


def twin(model: nn.Module) -> nn.Module:
    """A model of its own modules over the same weights, for another side of a comparison to wrap."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


if __name__ == "__main__":
    for wanted in sys.argv[2:] or ("1m", "27m"):
        print(make_model(Path(sys.argv[1]), wanted))
