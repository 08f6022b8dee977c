"""What stands between requests and vLLM, without vLLM: what it is asked, whose turn it is, who has a place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from treadle.domain.ids import BlobKey, RequestId, TenantId
from treadle.domain.ops import SampleOp, SamplingParams, TargetTokens
from treadle.domain.states import StopReason
from treadle.errors import NonFiniteResult
from treadle.sampler.stops import StopRule
from treadle.sampler.vllm_queue import Places, PlaceState, TurnQueue
from treadle.sampler.vllm_requests import VllmJob, engine_settings, sequence_seed, why_not
from treadle.testing.sampler_contract import ask

RULE = StopRule(frozenset({7}), (), max_tokens=8)
# Each field of a request, and a value with which it is for the built-in sampler, if there is one.
HANDED_OVER: dict[str, Any] = {
    "wants_prompt_logprobs": True,
    "topk_prompt_logprobs": 1,
    "target_prompt_logprobs": TargetTokens(np.zeros(2, dtype=np.int32), 1),
    "prompt_alt_tokens_k": 1,
    "temperature": 2.5,
    "prompt": np.arange(95, dtype=np.int32),
}
HONOURED = {
    "sampling_session_id",
    "seq_id",
    "num_samples",
    "params",
    "blob_key",
    "topk_sample_logprobs",
    # About the prompt's log-probabilities alone, which are handed over with or without it.
    "prompt_logprobs_last_n",
    "record_stability_info",
    "streams",
    "seed",
    "max_tokens",
    "top_k",
    "top_p",
    "stop_strings",
    "stop_token_ids",
    "use_eos",
}


def test_every_field_of_a_request_is_decided() -> None:
    assert {field.name for kind in (SampleOp, SamplingParams) for field in fields(kind)} == HONOURED | set(HANDED_OVER)
    assert why_not(ask(), RULE, context_length=100) is None


@pytest.mark.parametrize("name", HANDED_OVER)
def test_what_vllm_lacks_is_handed_over(name: str) -> None:
    assert why_not(ask(**{name: HANDED_OVER[name]}), RULE, context_length=100) is not None


@pytest.mark.parametrize(("temperature", "is_taken"), [(0.0, True), (1e-3, False), (0.01, True), (2.0, True)])
def test_temperatures_that_vllm_would_change_are_handed_over(temperature: float, is_taken: bool) -> None:
    assert (why_not(ask(temperature=temperature), RULE, context_length=100) is None) == is_taken


def test_seeds_of_sequences_have_nothing_in_common() -> None:
    seeds = [sequence_seed(seed, index) for seed in (0, 1, 2, -1, 2**64) for index in range(5)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sequence_seed(1, 2) == sequence_seed(1, 2)


def test_the_engine_is_asked_for_what_the_request_wants() -> None:
    op = ask(temperature=0.7, top_k=10**9, top_p=0.5, topk_sample_logprobs=3, stop_strings=("a",))
    settings = engine_settings(op, RULE, 0, vocab_size=50)
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (0.7, 50, 0.5)
    assert (settings["max_tokens"], settings["stop_token_ids"], settings["logprobs"]) == (8, [7], 3)
    assert settings["ignore_eos"] is True
    assert "stop" not in settings
    assert engine_settings(ask(), RULE, 0, vocab_size=50)["top_k"] == 0


def job(name: str, *, tenant: str = "a", key: str | None = None, num_samples: int = 1) -> VllmJob:
    op = ask(key=None if key is None else BlobKey(key), num_samples=num_samples, topk_sample_logprobs=1)
    return VllmJob(RequestId(name), TenantId(tenant), op, RULE)


def test_a_sequence_ends_where_the_rule_says() -> None:
    one = job("a", num_samples=2)
    first, second = one.sequences
    assert not first.push(5, [5, 9], [-1.0, -0.5])
    assert first.push(7, [7, 9], [-1.5, -0.25])
    assert not one.is_finished
    for _ in range(8):
        second.push(6, [6, 6], [-1.0, -1.0])
    outcome = one.outcome()
    assert outcome.result is not None
    assert [s.stop_reason for s in outcome.result.sequences] == [StopReason.STOP, StopReason.LENGTH]
    top = outcome.result.sequences[0].topk_logprobs
    assert top is not None
    assert top.token_ids.tolist() == [[9], [9]]
    assert outcome.num_sampled_tokens == 10


def test_a_number_that_is_none_is_no_token() -> None:
    with pytest.raises(NonFiniteResult):
        job("a").sequences[0].push(5, [5, 5], [float("nan"), -1.0])


def test_tenants_take_turns() -> None:
    queue = TurnQueue()
    jobs = {name: job(name, tenant=name[0]) for name in ("a1", "a2", "b1", "c1")}
    for one in jobs.values():
        queue.add(one)
    order = []
    while queue.keys():
        one = next(queue.in_turn(lambda tenant: tenant != "c" or len(order) > 1))
        order.append(one.request_id)
        queue.discard(one)
        queue.discard(one)
        queue.served(one.tenant_id)
    assert order == ["a1", "b1", "c1", "a2"]


def test_a_version_that_is_used_or_wanted_keeps_its_place() -> None:
    places = Places(2, first_id=5)
    taken = [places.take(BlobKey(key)) for key in ("v1", "v2")]
    (first, none), (second, _) = [one for one in taken if one is not None]
    assert none is None
    assert (first.adapter_id, second.adapter_id) == (5, 6)
    assert places.take(BlobKey("v3")) is None, "both are being loaded"
    first.state = second.state = PlaceState.READY
    first.num_running = 1
    assert places.take(BlobKey("v3"), kept={BlobKey("v2")}) is None
    found = places.take(BlobKey("v3"))
    assert found is not None
    third, dropped = found
    assert dropped is second
    assert third.adapter_id == 7
    assert places.find(BlobKey("v2")) is None
    places.give_up(third)
    again = places.take(BlobKey("v2"))
    assert again is not None
    assert again[0].adapter_id == 8, "no number comes twice"


def test_the_least_recently_used_version_goes_first() -> None:
    places = Places(2, first_id=2)
    for key in ("v1", "v2"):
        taken = places.take(BlobKey(key))
        assert taken is not None
        taken[0].state = PlaceState.READY
    places.find(BlobKey("v1"))
    found = places.take(BlobKey("v3"))
    assert found is not None
    assert found[1] is not None
    assert found[1].key == "v2"
