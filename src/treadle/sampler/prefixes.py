"""Keys and values of prompts that were read, kept for later prompts that begin with the same tokens.

They are kept by blocks of BLOCK_TOKENS tokens, counted from the prompt's start. A block is named by its tenant, its
weights and all tokens up to its end, so that a name stands for one content; another tenant's prompts are never found,
because a hit tells that they were there. It knows no requests and no attention.

Invariant: a prompt that is served from here samples the very bits it would have sampled without. That rests on two
things, both measured on a CPU only, so on other devices nothing is kept. A prompt is attended to piece by piece, on the
same grid whatever its chunks are (cache.py), so each row's attention has the same shape whoever computed the keys
before it; and a row of a matrix product keeps its bits in any number of rows (layout.py). What a sequence has sampled
is not kept: those keys and values were computed one row at a time and would differ in the last bits from a prompt's.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Fewer would find more and cost more calls of attention for a long prompt; a multiple of what layout.py pads to.
BLOCK_TOKENS = 64

BlockKey: TypeAlias = bytes


def block_keys(tenant_id: str, weights: str | None, prompt: NDArray[np.int32]) -> tuple[BlockKey, ...]:
    """The names of a prompt's whole blocks, in order. weights: names the version, None is the base model."""
    name = hashlib.sha256(repr((tenant_id, weights)).encode())
    keys: list[BlockKey] = []
    for stop in range(BLOCK_TOKENS, len(prompt) + 1, BLOCK_TOKENS):
        # One running digest: each name covers all tokens before it.
        name.update(prompt[stop - BLOCK_TOKENS : stop].astype("<i4").tobytes())
        keys.append(name.digest())
    return tuple(keys)


class Prefixes:
    """Blocks by name, the least recently used forgotten first."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[BlockKey, Tensor] = OrderedDict()

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._blocks

    @property
    def num_tokens(self) -> int:
        """Places of keys and values that are kept."""
        return len(self._blocks) * BLOCK_TOKENS

    def find(self, keys: Sequence[BlockKey]) -> list[Tensor]:
        """Keys and values [N, 2, K, BLOCK_TOKENS, d] of the first of these blocks, up to one that is not there.

        Not to be written to.
        """
        return [self._blocks[key] for key in takewhile(self._blocks.__contains__, keys)]

    def put(self, key: BlockKey, data_N2KBd: Tensor) -> None:
        """Keep a block; the caller hands the tensor over. One that is there already stays."""
        assert data_N2KBd.shape[3] == BLOCK_TOKENS
        self._blocks.setdefault(key, data_N2KBd)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Note that these blocks of one prompt, in its order, were used."""
        # The first ends up as the most recent: without it the ones behind it could never be found.
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def shrink(self, max_tokens: int) -> None:
        """Forget blocks until at most so many places are kept."""
        while self.num_tokens > max_tokens:
            self._blocks.popitem(last=False)
