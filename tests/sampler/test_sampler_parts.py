"""Samples that somebody watches: their tokens are told while they grow, each once and in order."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from sampler_support import ask, prompt_of

from treadle.domain.outcome import SampleOutcome
from treadle.engine.base_model import BaseModel
from treadle.sampler.base import SampleRequest, SamplerLimits
from treadle.sampler.builtin import open_sampler


def watched(request_id: str, **options: object) -> SampleRequest:
    request = ask(request_id, prompt_of(9), **options)  # type: ignore[arg-type]
    return replace(request, op=replace(request.op, streams=True))


def run_watching(
    base: BaseModel, requests: list[SampleRequest], limits: SamplerLimits | None = None
) -> tuple[dict[str, SampleOutcome], dict[tuple[str, int], list[int]], int]:
    """Outcomes, the tokens that were told of each sequence, and in how many calls."""
    sampler = open_sampler(base, limits=limits)
    sampler.submit(requests)
    outcomes: dict[str, SampleOutcome] = {}
    told: dict[tuple[str, int], list[int]] = defaultdict(list)
    num_calls = 0
    while sampler.has_work:
        outcomes |= {outcome.request_id: outcome for outcome in sampler.step(0.0)}
        parts = sampler.take_parts()
        num_calls += bool(parts)
        for part in parts:
            known = told[part.request_id, part.sequence_index]
            assert part.start == len(known)
            assert len(part.tokens) == len(part.logprobs) > 0
            known.extend(part.tokens)
    return outcomes, told, num_calls


def check_told(outcomes: dict[str, SampleOutcome], told: dict[tuple[str, int], list[int]]) -> None:
    for (request_id, index), tokens in told.items():
        result = outcomes[request_id].result
        assert result is not None
        assert tokens == result.sequences[index].tokens.tolist()[: len(tokens)]


def test_tokens_are_told_while_they_come_of_watched_samples_only(qwen: BaseModel) -> None:
    requests = [watched("seen", num_samples=2, max_tokens=12), ask("unseen", prompt_of(9), max_tokens=12)]
    outcomes, told, num_calls = run_watching(qwen, requests)
    assert {request_id for request_id, _ in told} == {"seen"}
    assert num_calls > 5
    check_told(outcomes, told)


def test_a_sample_that_starts_over_is_not_told_again(qwen: BaseModel) -> None:
    """Memory for one of them: the newer one yields and draws the same tokens once more."""
    requests = [watched("old", max_tokens=300, use_eos=False), watched("new", max_tokens=300, use_eos=False)]
    limits = SamplerLimits(max_cached_tokens=400, max_running=8)
    outcomes, told, _ = run_watching(qwen, requests, limits)
    check_told(outcomes, told)
    assert all(len(tokens) > 200 for tokens in told.values())
