"""Attention over a packed batch: the seam between the base model's layers and whoever owns keys and values.

The base model is loaded with the attention implementation registered here. Each of its layers hands its
queries, keys and values to the `Attention` of the current pass, so training (packed sequences, no cache) and
sampling (cached keys) share one model. Nothing here knows adapters or losses.
Invariant: the rows of a sequence depend on that sequence alone, bit for bit, whatever else is in the pack.

Legend: T tokens of the packed batch, H query heads, K key and value heads, d size of a head, N sequences of
one length L.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

ATTENTION_NAME = "treadle"
ATTENTION_KWARG = "treadle_attention"


class Attention(Protocol):
    """Who attends to what in one pass. One instance serves every layer of that pass, in layer order."""

    def attend(
        self, layer_index: int, query_1HTd: Tensor, key_1KTd: Tensor, value_1KTd: Tensor, scaling: float
    ) -> Tensor:
        """The mixed values [1, T, H, d] of every row; rows that belong to nobody must be finite (zeros).

        Rotary embeddings are already applied. `scaling` multiplies the scores before the softmax.
        """
        ...


def register_attention() -> None:
    """Make transformers know our attention under ATTENTION_NAME. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, _attend_through_pass)


def _attend_through_pass(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    # transformers makes no mask for an attention whose masks it does not know; a mask here would be ignored.
    assert attention_mask is None, "the packed pass takes no mask"
    attention: Attention = kwargs[ATTENTION_KWARG]
    layer_index: int = module.layer_idx  # type: ignore[assignment]  # set by every transformers attention module
    return attention.attend(layer_index, query, key, value, scaling), None


class PackedCausalAttention:
    """Causal attention within each packed sequence, without a cache; what training uses.

    Sequences lie one after another from row 0, without holes; rows behind the last one are padding and get zeros.
    Neighbouring sequences of equal length share one call, which keeps the bits (tests/numerics says so).
    """

    def __init__(self, sequence_lengths: Sequence[int], num_rows: int) -> None:
        assert all(length > 0 for length in sequence_lengths), "an empty sequence has no rows"
        num_padding = num_rows - sum(sequence_lengths)
        assert num_padding >= 0, "more tokens than rows"
        self._runs = _runs_of_equal_length(sequence_lengths)
        self._sizes = [count * length for count, length in self._runs]
        self._num_padding = num_padding
        if num_padding:
            self._sizes.append(num_padding)

    def attend(
        self, layer_index: int, query_1HTd: Tensor, key_1KTd: Tensor, value_1KTd: Tensor, scaling: float
    ) -> Tensor:
        """See Attention.attend."""
        num_groups = query_1HTd.shape[1] // key_1KTd.shape[1]
        # Splitting once makes the backward one concatenation; slicing would make one full-size zero tensor per slice.
        queries = torch.split(query_1HTd, self._sizes, dim=2)
        keys = torch.split(key_1KTd, self._sizes, dim=2)
        values = torch.split(value_1KTd, self._sizes, dim=2)
        mixed = []
        for index, (count, length) in enumerate(self._runs):
            mixed_NHLd = functional.scaled_dot_product_attention(
                _by_sequence(queries[index], count, length),
                _by_sequence(keys[index], count, length),
                _by_sequence(values[index], count, length),
                is_causal=True,
                scale=scaling,
                enable_gqa=num_groups > 1,
            )
            mixed.append(mixed_NHLd.transpose(1, 2).reshape(1, count * length, *_heads(query_1HTd)))
        if self._num_padding:
            mixed.append(query_1HTd.new_zeros(1, self._num_padding, *_heads(query_1HTd)))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)


def _runs_of_equal_length(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(count, length) for each run of neighbours of equal length."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return runs


def _by_sequence(packed_1HTd: Tensor, count: int, length: int) -> Tensor:
    """[1, H, N * L, d] as [N, H, L, d], without a copy."""
    _, num_heads, _, head_dim = packed_1HTd.shape
    return packed_1HTd.reshape(num_heads, count, length, head_dim).transpose(0, 1)


def _heads(query_1HTd: Tensor) -> tuple[int, int]:
    return query_1HTd.shape[1], query_1HTd.shape[3]
