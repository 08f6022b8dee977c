"""Samples under many adapters in one batch against peft + transformers, one adapter at a time, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_builders import load_tiny, make_state
from peft_reference import load_in_peft

from treadle.domain.ids import RequestId, SamplingSessionId, TenantId
from treadle.domain.ops import LoraSpec, SampleOp, SamplingParams
from treadle.domain.outcome import SampleResult
from treadle.engine.adapter import AdapterWeights
from treadle.engine.files import decode_weights, encode_state
from treadle.sampler.base import SampleRequest
from treadle.sampler.builtin import open_sampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]
RANKS = (1, 2, 3, 4, 5, 8, 8, 8, 11, 16, 24, 32)
NUM_TOKENS = 12


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe_mixed"])
def test_each_sample_of_a_batch_has_the_logprobs_of_its_own_adapter_in_peft(
    architecture: str, model_dir_of: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    directory = model_dir_of(architecture, False)
    base = load_tiny(directory)
    files = []
    for index, rank in enumerate(RANKS):
        spec = LoraSpec(rank=rank, seed=index, train_attn=index != 3, train_mlp=index != 5, train_unembed=index != 6)
        files.append(encode_state(make_state(base, spec), base, with_optimizer=False, applied_seq=0))
    sampler = open_sampler(base)
    sampler.submit([_request(index, decode_weights(data, base)) for index, data in enumerate(files)])
    results: dict[str, SampleResult] = {}
    while sampler.has_work:
        for outcome in sampler.step(1e9):
            assert outcome.result is not None, outcome.failure
            results[outcome.request_id] = outcome.result
    for index, data in enumerate(files):
        got = results[f"r{index}"]
        assert got.prompt_logprobs is not None
        for sequence in got.sequences:
            tokens = torch.tensor([*_prompt(index), *sequence.tokens.tolist()])
            with torch.no_grad():
                logits = load_in_peft(directory, tmp_path / f"{index}-{id(sequence)}", data)(input_ids=tokens[None])
            expected = logits.logits[0].float().log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0].numpy()
            ours = np.concatenate([got.prompt_logprobs[1:], sequence.logprobs])
            np.testing.assert_allclose(ours, expected, atol=1e-4)


def _prompt(index: int) -> list[int]:
    return np.random.default_rng(index).integers(3, 60, size=1 + 6 * index).tolist()


def _request(index: int, adapter: AdapterWeights) -> SampleRequest:
    op = SampleOp(
        sampling_session_id=SamplingSessionId("session"),
        seq_id=1,
        prompt=np.array(_prompt(index), dtype=np.int32),
        # More rows than a group of the kernel's holds under two of them.
        num_samples=6 if index in (4, 7) else 1,
        params=SamplingParams(seed=index, max_tokens=NUM_TOKENS, use_eos=False),
        wants_prompt_logprobs=True,
    )
    return SampleRequest(RequestId(f"r{index}"), TenantId("acme"), op, adapter)
