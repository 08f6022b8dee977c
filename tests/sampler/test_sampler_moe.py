"""Sampling from a mixture of experts: the trainer's numbers, and the same bits in any company.

A decode pass has few rows and they go to many experts, so most experts see one row or none: how many depends on who
else is being sampled.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampler_support import adapter_of, ask, prompt_of, reference_logprobs, reference_model, sample
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from treadle.engine import head
from treadle.engine.attention import PackedCausalAttention
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.kernels.base import LoraSegment
from treadle.sampler.base import SamplerLimits


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Twelve experts, four per row, and a dense layer between two sparse ones."""
    config = Qwen3MoeConfig(
        vocab_size=331,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=40,
        num_experts=12,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    directory = tmp_path_factory.mktemp("moe")
    with torch.random.fork_rng():
        torch.manual_seed(20)
        Qwen3MoeForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return load_base_model(str(directory), name="local/moe", device="cpu", dtype="float32")


def test_the_bare_model_samples_what_transformers_computes(moe: BaseModel) -> None:
    prompt = prompt_of(30)
    sequence = sample(moe, [ask("a", prompt, max_tokens=25)])["a"].sequences[0]
    tokens = [*prompt, *sequence.tokens.tolist()]
    expected = reference_logprobs(reference_model(moe), tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])
    np.testing.assert_allclose(sequence.logprobs, expected[len(prompt) - 1 :, 0].numpy(), atol=1e-4)


def test_sampling_logprobs_equal_the_trainers_under_an_adapter(moe: BaseModel) -> None:
    adapter = adapter_of(moe, seed=3)
    prompt = prompt_of(21)
    sequence = sample(moe, [ask("a", prompt, adapter=adapter, max_tokens=30)])["a"].sequences[0]
    tokens = [*prompt, *sequence.tokens.tolist()]
    num_rows = -(-len(tokens) // 16) * 16
    segments = [LoraSegment(adapter, 0, len(tokens))]
    with torch.no_grad():
        hidden = moe.forward_hidden(
            torch.tensor(tokens + [0] * (num_rows - len(tokens))),
            torch.arange(num_rows),
            attention=PackedCausalAttention([len(tokens)], num_rows),
            segments=segments,
        )
    trainer = torch.log_softmax(head.logits(moe, hidden, segments), dim=-1)
    expected = [trainer[len(prompt) - 1 + i, token].item() for i, token in enumerate(sequence.tokens.tolist())]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)
    bare = sample(moe, [ask("a", prompt, max_tokens=30)])["a"].sequences[0]
    assert not np.allclose(bare.logprobs[0], sequence.logprobs[0], atol=1e-3), "the adapter changes the model"


def test_a_sample_has_the_same_bits_alone_and_in_a_crowd(moe: BaseModel) -> None:
    adapters = [None, adapter_of(moe, seed=1), adapter_of(moe, seed=2, rank=1)]
    crowd = [
        ask(
            f"r{index}",
            prompt_of(1 + 13 * index, seed=index),
            # Neighbours under the same adapter share its runs at each expert.
            adapter=adapters[index % 3],
            seed=index,
            num_samples=1 + index % 4,
            max_tokens=8 + 5 * (index % 3),
            wants_prompt_logprobs=index % 2 == 0,
        )
        for index in range(9)
    ]
    limits = SamplerLimits(max_running=16, prefill_chunk_tokens=48)
    together = sample(moe, crowd, limits=limits)
    for one in crowd:
        alone = sample(moe, [one], limits=limits)[one.request_id]
        beside = together[one.request_id]
        for left, right in zip(alone.sequences, beside.sequences, strict=True):
            assert left.tokens.tolist() == right.tokens.tolist(), one.request_id
            assert left.logprobs.tobytes() == right.logprobs.tobytes(), one.request_id
        if one.op.wants_prompt_logprobs:
            assert alone.prompt_logprobs is not None
            assert beside.prompt_logprobs is not None
            assert alone.prompt_logprobs.tobytes() == beside.prompt_logprobs.tobytes()
