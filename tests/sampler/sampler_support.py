"""Builders and a driver shared by the sampler's tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import treadle
from treadle.domain.ids import RequestId, SamplingSessionId, TenantId
from treadle.domain.ops import LoraSpec, SampleOp, SamplingParams
from treadle.domain.outcome import SampleOutcome, SampleResult
from treadle.engine.adapter import AdapterWeights
from treadle.engine.base_model import BaseModel
from treadle.engine.state import new_training_state
from treadle.sampler.base import SampleRequest, SamplerLimits
from treadle.sampler.builtin import BuiltinSampler, open_sampler

BUNDLED = Path(treadle.__file__).parent / "bundled" / "tiny"
FOREVER_S = 1e9


def prompt_of(length: int, *, seed: int = 0, vocab_size: int = 300) -> list[int]:
    return np.random.default_rng(seed).integers(10, vocab_size, size=length).tolist()


def ask(
    request_id: str,
    prompt: Sequence[int],
    *,
    tenant: str = "acme",
    adapter: AdapterWeights | None = None,
    num_samples: int = 1,
    wants_prompt_logprobs: bool = False,
    topk_prompt_logprobs: int = 0,
    fields: Mapping[str, Any] | None = None,
    **params: Any,
) -> SampleRequest:
    """A request; `params` are its sampling params, `fields` further fields of its op."""
    params.setdefault("seed", 1)
    return SampleRequest(
        request_id=RequestId(request_id),
        tenant_id=TenantId(tenant),
        op=SampleOp(
            sampling_session_id=SamplingSessionId("session"),
            seq_id=1,
            prompt=np.array(prompt, dtype=np.int32),
            num_samples=num_samples,
            params=SamplingParams(**params),
            wants_prompt_logprobs=wants_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            **(fields or {}),
        ),
        adapter=adapter,
    )


def adapter_of(base: BaseModel, *, seed: int, rank: int = 4) -> AdapterWeights:
    """An adapter that changes the model: unlike a fresh one, its B is not zero."""
    weights = new_training_state(base, LoraSpec(rank=rank, seed=seed)).weights
    generator = torch.Generator().manual_seed(seed)
    for module in weights.modules:
        weights.b(module).normal_(std=0.02, generator=generator)
    return weights


def run_all(sampler: BuiltinSampler, *, max_steps: int = 5_000) -> dict[str, SampleOutcome]:
    """Step until nothing is left; outcomes by request id, in order of completion."""
    outcomes: dict[str, SampleOutcome] = {}
    for _ in range(max_steps):
        if not sampler.has_work:
            return outcomes
        for outcome in sampler.step(FOREVER_S):
            assert outcome.request_id not in outcomes, "a request ended twice"
            outcomes[outcome.request_id] = outcome
    raise AssertionError(f"still busy after {max_steps} steps")


def bits(result: SampleResult) -> list[bytes]:
    """Every number of a result but how many of its prompt's tokens were in the cache."""
    arrays: list[np.ndarray | None] = [result.prompt_logprobs]
    for table in (result.topk_prompt_logprobs, *(sequence.topk_logprobs for sequence in result.sequences)):
        arrays += [] if table is None else [table.token_ids, table.logprobs]
    for sequence in result.sequences:
        arrays += [sequence.tokens, sequence.logprobs]
    if result.target_prompt_logprobs is not None:
        arrays.append(result.target_prompt_logprobs.logprobs)
    if result.prompt_alt_tokens is not None:
        arrays += [result.prompt_alt_tokens.tokens, result.prompt_alt_tokens.logprobs]
    return [b"" if array is None else array.tobytes() for array in arrays]


def sample(
    base: BaseModel, requests: Iterable[SampleRequest], *, limits: SamplerLimits | None = None
) -> dict[str, SampleResult]:
    """The results of requests submitted together to a sampler of their own."""
    sampler = open_sampler(base, limits=limits)
    sampler.submit(list(requests))
    outcomes = run_all(sampler)
    results = {}
    for request_id, outcome in outcomes.items():
        assert outcome.result is not None, outcome.failure
        results[request_id] = outcome.result
    return results


def reference_model(base: BaseModel) -> PreTrainedModel:
    """The same weights in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(base.facts.source_dir, dtype=torch.float32).eval()


def reference_logprobs(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """log p(. | tokens[: i + 1]) for each i, float32 [T, V]."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([list(tokens)])).logits[0].float(), dim=-1)
