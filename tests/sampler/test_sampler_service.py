"""Who is served when: overtaking, shares, cancelling, memory, and one forward per pass."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sampler_support import FOREVER_S, adapter_of, ask, prompt_of, run_all, sample
from torch import Tensor

from treadle.domain.ids import RequestId
from treadle.engine.base_model import BaseModel
from treadle.sampler import builtin
from treadle.sampler.base import Sampler, SamplerLimits
from treadle.sampler.builtin import BuiltinSampler, open_sampler
from treadle.sampler.cache import CacheShape
from treadle.sampler.passes import Chunk, PassYield, RowPlans


class TickingClock:
    """Each reading is one second after the last."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def sampler_of(base: BaseModel, **limits: float) -> BuiltinSampler:
    return open_sampler(base, limits=SamplerLimits(**limits))  # type: ignore[arg-type]


def assert_empty(sampler: BuiltinSampler) -> None:
    assert not sampler.has_work
    assert (sampler.num_waiting, sampler.num_running) == (0, 0)
    assert sampler._num_places() == 0
    assert not sampler._num_held
    assert not sampler._admitted
    assert not sampler._prefilling
    assert len(sampler._queue) == 0


def test_a_short_sample_overtakes_a_long_one(qwen: BaseModel) -> None:
    sampler: Sampler = sampler_of(qwen)
    sampler.submit([ask("long", prompt_of(10), max_tokens=512, use_eos=False)])
    for _ in range(5):
        assert sampler.step(0.0) == []
    sampler.submit([ask("short", prompt_of(10), max_tokens=4, use_eos=False)])
    first: list[str] = []
    num_steps = 0
    while not first:
        first = [outcome.request_id for outcome in sampler.step(0.0)]
        num_steps += 1
    assert first == ["short"]
    assert num_steps == 4
    assert sampler.num_running == 1


def test_a_newcomer_finds_slots_though_another_tenant_could_use_them_all(qwen: BaseModel) -> None:
    sampler = sampler_of(qwen, max_running=8)
    sampler.submit(
        [ask(f"greedy{i}", prompt_of(4, seed=i), tenant="greedy", max_tokens=60, use_eos=False) for i in range(12)]
    )
    for _ in range(10):
        sampler.step(0.0)
    assert sampler.num_running == 6
    sampler.submit([ask("new", prompt_of(4), tenant="new", max_tokens=3, use_eos=False)])
    finished = [outcome.request_id for _ in range(3) for outcome in sampler.step(0.0)]
    assert finished == ["new"]
    run_all(sampler)
    assert_empty(sampler)


def test_many_samples_of_one_request_do_not_shut_others_out(qwen: BaseModel) -> None:
    sampler = sampler_of(qwen, max_running=8)
    sampler.submit([ask("many", prompt_of(4), tenant="a", num_samples=40, max_tokens=20, use_eos=False)])
    sampler.submit([ask("few", prompt_of(4), tenant="b", max_tokens=20, use_eos=False)])
    outcomes = run_all(sampler)
    assert list(outcomes) == ["few", "many"]
    assert outcomes["many"].result is not None
    assert len(outcomes["many"].result.sequences) == 40
    assert_empty(sampler)


def test_tenants_take_turns(qwen: BaseModel) -> None:
    sampler = sampler_of(qwen, max_running=1)
    asked = [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1), ("b", 2)]
    sampler.submit(
        [ask(f"{tenant}{n}", prompt_of(3), tenant=tenant, max_tokens=2, use_eos=False) for tenant, n in asked]
    )
    assert list(run_all(sampler)) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_long_prompt_does_not_hold_up_running_sequences_or_short_prompts(qwen: BaseModel) -> None:
    sampler = sampler_of(qwen, prefill_chunk_tokens=64)
    sampler.submit([ask("running", prompt_of(4), max_tokens=10, use_eos=False)])
    sampler.step(0.0)
    sampler.submit([ask("long", prompt_of(1_500), tenant="b", max_tokens=2, use_eos=False)])
    sampler.submit([ask("short", prompt_of(20), tenant="c", max_tokens=2, use_eos=False)])
    assert list(run_all(sampler)) == ["short", "running", "long"]


def test_all_adapters_and_prompts_share_one_forward(qwen: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    num_forwards = 0

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    handle = qwen.transformer.register_forward_pre_hook(count)
    try:
        sampler = sampler_of(qwen)
        adapters = [None, adapter_of(qwen, seed=1), adapter_of(qwen, seed=2, rank=8)]
        sampler.submit(
            [
                ask(f"r{i}", prompt_of(5 + i), adapter=adapters[i % 3], max_tokens=6, num_samples=2, use_eos=False)
                for i in range(9)
            ]
        )
        run_all(sampler)
    finally:
        handle.remove()
    # One pass reads all the prompts and draws the first tokens, five draw the rest.
    assert num_forwards == 6


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_a_cancelled_request_has_no_outcome_and_holds_nothing(qwen: BaseModel, num_steps: int) -> None:
    sampler = sampler_of(qwen, max_running=4, prefill_chunk_tokens=64)
    sampler.submit([ask("gone", prompt_of(50), num_samples=9, max_tokens=30, use_eos=False)])
    for _ in range(num_steps):
        assert sampler.step(0.0) == []
    kept = ask("kept", prompt_of(5), max_tokens=8)
    sampler.submit([kept])
    sampler.cancel([RequestId("gone"), RequestId("unknown"), RequestId("gone")])
    outcomes = run_all(sampler)
    assert list(outcomes) == ["kept"]
    alone = sample(qwen, [kept])["kept"].sequences[0]
    assert outcomes["kept"].result is not None
    assert outcomes["kept"].result.sequences[0].logprobs.tobytes() == alone.logprobs.tobytes()
    assert_empty(sampler)


def test_a_request_id_that_is_already_known_is_ignored(qwen: BaseModel) -> None:
    sampler = sampler_of(qwen)
    one = ask("a", prompt_of(5), max_tokens=3)
    sampler.submit([one, one])
    sampler.step(0.0)
    sampler.submit([one])
    assert list(run_all(sampler)) == ["a"]


def test_short_memory_delays_requests_and_changes_nothing(qwen: BaseModel) -> None:
    """Sequences outgrow what fits; the newest jobs start over, and everything ends with the bits it would have had."""
    asked = [
        ask(f"r{i}", prompt_of(40, seed=i), tenant=f"t{i % 2}", seed=i, num_samples=2, max_tokens=150, use_eos=False)
        for i in range(4)
    ]
    sampler = sampler_of(qwen, max_cached_tokens=700)
    sampler.submit(asked)
    outcomes = {}
    num_most = 0
    num_restarts = 0
    num_admitted = 0
    while sampler.has_work:
        outcomes.update({outcome.request_id: outcome for outcome in sampler.step(0.0)})
        num_most = max(num_most, sampler._num_places())
        num_restarts += len(sampler._admitted) < num_admitted and not sampler._finished
        num_admitted = len(sampler._admitted)
    assert num_most <= 700
    assert num_restarts > 0
    for one in asked:
        alone = sample(qwen, [one])[one.request_id]
        got = outcomes[one.request_id].result
        assert got is not None
        for left, right in zip(alone.sequences, got.sequences, strict=True):
            assert left.tokens.tolist() == right.tokens.tolist()
            assert left.logprobs.tobytes() == right.logprobs.tobytes()
    assert_empty(sampler)


def test_a_request_larger_than_the_memory_runs_alone(qwen: BaseModel) -> None:
    sampler = sampler_of(qwen, max_cached_tokens=100)
    sampler.submit(
        [ask(f"r{i}", prompt_of(150, seed=i), num_samples=3, max_tokens=70, use_eos=False) for i in range(2)]
    )
    outcomes = run_all(sampler)
    assert all(outcome.result is not None for outcome in outcomes.values())
    assert list(outcomes) == ["r0", "r1"]
    assert_empty(sampler)


def test_a_step_ends_with_its_time_or_with_the_first_result(qwen: BaseModel) -> None:
    sampler = BuiltinSampler(qwen, token_bytes=None, eos_ids=frozenset(), limits=SamplerLimits(), clock=TickingClock())
    sampler.submit([ask("a", prompt_of(5), max_tokens=20, use_eos=False)])
    assert sampler.step(3.0) == []
    sequence = sampler._jobs[RequestId("a")].sequences[0]
    assert len(sequence.tokens) == 3
    assert [outcome.request_id for outcome in sampler.step(FOREVER_S)] == ["a"]
    assert sampler.step(FOREVER_S) == []


def test_a_refused_request_does_not_cost_the_others_their_step(qwen: BaseModel) -> None:
    sampler = sampler_of(qwen)
    sampler.submit([ask("bad", []), ask("good", prompt_of(5), max_tokens=1)])
    assert {outcome.request_id for outcome in sampler.step(0.0)} == {"bad", "good"}
    assert_empty(sampler)


def test_waiting_and_running_are_counted(qwen: BaseModel) -> None:
    sampler = sampler_of(qwen, max_running=2, max_tenant_share=1.0)
    sampler.submit([ask(f"r{i}", prompt_of(5), max_tokens=9, use_eos=False) for i in range(5)])
    assert (sampler.num_waiting, sampler.num_running) == (5, 0)
    sampler.step(0.0)
    sampler.step(0.0)
    assert (sampler.num_waiting, sampler.num_running) == (3, 2)


def test_the_cache_of_200_samples_that_come_and_go_stays_within_its_bound(
    qwen: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_so_far: list[weakref.ref[Tensor]] = []
    zeros = CacheShape.zeros

    def counted(shape: CacheShape, num_rows: int, capacity: int) -> Tensor:
        made = zeros(shape, num_rows, capacity)
        made_so_far.append(weakref.ref(made))
        return made

    monkeypatch.setattr(CacheShape, "zeros", counted)
    limits = SamplerLimits(max_running=24, max_cached_tokens=3_000, prefill_chunk_tokens=64, prefix_share=0.0)
    sampler = open_sampler(qwen, limits=limits)
    rng = np.random.default_rng(0)
    # Most are short, and a few long ones keep every size of place in use.
    for index in range(200):
        max_tokens = int(rng.integers(60, 130)) if index % 20 == 0 else int(rng.integers(1, 5))
        prompt = prompt_of(int(rng.integers(1, 130)), seed=index)
        sampler.submit([ask(f"r{index}", prompt, tenant=f"t{index % 5}", max_tokens=max_tokens, use_eos=False)])
    place_bytes = 2 * qwen.num_layers * qwen.num_kv_heads * qwen.head_dim * 4
    largest = num_done = 0
    while sampler.has_work:
        num_done += sum(outcome.result is not None for outcome in sampler.step(0))
        largest = max(largest, sum(one.numel() * 4 for ref in made_so_far if (one := ref()) is not None))
    assert num_done == 200
    assert 3_000 * place_bytes < 2 * largest, "it was full"
    assert largest <= 4 * 3_000 * place_bytes


@pytest.mark.parametrize("num_samples", [1, 9])
def test_samples_of_one_request_read_its_prompt_once(
    qwen: BaseModel, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0
    run_pass = builtin.run_pass

    def counted(base: BaseModel, buckets: Any, chunks: Sequence[Chunk], plans: RowPlans) -> PassYield:
        nonlocal num_read
        num_read += sum(chunk.num_tokens for chunk in chunks)
        return run_pass(base, buckets, chunks, plans)

    monkeypatch.setattr(builtin, "run_pass", counted)
    limits = SamplerLimits(max_running=4, max_cached_tokens=4_000, prefill_chunk_tokens=64, prefix_share=0.0)
    request = ask("a", prompt_of(150), num_samples=num_samples, max_tokens=4, use_eos=False)
    assert len(sample(qwen, [request], limits=limits)["a"].sequences) == num_samples
    assert num_read == 150
