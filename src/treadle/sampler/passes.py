"""One pass of the base model for whatever wants it: the next token of running sequences, and chunks of prompts.

It packs, runs and draws; it decides nothing about who is served and keeps nothing between passes but the caches.
Invariant: one call of run_pass is one forward of the base model.

Legend: T rows of the pass, D hidden size, V vocabulary, B rows that need logits, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treadle.domain.ids import RequestId
from treadle.domain.limits import PACK_MULTIPLE
from treadle.domain.ops import SamplingParams
from treadle.engine import head
from treadle.engine.base_model import BaseModel
from treadle.engine.kernels.row_groups import RowGroups, row_groups
from treadle.errors import TreadleError
from treadle.sampler.cache import Bucket, CachedAttention, DecodePart, PrefillPart, PromptCache, decode_part
from treadle.sampler.draw import DrawSettings, draw_tokens
from treadle.sampler.job import Job, SampledTokens, TopRow
from treadle.sampler.layout import Block, Layout, lay_out, round_up


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` of a job's prompt, behind what its cache holds."""

    job: Job
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sequence's next token; logprob is NaN when the model's logits were not finite.

    top: the most likely tokens in its place, when the request asks for them.
    """

    sequence: SampledTokens
    token: int
    logprob: float
    top: TopRow | None = None


@dataclass(frozen=True, slots=True)
class PassYield:
    """What a pass brought: a token for every running sequence and, where a prompt's last chunk was in it, the
    first token of every sequence of that job. failures: requests whose prompt could not be scored."""

    drawn: tuple[Drawn, ...]
    failures: Mapping[RequestId, TreadleError]


class RowPlans:
    """Where the running sequences lie in a pass; laid out anew only when others run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = row_groups((), device)

    def plan(self, sequences: Sequence[SampledTokens]) -> RowGroups:
        """The places of these sequences' rows."""
        adapters = [sequence.job.adapter for sequence in sequences]
        if not self._last.is_for(adapters):
            self._last = row_groups(adapters, self._device, before=self._last)
        return self._last

    def others(self, jobs: Sequence[Job]) -> RowGroups:
        """The places of rows that come once, one for each of these jobs."""
        return row_groups([job.adapter for job in jobs], self._device, before=self._last)


def run_pass(
    base: BaseModel, buckets: Sequence[Bucket[SampledTokens]], chunks: Sequence[Chunk], plans: RowPlans
) -> PassYield:
    """Run one forward over all rows of the buckets and the chunks; caches are filled in place."""
    assert all(bucket.owners for bucket in buckets)
    assert buckets or chunks, "an empty pass"
    sequences = [sequence for bucket in buckets for sequence in bucket.owners]
    groups = plans.plan(sequences)
    layout = lay_out(groups, [Block(chunk.job.adapter, chunk.num_tokens) for chunk in chunks])
    ended = [index for index, chunk in enumerate(chunks) if _ends_prompt(chunk)]
    with torch.no_grad():
        hidden_TD = _forward(base, buckets, chunks, layout)
        failures = _score_prompts(base, chunks, hidden_TD, layout.starts)
        for chunk in chunks:
            _cache_of(chunk).num_filled += chunk.num_tokens
        if chunks:
            last_rows = [layout.starts[index] + chunks[index].num_tokens - 1 for index in ended]
            jobs = [*(sequence.job for sequence in sequences), *(chunks[index].job for index in ended)]
            groups = plans.others(jobs) if ended else groups
            hidden_TD = _regroup(hidden_TD, [*layout.groups.rows, *last_rows], groups.rows)
            layout = lay_out(groups)
        if not groups.rows:
            return PassYield((), failures)
        logits_BV = head.logits(base, hidden_TD, layout.segments, kernel=layout.kernel(base.kernel))
        # Over all padded rows: a row's bits would depend on their number if only a few were normalised.
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
        drawn = _draw_next(sequences, logits_BV, logprobs_BV, groups.rows[: len(sequences)])
        for i, row in zip(ended, groups.rows[len(sequences) :], strict=True):
            drawn += _draw_first(chunks[i].job, logits_BV[row : row + 1], logprobs_BV[row])
    return PassYield(tuple(drawn), failures)


def _forward(
    base: BaseModel, buckets: Sequence[Bucket[SampledTokens]], chunks: Sequence[Chunk], layout: Layout
) -> Tensor:
    tokens = np.zeros(layout.num_rows, dtype=np.int64)
    positions = np.zeros(layout.num_rows, dtype=np.int64)
    decodes: list[DecodePart] = []
    next_row = 0
    for bucket in buckets:
        rows = layout.groups.rows[next_row : next_row + len(bucket.owners)]
        next_row += len(rows)
        num_cached = [sequence.num_cached for sequence in bucket.owners]
        tokens[list(rows)] = [sequence.tokens[-1] for sequence in bucket.owners]
        positions[list(rows)] = num_cached
        decodes.append(decode_part(bucket, rows, num_cached))
    prefills: list[PrefillPart] = []
    for chunk, start in zip(chunks, layout.starts, strict=True):
        cache = _cache_of(chunk)
        filled, end = cache.num_filled, cache.num_filled + chunk.num_tokens
        tokens[start : start + chunk.num_tokens] = chunk.job.op.prompt[filled:end]
        positions[start : start + chunk.num_tokens] = np.arange(filled, end)
        prefills.append(PrefillPart(cache, start, chunk.num_tokens))
    return base.forward_hidden(
        torch.from_numpy(tokens).to(base.device),
        torch.from_numpy(positions).to(base.device),
        attention=CachedAttention(decodes, prefills),
        segments=layout.segments,
        kernel=layout.kernel(base.kernel),
    )


def _score_prompts(
    base: BaseModel, chunks: Sequence[Chunk], hidden_TD: Tensor, starts: Sequence[int]
) -> dict[RequestId, TreadleError]:
    failures: dict[RequestId, TreadleError] = {}
    for chunk, start in zip(chunks, starts, strict=True):
        job = chunk.job
        try:
            hidden_PD = hidden_TD[start : start + chunk.num_tokens]
            job.scores.add(base, job.adapter, hidden_PD, start=_cache_of(chunk).num_filled)
        except TreadleError as error:
            failures[job.request.request_id] = error
    return failures


def _regroup(hidden_TD: Tensor, rows: Sequence[int], places: Sequence[int]) -> Tensor:
    """The rows that need logits, each in its place, densely."""
    chosen_BD = hidden_TD.new_zeros(round_up(len(rows), PACK_MULTIPLE), hidden_TD.shape[1])
    chosen_BD[list(places)] = hidden_TD[list(rows)]
    return chosen_BD


def _draw_next(
    sequences: Sequence[SampledTokens], logits_BV: Tensor, logprobs_BV: Tensor, rows: Sequence[int]
) -> list[Drawn]:
    if not sequences:
        return []
    rows_S = torch.tensor(rows, device=logits_BV.device)
    settings = _settings([sequence.job.op.params for sequence in sequences], vocab_size=logits_BV.shape[1])
    uniforms_S1 = np.array([[_uniform(sequence)] for sequence in sequences])
    tokens_S1 = draw_tokens(logits_BV.index_select(0, rows_S), settings, uniforms_S1)
    logprobs_S = logprobs_BV[rows_S, tokens_S1[:, 0]]
    tops = _top_rows(logprobs_BV, rows, [sequence.job.op.topk_sample_logprobs for sequence in sequences])
    return [
        Drawn(sequence, token, logprob, top)
        for sequence, token, logprob, top in zip(
            sequences, tokens_S1[:, 0].tolist(), logprobs_S.tolist(), tops, strict=True
        )
    ]


def _draw_first(job: Job, logits_1V: Tensor, logprobs_V: Tensor) -> list[Drawn]:
    """The first token of each of a job's sequences, all drawn from the prompt's last row."""
    settings = _settings([job.op.params], vocab_size=logits_1V.shape[1])
    uniforms_1S = np.array([[_uniform(sequence) for sequence in job.unstarted]])
    tokens_S = draw_tokens(logits_1V, settings, uniforms_1S)[0]
    logprobs_S = logprobs_V[tokens_S]
    (top,) = _top_rows(logprobs_V[None, :], [0], [job.op.topk_sample_logprobs])
    return [
        Drawn(sequence, token, logprob, top)
        for sequence, token, logprob in zip(job.unstarted, tokens_S.tolist(), logprobs_S.tolist(), strict=True)
    ]


def _top_rows(logprobs_BV: Tensor, rows: Sequence[int], widths: Sequence[int]) -> list[TopRow | None]:
    """The `widths[i]` most likely tokens of each of these rows, best first; None where the width is 0.

    Rows of one width share a call. The same width whatever the company: which of two equally likely tokens comes first
    may depend on it.
    """
    tops: list[TopRow | None] = [None] * len(rows)
    for width in sorted(set(widths) - {0}):
        members = [index for index, wanted in enumerate(widths) if wanted == width]
        chosen = torch.tensor([rows[index] for index in members], device=logprobs_BV.device)
        best = logprobs_BV.index_select(0, chosen).topk(min(width, logprobs_BV.shape[1]), dim=-1)
        token_ids, logprobs = best.indices.int().cpu().numpy(), best.values.cpu().numpy()
        for index, ids_K, logprobs_K in zip(members, token_ids, logprobs, strict=True):
            tops[index] = ids_K, logprobs_K
    return tops


def _uniform(sequence: SampledTokens) -> float:
    # Greedy sequences draw nothing; their stream is never read.
    return 0.0 if sequence.job.op.params.temperature == 0.0 else sequence.uniforms.take()


def _settings(params: Sequence[SamplingParams], *, vocab_size: int) -> DrawSettings:
    return DrawSettings(
        temperature=np.array([one.temperature for one in params], dtype=np.float64),
        top_k=np.array([vocab_size if one.top_k == -1 else one.top_k for one in params], dtype=np.int64),
        top_p=np.array([one.top_p for one in params], dtype=np.float64),
    )


def _cache_of(chunk: Chunk) -> PromptCache:
    cache = chunk.job.prompt_cache
    assert cache is not None, "a prompt being read has a cache"
    return cache


def _ends_prompt(chunk: Chunk) -> bool:
    cache = _cache_of(chunk)
    return cache.num_filled + chunk.num_tokens == cache.num_places
