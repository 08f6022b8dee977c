"""What the sampler writes down of a sequence for stable_reinforce: its own tokens and log-probabilities.

Nothing here knows how they are kept or for how long. Invariant: one log-probability per token, both little-endian, so
that the bytes mean the same on every machine that shares a database.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TOKEN = np.dtype("<i4")
_LOGPROB = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class RecordedSequence:
    """One sampled sequence: int32 tokens and float32 log-probabilities at temperature 1, as bytes.

    num_prompt_tokens: of the request that sampled it.
    """

    tokens: bytes
    logprobs: bytes
    num_prompt_tokens: int

    def __post_init__(self) -> None:
        assert len(self.tokens) // _TOKEN.itemsize == len(self.logprobs) // _LOGPROB.itemsize
        assert len(self.tokens) % _TOKEN.itemsize == 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // _TOKEN.itemsize

    def token_ids(self) -> NDArray[np.int32]:
        """int32 [num_tokens], read-only."""
        return np.frombuffer(self.tokens, _TOKEN)

    def sampling_logprobs(self) -> NDArray[np.float32]:
        """float32 [num_tokens], read-only."""
        return np.frombuffer(self.logprobs, _LOGPROB)


def recorded(
    sequences: Iterable[tuple[NDArray[np.int32], NDArray[np.float32]]], num_prompt_tokens: int
) -> tuple[RecordedSequence, ...]:
    """The records of a request's sequences, each given as its tokens and log-probabilities, in their order."""
    return tuple(
        RecordedSequence(
            tokens=tokens.astype(_TOKEN, copy=False).tobytes(),
            logprobs=logprobs.astype(_LOGPROB, copy=False).tobytes(),
            num_prompt_tokens=num_prompt_tokens,
        )
        for tokens, logprobs in sequences
    )
