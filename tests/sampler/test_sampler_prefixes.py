"""Prompts that begin like earlier ones: what is served from there, what never is, and that it changes not one bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sampler_support import adapter_of, ask, bits, open_sampler, prompt_of, run_all, sample

from treadle.domain.ids import BlobKey
from treadle.domain.ops import TargetTokens
from treadle.domain.outcome import SampleResult
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.sampler.base import SampleRequest, SamplerLimits
from treadle.sampler.builtin import BuiltinSampler
from treadle.sampler.prefixes import BLOCK_TOKENS, Prefixes, block_keys

CHUNK = SamplerLimits().prefill_chunk_tokens


def result_of(sampler: BuiltinSampler, request: SampleRequest) -> SampleResult:
    """The request's result, when it is alone in the sampler."""
    sampler.submit([request])
    result = run_all(sampler)[request.request_id].result
    assert result is not None
    return result


def hits(sampler: BuiltinSampler, request: SampleRequest) -> int:
    """How many of its prompt's tokens were served, with the same bits as without any cache."""
    result = result_of(sampler, request)
    alone = sample(sampler._base, [request])[request.request_id]
    assert alone.prompt_cache_hit_tokens == 0
    assert bits(result) == bits(alone)
    return result.prompt_cache_hit_tokens


@pytest.mark.parametrize(("name", "num_threads"), [("qwen", 1), ("qwen", 2), ("llama", 1), ("moe", 1)])
def test_a_hit_changes_no_bit(name: str, num_threads: int, request: pytest.FixtureRequest) -> None:
    base: BaseModel = request.getfixturevalue(name)
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(num_threads)
    sampler = open_sampler(base)
    shared = prompt_of(200, seed=1)
    assert hits(sampler, ask("first", shared, max_tokens=4)) == 0
    for index, (num_shared, num_more) in enumerate([(200, 0), (200, 1), (200, 40), (128, 30), (129, 3), (70, 1)]):
        prompt = [*shared[:num_shared], *prompt_of(num_more, seed=index + 5)]
        expected = min(num_shared, len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        options = {"max_tokens": 5, "num_samples": 1 + index % 2, "seed": index}
        assert hits(sampler, ask(f"r{index}", prompt, **options, fields={"topk_sample_logprobs": 2})) == expected


def test_a_hit_changes_no_bit_of_a_prompt_of_many_chunks(qwen: BaseModel) -> None:
    """The chunks of a served prompt end at other places than those of one that is read whole."""
    sampler = open_sampler(qwen)
    shared = prompt_of(3 * CHUNK - 100, seed=1)
    assert hits(sampler, ask("first", shared[: CHUNK + 200], max_tokens=2)) == 0
    assert hits(sampler, ask("next", shared, max_tokens=6)) == (CHUNK + 200) // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_hit_changes_no_bit_in_bfloat16(tiny: BaseModel) -> None:
    base = load_base_model(str(tiny.facts.source_dir), name="treadle/tiny", device="cpu", dtype="bfloat16")
    sampler = open_sampler(base)
    prompt = prompt_of(150)
    assert hits(sampler, ask("first", prompt, max_tokens=2)) == 0
    assert hits(sampler, ask("again", prompt, max_tokens=20, use_eos=False)) == 128


def test_a_conversation_is_read_from_where_it_stood(qwen: BaseModel) -> None:
    sampler = open_sampler(qwen)
    prompt, served = prompt_of(100), []
    for turn in range(4):
        result = result_of(sampler, ask(f"turn{turn}", prompt, max_tokens=30, use_eos=False))
        assert bits(result) == bits(sample(qwen, [ask("a", prompt, max_tokens=30, use_eos=False)])["a"])
        served.append(result.prompt_cache_hit_tokens)
        prompt = [*prompt, *result.sequences[0].tokens.tolist(), *prompt_of(25, seed=turn)]
    # What was sampled is read anew, by blocks, when it comes back as a prompt.
    assert served == [0, 64, 128, 192]


def test_requests_of_one_prompt_share_its_reading(qwen: BaseModel) -> None:
    prompt = prompt_of(230)
    group = [ask(f"r{index}", prompt, max_tokens=4, seed=index) for index in range(6)]
    results = sample(qwen, group)
    assert sorted(result.prompt_cache_hit_tokens for result in results.values()) == [0, 192, 192, 192, 192, 192]
    for request in group:
        assert bits(results[request.request_id]) == bits(sample(qwen, [request])[request.request_id])


def test_other_weights_other_tenants_and_other_tokens_share_nothing(qwen: BaseModel) -> None:
    adapters = {key: adapter_of(qwen, seed=seed) for key, seed in [("a", 1), ("b", 2)]}
    prompt = prompt_of(130)

    def of(request_id: str, key: str | None, tenant: str = "acme", **options: Any) -> SampleRequest:
        fields = {"blob_key": None if key is None else BlobKey(key)}
        adapter = None if key is None else adapters[key]
        return ask(request_id, prompt, tenant=tenant, adapter=adapter, fields=fields, max_tokens=3, **options)

    sampler = open_sampler(qwen)
    assert hits(sampler, of("base", None)) == 0
    assert hits(sampler, of("base2", None)) == 128
    assert hits(sampler, of("a", "a")) == 0
    assert hits(sampler, of("b", "b")) == 0
    assert hits(sampler, of("a2", "a")) == 128
    assert hits(sampler, of("other", None, tenant="other")) == 0
    assert hits(sampler, ask("first token", [9, *prompt[1:]], max_tokens=3)) == 0
    assert hits(sampler, ask("later token", [*prompt[:70], 9, *prompt[71:]], max_tokens=3)) == 64


def test_an_adapter_without_a_name_shares_nothing(qwen: BaseModel) -> None:
    sampler = open_sampler(qwen)
    for index, seed in enumerate([1, 1, 2]):
        request = ask(f"r{index}", prompt_of(130), adapter=adapter_of(qwen, seed=seed), max_tokens=3)
        assert hits(sampler, request) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"wants_prompt_logprobs": True}, 0),
        ({"topk_prompt_logprobs": 2}, 0),
        ({"fields": {"prompt_alt_tokens_k": 2}}, 0),
        ({"wants_prompt_logprobs": True, "fields": {"prompt_logprobs_last_n": 5}}, 256),
        # Row 255 predicts position 256; it must be read, and so must its block.
        ({"wants_prompt_logprobs": True, "topk_prompt_logprobs": 1, "fields": {"prompt_logprobs_last_n": 44}}, 192),
        ({"wants_prompt_logprobs": True, "fields": {"prompt_logprobs_last_n": 43}}, 256),
        ({"fields": {"target_prompt_logprobs": TargetTokens(np.array([3] * 299, np.int32), 1)}}, 0),
        ({"fields": {"target_prompt_logprobs": TargetTokens(np.array([-1] * 298 + [3], np.int32), 1)}}, 256),
    ],
)
def test_rows_that_are_to_be_scored_are_read(qwen: BaseModel, options: dict[str, Any], expected: int) -> None:
    prompt = prompt_of(300)
    sampler = open_sampler(qwen)
    assert hits(sampler, ask("first", prompt, max_tokens=2)) == 0
    assert hits(sampler, ask("scored", prompt, max_tokens=2, **options)) == expected


def test_a_scored_prompt_serves_later_ones(qwen: BaseModel) -> None:
    sampler = open_sampler(qwen)
    assert hits(sampler, ask("scored", prompt_of(130), max_tokens=2, wants_prompt_logprobs=True)) == 0
    assert hits(sampler, ask("plain", prompt_of(130), max_tokens=2)) == 128


def test_prefixes_stay_within_their_share_and_behind_running_sequences(qwen: BaseModel) -> None:
    limits = SamplerLimits(max_cached_tokens=1_200, prefix_share=0.5)
    sampler = open_sampler(qwen, limits=limits)
    asked = [ask(f"r{index}", prompt_of(150, seed=index % 7), max_tokens=60, use_eos=False) for index in range(14)]
    sampler.submit(asked)
    kept = []
    while sampler.has_work:
        sampler.step(0.0)
        kept.append(sampler._prefixes.num_tokens)
        assert sampler._prefixes.num_tokens <= 600
        assert sampler._prefixes.num_tokens + sampler._num_places() <= 1_200
    assert max(kept) > 256
    assert min(kept[5:]) < max(kept), "running sequences took some of it back"


def test_the_least_recently_used_goes_first_and_never_from_the_front(qwen: BaseModel) -> None:
    limits = SamplerLimits(max_cached_tokens=4 * 5 * BLOCK_TOKENS, prefix_share=0.25)  # Five blocks.
    sampler = open_sampler(qwen, limits=limits)
    old, new = prompt_of(200, seed=1), prompt_of(200, seed=2)
    for name, prompt in [("old", old), ("new", new)]:
        assert result_of(sampler, ask(name, prompt, max_tokens=1)).prompt_cache_hit_tokens == 0
    # The new one's three blocks are there, and of the old one's the first two.
    assert sampler._prefixes.num_tokens == 5 * BLOCK_TOKENS
    assert result_of(sampler, ask("new2", new, max_tokens=1)).prompt_cache_hit_tokens == 192
    assert result_of(sampler, ask("old2", old, max_tokens=1)).prompt_cache_hit_tokens == 128


def test_without_a_share_nothing_is_kept(qwen: BaseModel) -> None:
    sampler = open_sampler(qwen, limits=SamplerLimits(prefix_share=0.0))
    for name in ("a", "b"):
        assert hits(sampler, ask(name, prompt_of(200), max_tokens=2)) == 0
    assert sampler._prefixes.num_tokens == 0


def test_what_a_job_read_itself_before_it_started_over_is_no_hit(qwen: BaseModel) -> None:
    limits = SamplerLimits(max_cached_tokens=1_000, prefix_share=1.0)
    sampler = open_sampler(qwen, limits=limits)
    asked = [ask(f"r{i}", prompt_of(100, seed=i), seed=i, max_tokens=300, use_eos=False) for i in range(3)]
    sampler.submit(asked)
    num_restarts = 0
    outcomes = {}
    while sampler.has_work:
        num_admitted = len(sampler._admitted)
        finished = sampler.step(0.0)
        num_restarts += len(sampler._admitted) < num_admitted and not finished
        outcomes.update({outcome.request_id: outcome for outcome in finished})
    assert num_restarts > 0
    for request in asked:
        result = outcomes[request.request_id].result
        assert result is not None
        assert result.prompt_cache_hit_tokens == 0
        assert bits(result) == bits(sample(qwen, [request])[request.request_id])


def test_a_cancelled_reader_leaves_the_others_to_read(qwen: BaseModel) -> None:
    sampler = open_sampler(qwen, limits=SamplerLimits(prefill_chunk_tokens=64))
    group = [ask(f"r{index}", prompt_of(300), max_tokens=3, seed=index) for index in range(3)]
    sampler.submit(group)
    sampler.step(0.0)
    sampler.cancel([group[0].request_id])
    outcomes = run_all(sampler)
    assert sorted(outcomes) == ["r1", "r2"]
    for request in group[1:]:
        result = outcomes[request.request_id].result
        assert result is not None
        assert bits(result) == bits(sample(qwen, [request])[request.request_id])
        assert result.prompt_cache_hit_tokens >= 64


def test_names_of_blocks_cover_everything_before_them() -> None:
    def names(tokens: Sequence[int], tenant: str = "t", weights: str | None = "w") -> tuple[bytes, ...]:
        return block_keys(tenant, weights, np.array(tokens, dtype=np.int32))

    prompt = prompt_of(200)
    assert len(names(prompt)) == 3
    assert names(prompt[:63]) == ()
    assert names(prompt[:128]) == names(prompt)[:2]
    others = [
        names(prompt, tenant="u"),
        names(prompt, weights="v"),
        names(prompt, weights=None),
        names([prompt[0] + 1, *prompt[1:]]),
    ]
    for other in others:
        assert not set(other) & set(names(prompt))
    assert names([*prompt[:150], 7, *prompt[151:]])[:2] == names(prompt)[:2]
    # What belongs to the tenant's name must not be read as part of the weights'.
    assert names(prompt, tenant="a', 'b", weights="c") != names(prompt, tenant="a", weights="b', 'c")


def test_a_block_that_is_there_stays_as_it_is() -> None:
    prefixes = Prefixes()
    first, second = torch.zeros(1, 2, 1, BLOCK_TOKENS, 4), torch.ones(1, 2, 1, BLOCK_TOKENS, 4)
    prefixes.put(b"a", first)
    prefixes.put(b"a", second)
    assert prefixes.find([b"a", b"b", b"a"]) == [first]
    assert prefixes.num_tokens == BLOCK_TOKENS
    prefixes.shrink(BLOCK_TOKENS - 1)
    assert prefixes.find([b"a"]) == []
