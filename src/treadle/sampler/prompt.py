"""What a request wants to know about its prompt, collected chunk by chunk during its prefill.

Each wish (logprobs of the prompt's own tokens, the top k, named tokens, draws) says from which row on it needs logits
and takes what it needs from them. It knows no cache and no attention: it is handed hidden rows.
Invariants: the logits of a prompt are never held for more than SCORE_ROWS rows at a time, because one row of a large
vocabulary is over half a megabyte; and a row is scored once, from its own logits alone, whatever chunk it came in.

Legend: P tokens of the prompt, B rows scored at a time, D hidden size, V vocabulary, K columns asked for. Row i of the
prompt predicts its token i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from treadle.domain.limits import PACK_MULTIPLE
from treadle.domain.ops import SampleOp, TargetTokens
from treadle.domain.outcome import AltTokens, SampledSequence, SampleResult, TargetLogprobs, TopkLogprobs
from treadle.engine import head
from treadle.engine.adapter import AdapterWeights
from treadle.engine.base_model import BaseModel
from treadle.engine.kernels.base import LoraSegment
from treadle.errors import NonFiniteResult
from treadle.sampler.draw import DrawSettings, UniformStream, draw_tokens
from treadle.sampler.layout import round_up

SCORE_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Scored:
    """Rows [first, first + B) of a prompt: their logits and log-probabilities, float32 [B, V]."""

    first: int
    logits_BV: Tensor
    logprobs_BV: Tensor

    @property
    def stop(self) -> int:
        return self.first + self.logits_BV.shape[0]


class _Wish(Protocol):
    """first_row: the first row that it needs logits of. `add` gets rows in order, none twice, all from there on."""

    first_row: int

    def add(self, rows: _Scored) -> None: ...


class PromptScores:
    """What a request wants to know about its prompt, as far as it is known."""

    def __init__(self, op: SampleOp) -> None:
        self._prompt = op.prompt
        num_tokens = len(op.prompt)
        first_of_own = 0 if op.prompt_logprobs_last_n is None else num_tokens - 1 - op.prompt_logprobs_last_n
        self._own = _OwnTokens(op.prompt, first_of_own) if op.wants_prompt_logprobs else None
        self._top = _Top(num_tokens, op.topk_prompt_logprobs, first_of_own) if op.topk_prompt_logprobs else None
        self._targets = None if op.target_prompt_logprobs is None else _Targets(op.target_prompt_logprobs)
        self._draws = _Draws(op) if op.prompt_alt_tokens_k else None
        wishes: tuple[_Wish | None, ...] = (self._own, self._top, self._targets, self._draws)
        self._wishes = [wish for wish in wishes if wish is not None]
        # The last row predicts what is sampled, and nothing is asked about it here.
        self._next_row = min([num_tokens - 1, *(wish.first_row for wish in self._wishes)])

    @property
    def next_row(self) -> int:
        """The first row of the prompt whose logits are still wanted; the last row's, which sampling needs, always."""
        return self._next_row

    def add(self, base: BaseModel, adapter: AdapterWeights | None, hidden_PD: Tensor, *, start: int) -> None:
        """Score rows [start, start + P) of the prompt, whose hidden states these are, as far as they are wanted.

        Rows already scored are skipped. Raises NonFiniteResult when the model's logits are not finite.
        """
        stop = min(start + hidden_PD.shape[0], len(self._prompt) - 1)
        for first in range(max(start, self._next_row), stop, SCORE_ROWS):
            last = min(first + SCORE_ROWS, stop)
            self._add_rows(base, adapter, hidden_PD[first - start : last - start], first=first)

    def result(self, sequences: tuple[SampledSequence, ...], *, num_cached_tokens: int) -> SampleResult:
        """The whole result of the request with these sequences; what was not asked for is None."""
        assert self._next_row == len(self._prompt) - 1
        return SampleResult(
            sequences=sequences,
            prompt_logprobs=None if self._own is None else self._own.logprobs,
            topk_prompt_logprobs=None if self._top is None else self._top.table,
            target_prompt_logprobs=None if self._targets is None else self._targets.result,
            prompt_alt_tokens=None if self._draws is None else self._draws.result,
            prompt_cache_hit_tokens=num_cached_tokens,
        )

    def _add_rows(self, base: BaseModel, adapter: AdapterWeights | None, hidden_BD: Tensor, *, first: int) -> None:
        num_rows = hidden_BD.shape[0]
        padded_BD = functional.pad(hidden_BD, (0, 0, 0, round_up(num_rows, PACK_MULTIPLE) - num_rows))
        segments = () if adapter is None else (LoraSegment(adapter=adapter, start=0, stop=padded_BD.shape[0]),)
        logits_BV = head.logits(base, padded_BD, segments)
        rows = _Scored(first, logits_BV[:num_rows], torch.log_softmax(logits_BV, dim=-1)[:num_rows])
        # One logit that is NaN or +inf makes every log-probability of its row NaN, whichever is looked at.
        if bool(rows.logprobs_BV[:, 0].isnan().any()):
            raise NonFiniteResult("the model's logits are not finite on this prompt")
        for wish in self._wishes:
            if rows.stop > wish.first_row:
                wish.add(rows)
        self._next_row = rows.stop


class _OwnTokens:
    """The log-probability of each of the prompt's own tokens behind `first_row`; NaN for those before."""

    def __init__(self, prompt: NDArray[np.int32], first_row: int) -> None:
        self.first_row = first_row
        self._prompt = prompt
        # Nothing predicts the first token.
        self.logprobs = np.full(len(prompt), np.nan, dtype=np.float32)

    def add(self, rows: _Scored) -> None:
        first = max(rows.first, self.first_row)
        own_B = self._prompt[first + 1 : rows.stop + 1].astype(np.int64)
        own_B1 = torch.from_numpy(own_B)[:, None].to(rows.logprobs_BV.device)
        logprobs_B1 = rows.logprobs_BV[first - rows.first :].gather(1, own_B1)
        self.logprobs[first + 1 : rows.stop + 1] = logprobs_B1[:, 0].cpu().numpy()


class _Top:
    """The k most likely tokens at each position behind `first_row`."""

    def __init__(self, num_tokens: int, k: int, first_row: int) -> None:
        self.first_row = first_row
        self._k = k
        self.table = TopkLogprobs(
            token_ids=np.zeros((num_tokens, k), dtype=np.int32),
            logprobs=np.full((num_tokens, k), np.nan, dtype=np.float32),
        )

    def add(self, rows: _Scored) -> None:
        first = max(rows.first, self.first_row)
        top = rows.logprobs_BV[first - rows.first :].topk(min(self._k, rows.logprobs_BV.shape[1]), dim=-1)
        place = slice(first + 1, rows.stop + 1), slice(0, top.values.shape[1])
        self.table.token_ids[place] = top.indices.cpu().numpy()
        self.table.logprobs[place] = top.values.cpu().numpy()


class _Targets:
    """The log-probabilities of the tokens that the request names."""

    def __init__(self, targets: TargetTokens) -> None:
        self._targets = targets
        self._starts = targets.starts
        named = np.flatnonzero(targets.token_ids >= 0)
        num_rows = len(self._starts) - 1
        # The row of the first cell that names a token; without one, none.
        self.first_row = int(np.searchsorted(self._starts, named[0], side="right")) - 1 if named.size else num_rows
        self._logprobs = np.zeros(len(targets.token_ids), dtype=np.float32)

    @property
    def result(self) -> TargetLogprobs:
        return TargetLogprobs(self._targets, self._logprobs)

    def add(self, rows: _Scored) -> None:
        starts = self._starts[rows.first : rows.stop + 1]
        token_ids = self._targets.token_ids[starts[0] : starts[-1]]
        row_of_cell = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        named = np.flatnonzero(token_ids >= 0)
        device = rows.logprobs_BV.device
        row_ids = torch.from_numpy(row_of_cell[named]).to(device)
        columns = torch.from_numpy(token_ids[named].astype(np.int64)).to(device)
        self._logprobs[starts[0] + named] = rows.logprobs_BV[row_ids, columns].cpu().numpy()


class _Draws:
    """Draws with replacement from the model's distribution at each position, at the request's temperature.

    The whole vocabulary is drawn from: top_k and top_p are about what is sampled behind the prompt. Draw j of row i
    takes number i * K + j of a stream of uniforms of its own.
    """

    def __init__(self, op: SampleOp) -> None:
        self.first_row = 0
        self._temperature = op.params.temperature
        num_rows, self._k = len(op.prompt) - 1, op.prompt_alt_tokens_k
        self._uniforms = UniformStream(op.params.seed, "prompt")
        self.result = AltTokens(
            tokens=np.zeros((num_rows, self._k), dtype=np.int32),
            logprobs=np.zeros((num_rows, self._k), dtype=np.float32),
        )

    def add(self, rows: _Scored) -> None:
        num_rows, vocab_size = rows.logits_BV.shape
        settings = DrawSettings(
            temperature=np.full(num_rows, self._temperature, dtype=np.float64),
            top_k=np.full(num_rows, vocab_size, dtype=np.int64),
            top_p=np.ones(num_rows, dtype=np.float64),
        )
        uniforms_BK = self._uniforms.take_many(num_rows * self._k).reshape(num_rows, self._k)
        tokens_BK = draw_tokens(rows.logits_BV, settings, uniforms_BK)
        self.result.tokens[rows.first : rows.stop] = tokens_BK.cpu().numpy()
        self.result.logprobs[rows.first : rows.stop] = rows.logprobs_BV.gather(1, tokens_BK).cpu().numpy()
