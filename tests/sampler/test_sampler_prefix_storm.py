"""Random crowds over few prefixes and little memory: what was served, evicted or started over changes no bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sampler_support import adapter_of, ask, bits, open_sampler, prompt_of, sample

from treadle.domain.ids import BlobKey
from treadle.domain.ops import TargetTokens
from treadle.engine.adapter import AdapterWeights
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.sampler.base import SampleRequest, SamplerLimits

NUM_REQUESTS = 20


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
@pytest.mark.parametrize(("name", "dtype"), [("qwen", "float32"), ("tiny", "bfloat16"), ("moe", "float32")])
def test_a_storm_of_shared_prefixes_changes_no_bit(
    name: str, dtype: str, seed: int, request: pytest.FixtureRequest
) -> None:
    base: BaseModel = request.getfixturevalue(name)
    if dtype != "float32":
        base = load_base_model(str(base.facts.source_dir), name="storm", device="cpu", dtype=dtype)
    rng = random.Random(f"{name} {seed}")
    adapters = [None, *(adapter_of(base, seed=number) for number in (1, 2))]
    requests = [_random_request(rng, f"r{index}", adapters) for index in range(NUM_REQUESTS)]
    limits = SamplerLimits(
        max_running=rng.choice([3, 8]),
        max_cached_tokens=rng.choice([1_500, 4_000]),
        prefill_chunk_tokens=rng.choice([64, 128, 512]),
        prefix_share=rng.choice([0.3, 0.9]),
    )
    sampler = open_sampler(base, limits=limits)
    waiting, found = list(requests), {}
    while waiting or sampler.has_work:
        count = rng.choice([0, 0, 1, 4])
        sampler.submit(waiting[:count])
        del waiting[:count]
        for outcome in sampler.step(rng.choice([0.0, 0.01])):
            assert outcome.result is not None, outcome.failure
            found[outcome.request_id] = outcome.result
    assert len(found) == NUM_REQUESTS
    num_served = sum(result.prompt_cache_hit_tokens for result in found.values())
    assert num_served > 0, "nothing was served, so nothing was tried"
    for one in requests:
        # Alone, with one chunk for the whole prompt and no memory of others.
        alone = sample(base, [one], limits=SamplerLimits(prefix_share=0.0))
        assert bits(found[one.request_id]) == bits(alone[one.request_id]), (one.request_id, limits)


def _random_request(rng: random.Random, request_id: str, adapters: Sequence[AdapterWeights | None]) -> SampleRequest:
    shared = prompt_of(400, seed=rng.choice([1, 2]))[: rng.choice([1, 63, 64, 65, 128, 190, 256, 300])]
    prompt = [*shared, *prompt_of(rng.choice([0, 1, 5, 70]), seed=rng.randrange(5))]
    which = rng.randrange(len(adapters))
    fields: dict[str, Any] = {"blob_key": BlobKey(f"weights/{which}") if which else None}
    options: dict[str, Any] = {}
    num_rows = len(prompt) - 1
    if rng.random() < 0.3 and num_rows:
        options["wants_prompt_logprobs"] = True
        options["topk_prompt_logprobs"] = rng.choice([0, 3])
        if rng.random() < 0.7:
            fields["prompt_logprobs_last_n"] = rng.randint(1, num_rows)
    if rng.random() < 0.2 and num_rows:
        first = rng.randrange(num_rows)
        cells = [-1] * (2 * first) + [rng.randrange(10, 300) for _ in range(2 * (num_rows - first))]
        fields["target_prompt_logprobs"] = TargetTokens(np.array(cells, np.int32), 2)
    if rng.random() < 0.1 and num_rows:
        fields["prompt_alt_tokens_k"] = 2
    fields["topk_sample_logprobs"] = rng.choice([0, 0, 2])
    return ask(
        request_id,
        prompt,
        tenant=rng.choice(["acme", "other"]),
        adapter=adapters[which],
        num_samples=rng.choice([1, 1, 3]),
        fields=fields,
        max_tokens=rng.choice([1, 4, 40, 90]),
        seed=rng.randrange(1000),
        temperature=rng.choice([0.0, 1.0]),
        use_eos=False,
        **options,
    )
