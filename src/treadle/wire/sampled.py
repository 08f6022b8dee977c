"""A stored sample result as numbers again, for answers in other forms than the SDK's. The reverse of results.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.domain.states import StopReason
from treadle.wire import treadle_pb2 as pb
from treadle.wire.tensors import FLOAT32, INT32

# Cells of a top-k table at or below this hold no entry (see results.py).
_NO_ENTRY_LOGPROB = -99999.0


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The most likely tokens of N positions: token_ids int32 [N, k], logprobs float32 [N, k], best first."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def at(self, position: int) -> tuple[tuple[int, float], ...]:
        """(token id, logprob) of the entries of one position."""
        ids, logprobs = self.token_ids[position].tolist(), self.logprobs[position].tolist()
        return tuple((id_, logprob) for id_, logprob in zip(ids, logprobs, strict=True) if logprob > _NO_ENTRY_LOGPROB)


@dataclass(frozen=True, slots=True)
class Sequence:
    """tokens int32 [N], the stop token included; logprobs float32 [N]; top: of N positions, if it was asked for."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    stop_reason: StopReason
    top: TopTokens | None


@dataclass(frozen=True, slots=True)
class SampledResult:
    """prompt_logprobs float32 [P], NaN where there is none; it and prompt_top only if they were asked for."""

    sequences: tuple[Sequence, ...]
    prompt_logprobs: NDArray[np.float32] | None
    prompt_top: TopTokens | None
    num_cached_tokens: int


def decode_sample_result(body: bytes) -> SampledResult:
    """What `encode_sample_result` wrote."""
    message = pb.SampleOutput.FromString(body)
    return SampledResult(
        sequences=tuple(_sequence(sequence) for sequence in message.sequences),
        prompt_logprobs=np.frombuffer(message.prompt_logprobs, FLOAT32)
        if message.HasField("prompt_logprobs")
        else None,
        prompt_top=_top(message.topk_prompt_logprobs) if message.HasField("topk_prompt_logprobs") else None,
        num_cached_tokens=message.prompt_cache_hit_tokens,
    )


def _sequence(message: pb.SequenceMessage) -> Sequence:
    is_length = message.stop_reason == pb.STOP_REASON_CODE_LENGTH
    return Sequence(
        tokens=np.frombuffer(message.tokens, INT32),
        logprobs=np.frombuffer(message.logprobs, FLOAT32),
        stop_reason=StopReason.LENGTH if is_length else StopReason.STOP,
        top=_top(message.topk_logprobs) if message.HasField("topk_logprobs") else None,
    )


def _top(message: pb.TopkMessage) -> TopTokens:
    shape = (message.length, message.k)
    return TopTokens(
        np.frombuffer(message.token_ids, INT32).reshape(shape), np.frombuffer(message.logprobs, FLOAT32).reshape(shape)
    )
