"""Log-probabilities of a prompt's own tokens, collected chunk by chunk during its prefill.

It knows no cache and no attention: it is handed hidden rows. Invariant: the logits of a prompt are never held for
more than SCORE_ROWS rows at a time, because one row of a large vocabulary is over half a megabyte.

Legend: P tokens of the chunk, D hidden size, B rows scored at a time, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from treadle.domain.limits import PACK_MULTIPLE
from treadle.domain.ops import SampleOp
from treadle.domain.outcome import TopkLogprobs
from treadle.engine import head
from treadle.engine.adapter import AdapterWeights
from treadle.engine.base_model import BaseModel
from treadle.engine.kernels.base import LoraSegment
from treadle.errors import NonFiniteResult
from treadle.sampler.layout import round_up

SCORE_ROWS = 256


class PromptScores:
    """What a request wants to know about its prompt, as far as it is known."""

    def __init__(self, op: SampleOp) -> None:
        self._prompt = op.prompt
        self._wants_logprobs = op.wants_prompt_logprobs
        self._num_top = op.topk_prompt_logprobs
        # Nothing predicts the first token.
        self._logprobs = np.full(len(op.prompt), np.nan, dtype=np.float32)
        self._top: list[tuple[tuple[int, float], ...] | None] = [None] * (len(op.prompt) if self._num_top else 0)
        self._num_known = 1 if self._wants_logprobs or self._num_top else len(op.prompt)

    def add(self, base: BaseModel, adapter: AdapterWeights | None, hidden_PD: Tensor, *, start: int) -> None:
        """Score the tokens behind prompt positions [start, start + P), whose hidden states these are.

        Positions already scored are skipped. Raises NonFiniteResult when the model's logits are not finite.
        """
        stop = min(start + hidden_PD.shape[0], len(self._prompt) - 1)
        for first in range(start, stop, SCORE_ROWS):
            last = min(first + SCORE_ROWS, stop)
            if last + 1 > self._num_known:
                self._add_rows(base, adapter, hidden_PD[first - start : last - start], first=first)

    def result(self) -> tuple[NDArray[np.float32] | None, TopkLogprobs | None]:
        """Log-probabilities float32 [prompt] and the top k per position, each only when asked for."""
        assert self._num_known == len(self._prompt)
        topk = TopkLogprobs(rows=tuple(self._top)) if self._num_top else None
        return (self._logprobs if self._wants_logprobs else None), topk

    def _add_rows(self, base: BaseModel, adapter: AdapterWeights | None, hidden_BD: Tensor, *, first: int) -> None:
        num_rows = hidden_BD.shape[0]
        padded_BD = functional.pad(hidden_BD, (0, 0, 0, round_up(num_rows, PACK_MULTIPLE) - num_rows))
        segments = () if adapter is None else (LoraSegment(adapter=adapter, start=0, stop=padded_BD.shape[0]),)
        logprobs_BV = torch.log_softmax(head.logits(base, padded_BD, segments), dim=-1)[:num_rows]
        targets = self._prompt[first + 1 : first + 1 + num_rows].astype(np.int64)
        targets_B1 = torch.from_numpy(targets)[:, None].to(logprobs_BV.device)
        logprobs_B = logprobs_BV.gather(1, targets_B1).squeeze(1).cpu().numpy()
        if np.isnan(logprobs_B).any():
            raise NonFiniteResult("the model's logits are not finite on this prompt")
        self._logprobs[first + 1 : first + 1 + num_rows] = logprobs_B
        if self._num_top:
            top = logprobs_BV.topk(min(self._num_top, logprobs_BV.shape[1]), dim=-1)
            for offset, (ids, values) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True)):
                self._top[first + 1 + offset] = tuple(zip(ids, values, strict=True))
        self._num_known = first + 1 + num_rows
