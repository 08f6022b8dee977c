"""The random-weight models that CPU figures are quoted on: Qwen3 shapes of 1M and 27M parameters.

    python scripts/bench/models.py DIR [1m] [27m]

Both: vocabulary 4,096, context 4,096, tied embeddings. Weights are random, so losses mean nothing; speed does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPES = {
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


def make_model(root: Path, size: str) -> Path:
    """The directory of the model of this size, made if it is not there."""
    directory = root / f"qwen3-{size}"
    if (directory / "model.safetensors").exists():
        return directory
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        rope_theta=1e6,
        **SHAPES[size],
    )
    Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    for wanted in sys.argv[2:] or SHAPES:
        print(make_model(Path(sys.argv[1]), wanted))
