"""What the built-in sampler samples: the same as transformers, the trainer's numbers, the same bits in any company."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from sampler_support import (
    adapter_of,
    ask,
    bits,
    open_sampler,
    prompt_of,
    reference_logprobs,
    reference_model,
    run_all,
    sample,
)

from treadle.domain.outcome import SampledSequence
from treadle.domain.states import Category, StopReason
from treadle.engine import head
from treadle.engine.attention import PackedCausalAttention
from treadle.engine.base_model import BaseModel
from treadle.engine.kernels.base import LoraSegment
from treadle.sampler.base import SampleRequest, SamplerLimits


def same_bits(left: SampledSequence, right: SampledSequence) -> bool:
    return (
        left.tokens.tolist() == right.tokens.tolist()
        and left.logprobs.tobytes() == right.logprobs.tobytes()
        and left.stop_reason == right.stop_reason
    )


@pytest.mark.parametrize("prompt_length", [1, 13, 70])
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_greedy_equals_transformers_generate(
    name: str,
    prompt_length: int,
    request: pytest.FixtureRequest,
) -> None:
    base: BaseModel = request.getfixturevalue(name)
    prompt = prompt_of(prompt_length, vocab_size=300)
    model = reference_model(base)
    inputs = torch.tensor([prompt])
    with torch.no_grad():
        expected = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=40, eos_token_id=None
        )
    got = sample(base, [ask("a", prompt, temperature=0.0, max_tokens=40, use_eos=False)])["a"]
    assert got.sequences[0].tokens.tolist() == expected[0, prompt_length:].tolist()
    assert got.sequences[0].stop_reason == StopReason.LENGTH


@pytest.mark.parametrize("name", ["qwen", "moe"])
def test_sampling_logprobs_equal_a_plain_forward(name: str, request: pytest.FixtureRequest) -> None:
    base: BaseModel = request.getfixturevalue(name)
    prompt = prompt_of(30)
    result = sample(base, [ask("a", prompt, temperature=0.7, top_k=20, max_tokens=50, wants_prompt_logprobs=True)])
    sequence = result["a"].sequences[0]
    tokens = [*prompt, *sequence.tokens.tolist()]
    expected = reference_logprobs(reference_model(base), tokens)
    of_tokens = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(sequence.logprobs, of_tokens[len(prompt) - 1 :], atol=1e-4)
    assert result["a"].prompt_logprobs is not None
    assert np.isnan(result["a"].prompt_logprobs[0])
    np.testing.assert_allclose(result["a"].prompt_logprobs[1:], of_tokens[: len(prompt) - 1], atol=1e-4)


@pytest.mark.parametrize("name", ["qwen", "moe"])
def test_sampling_logprobs_equal_the_trainers_under_an_adapter(name: str, request: pytest.FixtureRequest) -> None:
    base: BaseModel = request.getfixturevalue(name)
    adapter = adapter_of(base, seed=3)
    prompt = prompt_of(21)
    sequence = sample(base, [ask("a", prompt, adapter=adapter, max_tokens=30)])["a"].sequences[0]
    tokens = [*prompt, *sequence.tokens.tolist()]
    num_rows = -(-len(tokens) // 16) * 16
    padded = torch.tensor(tokens + [0] * (num_rows - len(tokens)))
    segments = [LoraSegment(adapter, 0, len(tokens))]
    with torch.no_grad():
        hidden = base.forward_hidden(
            padded,
            torch.arange(num_rows),
            attention=PackedCausalAttention([len(tokens)], num_rows),
            segments=segments,
        )
    trainer = torch.log_softmax(head.logits(base, hidden, segments), dim=-1)
    expected = [trainer[len(prompt) - 1 + i, token].item() for i, token in enumerate(sequence.tokens.tolist())]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)
    bare = sample(base, [ask("a", prompt, max_tokens=30)])["a"].sequences[0]
    assert not np.allclose(bare.logprobs[0], sequence.logprobs[0], atol=1e-3), "the adapter changes the model"


@pytest.mark.parametrize(("name", "num_threads"), [("qwen", 1), ("qwen", 2), ("qwen", 4), ("llama", 1), ("moe", 1)])
def test_a_sample_has_the_same_bits_alone_and_in_a_crowd(
    name: str, num_threads: int, request: pytest.FixtureRequest
) -> None:
    base: BaseModel = request.getfixturevalue(name)
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(num_threads)
    adapters = [None, *(adapter_of(base, seed=seed, rank=rank) for seed, rank in [(1, 4), (2, 8), (3, 1)])]
    crowd = [
        ask(
            f"r{index}",
            prompt_of(1 + 11 * index, seed=index),
            tenant=f"t{index % 3}",
            adapter=adapters[index % 4],
            seed=index,
            num_samples=1 + index % 3,
            max_tokens=10 + 9 * (index % 5),
            temperature=[1.0, 0.0, 0.7][index % 3],
            top_p=[1.0, 0.9][index % 2],
            top_k=[-1, -1, 12][index % 3],
            wants_prompt_logprobs=index % 2 == 0,
        )
        for index in range(14)
    ]
    limits = SamplerLimits(max_running=12, prefill_chunk_tokens=64)
    together = sample(base, crowd, limits=limits)
    for one in crowd:
        alone = sample(base, [one], limits=limits)[one.request_id]
        beside = together[one.request_id]
        assert all(same_bits(a, b) for a, b in zip(alone.sequences, beside.sequences, strict=True)), one.request_id
        if one.op.wants_prompt_logprobs:
            assert alone.prompt_logprobs is not None
            assert beside.prompt_logprobs is not None
            assert alone.prompt_logprobs.tobytes() == beside.prompt_logprobs.tobytes()


def test_samples_of_one_request_differ_and_come_again(qwen: BaseModel) -> None:
    asked = ask("a", prompt_of(9), num_samples=6, max_tokens=12, seed=77)
    first, second = (sample(qwen, [asked])["a"].sequences for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(sequence.tokens.tolist()) for sequence in first}) == 6
    fewer = sample(qwen, [ask("a", prompt_of(9), num_samples=2, max_tokens=12, seed=77)])["a"].sequences
    assert all(same_bits(a, b) for a, b in zip(fewer, first[:2], strict=True))
    other = sample(qwen, [ask("a", prompt_of(9), num_samples=6, max_tokens=12, seed=78)])["a"].sequences
    assert other[0].tokens.tolist() != first[0].tokens.tolist()


@pytest.mark.parametrize("name", ["qwen", "llama", "moe"])
def test_chunks_of_any_length_give_the_same_bits(name: str, request: pytest.FixtureRequest) -> None:
    base: BaseModel = request.getfixturevalue(name)
    asked = ask("a", prompt_of(230), max_tokens=5, wants_prompt_logprobs=True, topk_prompt_logprobs=2)
    whole, *others = (
        sample(base, [asked], limits=SamplerLimits(prefill_chunk_tokens=length))["a"] for length in (512, 64, 128)
    )
    assert [bits(other) == bits(whole) for other in others] == [True, True]


def test_prompts_longer_than_the_scored_rows_are_scored_whole(qwen: BaseModel) -> None:
    prompt = prompt_of(700)
    result = sample(qwen, [ask("a", prompt, max_tokens=1, wants_prompt_logprobs=True)])["a"]
    expected = reference_logprobs(reference_model(qwen), prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])
    assert result.prompt_logprobs is not None
    np.testing.assert_allclose(result.prompt_logprobs[1:], expected[:, 0].numpy(), atol=2e-4)


def test_topk_prompt_logprobs_are_the_best_of_each_position(qwen: BaseModel) -> None:
    prompt = prompt_of(12)
    result = sample(qwen, [ask("a", prompt, max_tokens=1, topk_prompt_logprobs=3)])["a"]
    assert result.prompt_logprobs is None
    assert result.topk_prompt_logprobs is not None
    top = result.topk_prompt_logprobs
    assert top.logprobs.shape == (12, 3)
    assert np.isnan(top.logprobs[0]).all(), "nothing predicts the first token"
    expected = reference_logprobs(reference_model(qwen), prompt).topk(3, dim=-1)
    assert top.token_ids[1:].tolist() == expected.indices[:-1].tolist()
    np.testing.assert_allclose(top.logprobs[1:], expected.values[:-1].numpy(), atol=1e-4)


def test_a_prompt_of_one_token_has_one_unknown_logprob(qwen: BaseModel) -> None:
    result = sample(qwen, [ask("a", [5], max_tokens=1, wants_prompt_logprobs=True, topk_prompt_logprobs=2)])["a"]
    assert result.prompt_logprobs is not None
    assert np.isnan(result.prompt_logprobs).tolist() == [True]
    assert result.topk_prompt_logprobs is not None
    assert np.isnan(result.topk_prompt_logprobs.logprobs).tolist() == [[True, True]]
    assert len(result.sequences[0].tokens) == 1


def test_eos_ends_a_sample_once_unless_stops_are_off(qwen: BaseModel) -> None:
    prompt = prompt_of(8)
    long = sample(qwen, [ask("a", prompt, max_tokens=400, seed=4, use_eos=False)])["a"].sequences[0]
    assert long.stop_reason == StopReason.LENGTH
    assert len(long.tokens) == 400
    assert 7 in long.tokens, "the random model draws EOS within 400 tokens; choose another seed if it does not"
    short = sample(qwen, [ask("a", prompt, max_tokens=400, seed=4)])["a"].sequences[0]
    assert short.stop_reason == StopReason.STOP
    assert short.tokens.tolist() == long.tokens.tolist()[: len(short.tokens)]
    assert short.tokens.tolist().count(7) == 1
    assert short.tokens[-1] == 7


def test_a_stop_string_ends_a_sample_at_the_completing_token(tiny: BaseModel) -> None:
    plain = sample(tiny, [ask("a", [1, 300, 400], max_tokens=30, use_eos=False)])["a"].sequences[0]
    token_bytes = open_sampler(tiny)._token_bytes
    assert token_bytes is not None
    text = b"".join(token_bytes.token_bytes(token) for token in plain.tokens.tolist()).decode(errors="ignore")
    stop = text[9:13]
    cut = sample(tiny, [ask("a", [1, 300, 400], max_tokens=30, use_eos=False, stop_strings=(stop,))])["a"]
    tokens = cut.sequences[0].tokens.tolist()
    assert tokens == plain.tokens.tolist()[: len(tokens)]
    assert cut.sequences[0].stop_reason == StopReason.STOP
    got = b"".join(token_bytes.token_bytes(token) for token in tokens)
    before = b"".join(token_bytes.token_bytes(token) for token in tokens[:-1])
    assert stop.encode() in got
    assert stop.encode() not in before


def test_a_full_context_ends_with_length(llama: BaseModel) -> None:
    results = sample(
        llama,
        [
            ask("open", prompt_of(250), use_eos=False),
            ask("long", prompt_of(250), use_eos=False, max_tokens=100),
            ask("full", prompt_of(256), use_eos=False, wants_prompt_logprobs=True),
        ],
    )
    assert [len(results[name].sequences[0].tokens) for name in ("open", "long", "full")] == [6, 6, 1]
    assert all(result.sequences[0].stop_reason == StopReason.LENGTH for result in results.values())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (ask("bad", []), "prompt has 0 tokens"),
        (ask("bad", prompt_of(257)), "257 tokens.*1 to 256"),
        (ask("bad", [1, 300]), "token 300 .*vocabulary of 300"),
        (ask("bad", [-4, 30]), "token -4"),
        (ask("bad", [5], max_tokens=0), "max_tokens is 0"),
        (ask("bad", [5], temperature=float("nan")), "temperature is nan"),
        (ask("bad", [5], temperature=-1.0), "temperature is -1"),
        (ask("bad", [5], top_k=0), "top_k is 0"),
        (ask("bad", [5], top_p=0.0), "top_p is 0"),
        (ask("bad", [5], num_samples=0), "num_samples is 0"),
        (ask("bad", [5], topk_prompt_logprobs=1_000), "topk_prompt_logprobs is 1000"),
        (ask("bad", [5], stop_strings=("x",)), "no tokenizer"),
    ],
)
def test_what_cannot_be_sampled_fails_alone_and_says_why(llama: BaseModel, bad: SampleRequest, words: str) -> None:
    sampler = open_sampler(llama)
    good = ask("good", prompt_of(5), max_tokens=3)
    sampler.submit([bad, good])
    assert sampler.has_work
    outcomes = run_all(sampler)
    failure = outcomes["bad"].failure
    assert failure is not None
    assert failure.category == Category.USER
    assert re.search(words, failure.message)
    assert outcomes["good"].result is not None


@pytest.mark.parametrize("wants_prompt_logprobs", [True, False])
def test_weights_that_are_not_finite_fail_alone(qwen: BaseModel, wants_prompt_logprobs: bool) -> None:
    broken = adapter_of(qwen, seed=9)
    broken.flat.fill_(float("nan"))
    good = [ask(f"good{i}", prompt_of(6, seed=i), max_tokens=20, seed=i) for i in range(3)]
    bad = ask("bad", prompt_of(6), adapter=broken, num_samples=3, wants_prompt_logprobs=wants_prompt_logprobs)
    sampler = open_sampler(qwen)
    sampler.submit([good[0], bad, *good[1:]])
    outcomes = run_all(sampler)
    assert outcomes["bad"].failure is not None
    assert "not finite" in outcomes["bad"].failure.message
    assert outcomes["bad"].failure.category == Category.USER
    for one in good:
        beside = outcomes[one.request_id].result
        assert beside is not None
        assert same_bits(sample(qwen, [one])[one.request_id].sequences[0], beside.sequences[0])
    assert sampler.num_running == 0


def test_weights_that_break_while_decoding_leave_no_trace_in_the_cache(qwen: BaseModel) -> None:
    """The cache rows of a sequence that turned NaN are used again by others."""
    adapter = adapter_of(qwen, seed=9)
    sampler = open_sampler(qwen)
    sampler.submit([ask("bad", prompt_of(6), adapter=adapter, num_samples=3, max_tokens=50, use_eos=False)])
    for _ in range(3):
        assert sampler.step(0.0) == []
    adapter.flat.fill_(float("nan"))
    assert run_all(sampler)["bad"].failure is not None
    good = ask("good", prompt_of(6), num_samples=4, max_tokens=20)
    sampler.submit([good])
    after = run_all(sampler)["good"].result
    assert after is not None
    fresh = sample(qwen, [good])["good"]
    assert all(same_bits(a, b) for a, b in zip(after.sequences, fresh.sequences, strict=True))


def test_outcomes_count_their_tokens(qwen: BaseModel) -> None:
    sampler = open_sampler(qwen)
    sampler.submit([ask("a", prompt_of(9), num_samples=3, max_tokens=4, use_eos=False)])
    outcome = run_all(sampler)["a"]
    assert (outcome.num_prompt_tokens, outcome.num_sampled_tokens) == (9, 12)
    assert outcome.result is not None
    assert outcome.result.prompt_cache_hit_tokens == 0
