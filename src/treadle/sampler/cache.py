"""Keys and values of running sequences and of prompts, and the attention that reads them.

Running sequences live in buckets by capacity (64 places, 128, 256, ...), one row each, without holes, so that a
pass attends over a whole bucket in one call per layer; a sequence that outgrows its bucket moves to the next. A
prompt is prefilled into a cache of its own and copied for each of its samples. It knows no requests and no tokens.

Invariants: places behind a sequence's end hold zeros (a stray NaN of a former owner would spread through the masked
sum), and a row's result does not depend on the other rows or on how far its bucket is read: that holds bit for bit
for one query per head over a multiple of LENGTH_MULTIPLE places and for at least as many rows as torch has threads
(measured on CPU: below, it shares a row's places out to threads; tests/sampler/test_sampler_cache.py).

Legend: N layers, S rows of a bucket, Q rows it is read with, K key and value heads, H query heads, C places, d size of a head, T rows of
the pass, P tokens of a prompt, L places read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from treadle.sampler.layout import round_up

LENGTH_MULTIPLE = 16
MIN_CAPACITY = 64

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one place of the cache holds. min_rows: rows that a bucket is read with, whoever owns them; on CPU at
    least torch's number of intra-op threads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    min_rows: int = 1

    def zeros(self, num_rows: int, capacity: int) -> Tensor:
        """Keys and values [N, 2, S, K, C, d]."""
        size = (self.num_layers, 2, num_rows, self.num_kv_heads, capacity, self.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)


class PromptCache:
    """The keys and values of one prompt, filled chunk by chunk."""

    def __init__(self, shape: CacheShape, num_tokens: int) -> None:
        self.num_places = num_tokens
        self.num_filled = 0
        self.data_N2SKPd = shape.zeros(1, num_tokens)


class Bucket(Generic[Owner]):
    """Rows of one capacity; row i belongs to owners[i]. Its memory grows by doubling and is given back when empty."""

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        self.capacity = capacity
        self.owners: list[Owner] = []
        self.min_rows = shape.min_rows
        self._shape = shape
        self.data_N2SKCd = shape.zeros(0, capacity)

    def add(self, owner: Owner) -> int:
        """A row of zeros for a new owner."""
        row = len(self.owners)
        if row == self.data_N2SKCd.shape[2]:
            grown = self._shape.zeros(max(self._shape.min_rows, 2 * row), self.capacity)
            grown[:, :, :row] = self.data_N2SKCd
            self.data_N2SKCd = grown
        else:
            self.data_N2SKCd[:, :, row].zero_()
        self.owners.append(owner)
        return row

    def remove(self, row: int) -> Owner | None:
        """Free a row; the owner of the last row, which now lies in its place, or None when nobody moved."""
        last = len(self.owners) - 1
        assert 0 <= row <= last
        moved: Owner | None = None
        if row != last:
            self.data_N2SKCd[:, :, row] = self.data_N2SKCd[:, :, last]
            moved = self.owners[row] = self.owners[last]
        self.owners.pop()
        if not self.owners:
            self.data_N2SKCd = self._shape.zeros(0, self.capacity)
        return moved


def capacity_for(num_places: int) -> int:
    """The capacity of the bucket that a sequence of this length lies in: the next of 64, 128, 256, ..."""
    return max(MIN_CAPACITY, 1 << (num_places - 1).bit_length())


@dataclass(frozen=True, slots=True)
class DecodePart:
    """One bucket's share of a pass: one new token for each of its rows.

    data: the bucket's [N, 2, S, K, C, d]. rows [S]: the pass row of each owned bucket row. places [S * K]: where each
    owned row's new key lies in the flat places. queries [Q], Q = max(S, min_rows): pass rows to read for; those
    behind S are stand-ins whose results are dropped. mask [Q, 1, 1, L]: 0 where a row may look, -inf behind its end.
    """

    data: Tensor
    rows: Tensor
    queries: Tensor
    places: Tensor
    mask: Tensor


def decode_part(bucket: Bucket[Owner], rows: Sequence[int], num_cached: Sequence[int]) -> DecodePart:
    """The part for a whole bucket; per bucket row its pass row and how many places it has filled so far."""
    data = bucket.data_N2SKCd
    num_rows, num_heads, capacity = len(bucket.owners), data.shape[3], bucket.capacity
    assert len(rows) == len(num_cached) == num_rows > 0
    assert max(num_cached) < capacity, "a full row moves to the next bucket before its pass"
    num_read = min(capacity, round_up(max(num_cached) + 1, LENGTH_MULTIPLE))
    device = data.device
    num_stand_ins = max(0, bucket.min_rows - num_rows)
    cached_S = torch.tensor(num_cached, device=device)
    cached_Q = torch.tensor([*num_cached, *[0] * num_stand_ins], device=device)
    first_SK = torch.arange(num_rows * num_heads, device=device).view(num_rows, num_heads) * capacity
    is_behind_QL = torch.arange(num_read, device=device) > cached_Q[:, None]
    mask_QL = torch.zeros(is_behind_QL.shape, dtype=data.dtype, device=device).masked_fill_(is_behind_QL, -torch.inf)
    return DecodePart(
        data=data,
        rows=torch.tensor(rows, device=device),
        queries=torch.tensor([*rows, *[rows[0]] * num_stand_ins], device=device),
        places=(first_SK + cached_S[:, None]).view(-1),
        mask=mask_QL[:, None, None, :],
    )


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """A prompt's chunk: pass rows [start, start + num_tokens), behind what its cache already holds."""

    cache: PromptCache
    start: int
    num_tokens: int


class CachedAttention:
    """The attention of one sampling pass: each row group reads its own cache and writes its new keys into it.

    Implements engine.attention.Attention. Rows that belong to no part get zeros.
    """

    def __init__(self, decodes: Sequence[DecodePart], prefills: Sequence[PrefillPart]) -> None:
        self._decodes = decodes
        self._prefills = [(part, _chunk_mask(part)) for part in prefills]

    def attend(
        self, layer_index: int, query_1HTd: Tensor, key_1KTd: Tensor, value_1KTd: Tensor, scaling: float
    ) -> Tensor:
        """See engine.attention.Attention."""
        _, num_heads, num_rows, head_dim = query_1HTd.shape
        mixed_THd = query_1HTd.new_zeros(num_rows, num_heads, head_dim)
        for decode in self._decodes:
            keys_QKLd = _append(decode, decode.data[layer_index, 0], key_1KTd)
            values_QKLd = _append(decode, decode.data[layer_index, 1], value_1KTd)
            query_QHd = query_1HTd[0].index_select(1, decode.queries).transpose(0, 1)
            mixed_QHd = _decode(query_QHd, keys_QKLd, values_QKLd, decode.mask, scaling)
            mixed_THd.index_copy_(0, decode.rows, mixed_QHd[: len(decode.rows)])
        for prefill, mask_PL in self._prefills:
            start, stop = prefill.start, prefill.start + prefill.num_tokens
            filled, end = prefill.cache.num_filled, prefill.cache.num_filled + prefill.num_tokens
            data_2SKPd = prefill.cache.data_N2SKPd[layer_index]
            data_2SKPd[0, 0, :, filled:end] = key_1KTd[0, :, start:stop]
            data_2SKPd[1, 0, :, filled:end] = value_1KTd[0, :, start:stop]
            mixed_1HPd = functional.scaled_dot_product_attention(
                query_1HTd[:, :, start:stop],
                data_2SKPd[0, :, :, :end],
                data_2SKPd[1, :, :, :end],
                attn_mask=mask_PL,
                is_causal=mask_PL is None,
                scale=scaling,
                enable_gqa=True,
            )
            mixed_THd[start:stop] = mixed_1HPd[0].transpose(0, 1)
        return mixed_THd.unsqueeze(0)


def _append(part: DecodePart, cache_SKCd: Tensor, new_1KTd: Tensor) -> Tensor:
    """Write each row's new key or value behind its last one; the places to read, [Q, K, L, d]."""
    num_queries, num_read = part.mask.shape[0], part.mask.shape[-1]
    head_dim = cache_SKCd.shape[-1]
    new_SKd = new_1KTd[0].index_select(1, part.rows).transpose(0, 1)
    cache_SKCd.view(-1, head_dim).index_copy_(0, part.places, new_SKd.reshape(-1, head_dim))
    return cache_SKCd[:num_queries, :, :num_read]


def _decode(query_QHd: Tensor, keys_QKLd: Tensor, values_QKLd: Tensor, mask_Q11L: Tensor, scaling: float) -> Tensor:
    """Mixed values [Q, H, d] of one query per head."""
    if query_QHd.device.type == "cpu":
        mixed = functional.scaled_dot_product_attention(
            query_QHd.unsqueeze(2), keys_QKLd, values_QKLd, attn_mask=mask_Q11L, scale=scaling, enable_gqa=True
        )
        return mixed.squeeze(2)
    # On an accelerator the fused kernels that take a mask know no grouped heads, so the heads of a group become the
    # queries of their key head. On CPU that would be a GEMM of few rows, whose bits depend on the places read.
    num_queries, num_heads, head_dim = query_QHd.shape
    grouped = query_QHd.reshape(num_queries, keys_QKLd.shape[1], -1, head_dim)
    mixed = functional.scaled_dot_product_attention(grouped, keys_QKLd, values_QKLd, attn_mask=mask_Q11L, scale=scaling)
    return mixed.reshape(num_queries, num_heads, head_dim)


def _chunk_mask(part: PrefillPart) -> Tensor | None:
    """Which places [P, L] each token of a later chunk sees; None for the first one, which is plainly causal."""
    filled = part.cache.num_filled
    if filled == 0:
        return None
    device = part.cache.data_N2SKPd.device
    seen = torch.ones(part.num_tokens, filled + part.num_tokens, dtype=torch.bool, device=device)
    return seen.tril(diagonal=filled)
