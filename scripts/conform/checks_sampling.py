"""SamplingClient: samples, logprobs in all their forms, handles and pickles."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from tinker import types

from conform.registry import Call, method
from conform.world import MODEL, TOKENS, World, logprobs, params, prompt


@method("SamplingClient.sample")
def sample(world: World, call: Call) -> str:
    answer = call(
        world.sampler,
        "sample",
        prompt=prompt(),
        num_samples=2,
        sampling_params=params(),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=3,
        target_prompt_logprobs=types.TensorData.from_torch(torch.tensor([[token] for token in TOKENS[1:]])),
        prompt_alt_tokens_k=2,
    )
    first, second = answer.sequences
    assert first.sequence_id != second.sequence_id
    assert len(first.tokens) == len(first.logprobs)
    _check_forms(answer)
    again = world.sampler.sample(prompt=prompt(), num_samples=2, sampling_params=params()).result()
    assert [list(one.tokens) for one in again.sequences] == [list(one.tokens) for one in answer.sequences]
    return "sequence ids, logprobs, top-k and target logprobs and alternatives agree; a seed repeats its tokens"


def _check_forms(answer: types.SampleResponse) -> None:
    """The same logprobs in every form that the answer has them."""
    scored = np.array(answer.prompt_logprobs[1:], dtype=np.float32)
    targets = answer.target_prompt_logprobs.to_torch().numpy()[:, 0]
    np.testing.assert_allclose(targets, scored, atol=1e-6)
    assert answer.prompt_alt_tokens.tokens.to_torch().shape == (len(TOKENS) - 1, 2)
    for row, token, value in zip(answer.topk_prompt_logprobs[1:], TOKENS[1:], scored, strict=True):
        best = dict(row)
        assert token not in best or abs(best[token] - value) < 1e-6
        assert min(best.values()) >= value - 1e-6 or token in best
    sequence = answer.sequences[0]
    for row, token, value in zip(sequence.topk_logprobs, sequence.tokens, sequence.logprobs, strict=True):
        assert len(row) == 3
        assert abs(dict(row).get(token, value) - value) < 1e-5


@method("SamplingClient.compute_logprobs")
def compute_logprobs(world: World, call: Call) -> str:
    values = call(world.sampler, "compute_logprobs", prompt())
    tail = call(world.sampler, "compute_logprobs", prompt(), prompt_logprobs_last_n=3)
    assert values[0] is None
    assert tail[:-3] == [None] * (len(TOKENS) - 3)
    np.testing.assert_allclose(tail[-3:], values[-3:], atol=1e-6)
    fresh = world.new_run()
    np.testing.assert_allclose(values[1:], logprobs(fresh), atol=2e-5)
    return "equal to a fresh run's forward; the last three alone are the same"


@method("SamplingClient.create")
def create(world: World, call: Call) -> str:
    from tinker import SamplingClient

    sampler = SamplingClient.create(world.service.holder, base_model=MODEL).result(timeout=60)
    assert sampler.get_base_model() == MODEL
    return "a client of the base model"


@method("SamplingClient.get_base_model")
def get_base_model(world: World, call: Call) -> str:
    sampler = world.service.create_sampling_client(model_path=world.sampler_path).result()
    assert call(sampler, "get_base_model") == MODEL
    return f"{MODEL}, for a sampler that was made from a path"


@method("SamplingClient.get_sampler_handle", "SamplingClient.from_sampler_handle")
def handle(world: World, call: Call) -> str:
    from tinker import SamplingClient

    text = world.sampler.get_sampler_handle()
    other = SamplingClient.from_sampler_handle(text, api_key=world.key)
    assert _tokens(other) == _tokens(world.sampler)
    copied = pickle.loads(pickle.dumps(world.sampler))
    assert _tokens(copied) == _tokens(world.sampler)
    return "a client made from the handle, and one that was pickled, sample the same"


@method("SamplingClient.get_tokenizer")
def tokenizer(world: World, call: Call) -> str:
    directory = world.run.get_info().model_data.tokenizer_id
    sampler = world.service.create_sampling_client(base_model=directory).result()
    assert sampler.get_tokenizer().decode([TOKENS[0]])
    return "loaded from the base model's name; on one machine its directory is a name, too"


@method("SamplingClient.on_queue_state_change")
def queue_state(world: World, call: Call) -> str:
    assert world.sampler.on_queue_state_change is not None
    return "a callback of the client; its states come with held polls (tests/gateway/test_gateway_backlog.py)"


def _tokens(sampler: object) -> list[int]:
    answer = sampler.sample(prompt=prompt(), num_samples=1, sampling_params=params()).result()  # type: ignore[attr-defined]
    return list(answer.sequences[0].tokens)
