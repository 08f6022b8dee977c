"""How tokens are drawn: temperature, top-k, top-p, and the random numbers behind them.

Pure functions over a batch of rows, and a stream of uniforms per sequence. It knows no requests and no model.
Invariant: a row's tokens depend on that row's logits, settings and uniforms alone, so a sample is the same in any
company; and a sequence's uniforms depend on (seed, sample index, position) alone, so they survive a restart.

Legend: R rows, V vocabulary, N draws per row, C candidates looked at.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Candidates that top-p looks at first; a full sort of a large vocabulary costs milliseconds per row.
_FIRST_CANDIDATES = 1_024
# Numbers of a float64 [R, V] worked on at a time (16 MiB); rows of a large vocabulary are drawn a few at a time.
_MAX_NUMBERS = 2**21
# Uniforms made at a time, because a call into the generator costs as much as dozens of numbers.
_STREAM_BLOCK = 32


class UniformStream:
    """The uniform numbers in [0, 1) of one sampled sequence, one per position, in order.

    Philox4x64 keyed by SHA-256 of (seed, stream), where a stream is named by its sample's index, or by what else is
    drawn; number p is the top 53 bits of raw output p. numpy keeps the raw output of its bit generators stable across
    versions.
    """

    __slots__ = ("_block", "_next", "_philox")

    def __init__(self, seed: int, stream: int | str) -> None:
        digest = hashlib.sha256(f"treadle sample:{seed}:{stream}".encode()).digest()
        self._philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
        self._block: list[float] = []
        self._next = 0

    def take(self) -> float:
        """The uniform of the next position."""
        if self._next == len(self._block):
            raw = self._philox.random_raw(_STREAM_BLOCK)
            self._block = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
            self._next = 0
        self._next += 1
        return self._block[self._next - 1]

    def take_many(self, count: int) -> NDArray[np.float64]:
        """The next `count` uniforms, float64 [count]; of a stream that `take` is not used on."""
        assert not self._block, "taken one by one before"
        raw = np.asarray(self._philox.random_raw(count), dtype=np.uint64)
        return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """temperature [R], 0 is greedy; top_k [R], V or more is off; top_p [R], 1.0 is off."""

    temperature: NDArray[np.float64]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]


def draw_tokens(logits_RV: Tensor, settings: DrawSettings, uniforms_RN: NDArray[np.float64]) -> Tensor:
    """Token ids int64 [R, N]: N independent draws from each row.

    temperature 0: argmax, ties to the lowest id. Otherwise p = softmax(logits / T) in float64, cut to the top_k
    most likely, then to the smallest set that holds top_p of what is left (at least one token; ties to the lowest
    ids), renormalised, and drawn by the inverse of its cumulative sum. A row that is not finite gives some token.
    """
    num_rows, num_draws = uniforms_RN.shape
    assert logits_RV.shape[0] == num_rows == len(settings.temperature)
    num_at_a_time = max(1, _MAX_NUMBERS // logits_RV.shape[1])
    if num_rows > num_at_a_time:
        pieces = [slice(first, first + num_at_a_time) for first in range(0, num_rows, num_at_a_time)]
        return torch.cat([draw_tokens(logits_RV[rows], _select(settings, rows), uniforms_RN[rows]) for rows in pieces])
    greedy = settings.temperature == 0.0
    if greedy.all():
        return logits_RV.argmax(dim=-1, keepdim=True).expand(num_rows, num_draws)
    if not greedy.any():
        return _draw_random(logits_RV, settings, uniforms_RN)
    tokens_RN = torch.empty(num_rows, num_draws, dtype=torch.int64, device=logits_RV.device)
    greedy_R = torch.from_numpy(np.flatnonzero(greedy)).to(logits_RV.device)
    random_R = torch.from_numpy(np.flatnonzero(~greedy)).to(logits_RV.device)
    tokens_RN[greedy_R] = logits_RV[greedy_R].argmax(dim=-1, keepdim=True).expand(len(greedy_R), num_draws)
    tokens_RN[random_R] = _draw_random(logits_RV[random_R], _select(settings, ~greedy), uniforms_RN[~greedy])
    return tokens_RN


def probabilities(logits_RV: Tensor, settings: DrawSettings) -> Tensor:
    """What `draw_tokens` draws from, for temperatures over 0: float64 [R, V], 0 where cut, not renormalised."""
    temperature_R1 = torch.from_numpy(settings.temperature)[:, None].to(logits_RV.device)
    highest_R1 = logits_RV.amax(dim=-1, keepdim=True)
    # Differences to the maximum first, so that a tiny temperature overflows to probability 0 and never to NaN.
    probs_RV = torch.softmax((logits_RV - highest_R1).double() / temperature_R1, dim=-1)
    cut = (settings.top_k < logits_RV.shape[1]) | (settings.top_p < 1.0)
    if cut.any():
        cut_R = torch.from_numpy(np.flatnonzero(cut)).to(logits_RV.device)
        probs_RV[cut_R] = _truncated(probs_RV[cut_R], _select(settings, cut))
    return probs_RV


def _draw_random(logits_RV: Tensor, settings: DrawSettings, uniforms_RN: NDArray[np.float64]) -> Tensor:
    cumulative_RV = probabilities(logits_RV, settings).cumsum(dim=-1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    goal_RN = torch.from_numpy(np.ascontiguousarray(uniforms_RN)).to(logits_RV.device) * total_R1
    # right=True finds the first sum above the goal, so a token of probability 0 is never drawn. Rounding can lift
    # the goal to the total itself; then it is the last token that has any probability.
    drawn_RN = torch.searchsorted(cumulative_RV, goal_RN, right=True)
    return torch.minimum(drawn_RN, torch.searchsorted(cumulative_RV, total_R1)).clamp_(max=logits_RV.shape[1] - 1)


def _truncated(probs_RV: Tensor, settings: DrawSettings) -> Tensor:
    """`probs_RV` with 0 for everything that top-k and top-p cut."""
    vocab_size = probs_RV.shape[1]
    top_k_R1 = torch.from_numpy(settings.top_k)[:, None].clamp(max=vocab_size).to(probs_RV.device)
    top_p_R1 = torch.from_numpy(settings.top_p)[:, None].to(probs_RV.device)
    num_candidates = min(vocab_size, max(_FIRST_CANDIDATES, _largest_below(settings.top_k, vocab_size)))
    while True:
        sorted_RC = probs_RV.topk(num_candidates, dim=-1).values
        cumulative_RC = sorted_RC.cumsum(dim=-1)
        last_R1 = (top_k_R1 - 1).clamp(max=num_candidates - 1)
        # Without top-k everything is left, and softmax made it sum to one.
        left_R1 = torch.where(top_k_R1 < vocab_size, cumulative_RC.gather(1, last_R1), 1.0)
        wanted_R1 = top_p_R1 * left_R1
        open_R1 = (cumulative_RC[:, -1:] < wanted_R1) & (top_k_R1 > num_candidates)
        if num_candidates == vocab_size or not bool(open_R1.any()):
            break
        num_candidates = vocab_size
    # A candidate is kept while the mass before it is still short of what is wanted.
    before_RC = functional.pad(cumulative_RC[:, :-1], (1, 0))
    in_nucleus_RC = (before_RC < wanted_R1) | (top_p_R1 >= 1.0)
    num_kept_R1 = torch.minimum(in_nucleus_RC.sum(dim=-1, keepdim=True).clamp(min=1), top_k_R1)
    lowest_R1 = sorted_RC.gather(1, num_kept_R1 - 1)
    above_RV = probs_RV > lowest_R1
    tied_RV = probs_RV == lowest_R1
    num_tied_R1 = num_kept_R1 - above_RV.sum(dim=-1, keepdim=True)
    kept_RV = above_RV | (tied_RV & (tied_RV.cumsum(dim=-1) <= num_tied_R1))
    return torch.where(kept_RV, probs_RV, 0.0)


def _largest_below(values: NDArray[np.int64], limit: int) -> int:
    below = values[values < limit]
    return int(below.max()) if below.size else 0


def _select(settings: DrawSettings, rows: NDArray[np.bool_] | slice) -> DrawSettings:
    return DrawSettings(settings.temperature[rows], settings.top_k[rows], settings.top_p[rows])
