"""Small models and a driver for the sampler's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sampler_support import BUNDLED
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from treadle.engine.base_model import BaseModel, load_base_model

QWEN: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Random weights, two query heads per key head, a vocabulary that is no multiple of anything, no tokenizer."""
    return _saved(Qwen3ForCausalLM, Qwen3Config(**QWEN, eos_token_id=7), tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Twelve experts, four per row, and a dense layer between two sparse ones.

    A decode pass has few rows and they go to many experts, so most experts see one row or none: how many depends on
    who else is being sampled.
    """
    config = Qwen3MoeConfig(
        **QWEN,
        eos_token_id=None,
        moe_intermediate_size=40,
        num_experts=12,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
    return _saved(Qwen3MoeForCausalLM, config, tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Random weights, six query heads per key head, untied head."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return _saved(LlamaForCausalLM, config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny() -> BaseModel:
    """The bundled model, which has a tokenizer."""
    return load_base_model(str(BUNDLED), name="treadle/tiny", device="cpu", dtype="float32")


def _saved(kind: type, config: object, directory: Path) -> BaseModel:
    torch.manual_seed(20)
    kind(config).to(torch.float32).save_pretrained(directory)
    return load_base_model(str(directory), name=f"local/{directory.name}", device="cpu", dtype="float32")
