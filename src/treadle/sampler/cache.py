"""Keys and values of running sequences and of prompts, and the attention that reads them.

Running sequences live in buckets by capacity (64 places, 96, 128, 192, ...), one row each, without holes, so that a
pass attends over a whole bucket in one call per layer; a sequence that outgrows its bucket moves to the next. A
prompt is prefilled into a cache of its own, in chunks of any length, and copied for each of its samples. It knows no
requests and no tokens.

Invariants: places behind a sequence's end hold zeros (a stray NaN of a former owner would spread through the masked
sum); a decoding row's result depends on that row and its bucket's capacity alone, bit for bit; and a prompt's rows on
what stands before them alone: they attend piece by piece, on a grid that starts with the prompt (fused attention gives
a row other bits in a call of another number of queries), and only the prompt's last piece may be a short one.

Legend: N layers, S rows of a bucket, K key and value heads, H query heads, G query heads per key head, C places,
d size of a head, T rows of the pass, P tokens of a prompt's chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from treadle.sampler.layout import round_up
from treadle.sampler.prefixes import BLOCK_TOKENS

MIN_CAPACITY = 64

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one place of the cache holds."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def zeros(self, num_rows: int, capacity: int) -> Tensor:
        """Keys and values [N, 2, S, K, C, d]."""
        size = (self.num_layers, 2, num_rows, self.num_kv_heads, capacity, self.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)


class PromptCache:
    """The keys and values of one prompt, filled chunk by chunk. piece_tokens: of the grid that its rows attend on."""

    def __init__(self, shape: CacheShape, num_tokens: int, *, piece_tokens: int = BLOCK_TOKENS) -> None:
        self.num_places = num_tokens
        self.piece_tokens = piece_tokens
        self.num_filled = 0
        # In whole blocks, so that rows lie at the same distances to memory's lines in prompts of any length.
        self.data_N2SKPd = shape.zeros(1, round_up(num_tokens, BLOCK_TOKENS))

    def block(self, index: int) -> Tensor:
        """A copy of the block's keys and values [N, 2, K, BLOCK_TOKENS, d]."""
        start = index * BLOCK_TOKENS
        assert start + BLOCK_TOKENS <= self.num_filled
        return self.data_N2SKPd[:, :, 0, :, start : start + BLOCK_TOKENS].clone()

    def fill_block(self, block_N2KBd: Tensor) -> None:
        """Take the next block, computed before, as if it had been filled here."""
        assert self.num_filled % BLOCK_TOKENS == 0
        stop = self.num_filled + BLOCK_TOKENS
        assert stop < self.num_places, "the last row is always read: sampling needs its logits"
        self.data_N2SKPd[:, :, 0, :, self.num_filled : stop] = block_N2KBd
        self.num_filled = stop


class Bucket(Generic[Owner]):
    """Rows of one capacity, row i of owners[i]. Memory doubles when full and halves when three quarters are free."""

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        self.capacity = capacity
        self.owners: list[Owner] = []
        self._shape = shape
        self.data_N2SKCd = shape.zeros(0, capacity)

    def add(self, owner: Owner) -> int:
        """A row of zeros for a new owner."""
        row = len(self.owners)
        if row == self.data_N2SKCd.shape[2]:
            self._resize(max(1, 2 * row))
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
        num_rows = self.data_N2SKCd.shape[2]
        if not self.owners:
            self.data_N2SKCd = self._shape.zeros(0, self.capacity)
        elif 4 * len(self.owners) <= num_rows:
            # Else a bucket that is never quite empty would keep the memory of its fullest hour.
            self._resize(num_rows // 2)
        return moved

    def _resize(self, num_rows: int) -> None:
        data = self._shape.zeros(num_rows, self.capacity)
        kept = min(num_rows, self.data_N2SKCd.shape[2])
        data[:, :, :kept] = self.data_N2SKCd[:, :, :kept]
        self.data_N2SKCd = data


def capacity_for(num_places: int) -> int:
    """The capacity of the bucket that a sequence of this length lies in: the next of 64, 96, 128, 192, 256, ..."""
    power = max(MIN_CAPACITY, 1 << (num_places - 1).bit_length())
    return power * 3 // 4 if power > MIN_CAPACITY and num_places <= power * 3 // 4 else power


@dataclass(frozen=True, slots=True)
class DecodePart:
    """One bucket's share of a pass: one new token for each of its rows.

    data: the bucket's [N, 2, S, K, C, d], S counting rows without an owner too. rows: the pass row of each owned row.
    places: where the new key of each owned row and head lies in the flat [S * K * C] places.
    mask [rows, 1, 1, C]: 0 where a row may look, -inf behind its end.
    """

    data: Tensor
    rows: Tensor
    places: Tensor
    mask: Tensor


def decode_part(bucket: Bucket[Owner], rows: Sequence[int], num_cached: Sequence[int]) -> DecodePart:
    """The part for a whole bucket; per owned row its pass row and how many places it has filled so far."""
    data = bucket.data_N2SKCd
    num_rows, num_heads, capacity = len(bucket.owners), data.shape[3], bucket.capacity
    assert len(rows) == len(num_cached) == num_rows > 0
    assert max(num_cached) < capacity, "a full row moves to the next bucket before its pass"
    cached_S1 = torch.tensor(num_cached, device=data.device)[:, None]
    first_SK = torch.arange(num_rows * num_heads, device=data.device).view(num_rows, num_heads) * capacity
    is_behind_SC = torch.arange(capacity, device=data.device) > cached_S1
    mask_SC = torch.zeros(is_behind_SC.shape, dtype=data.dtype, device=data.device)
    return DecodePart(
        data=data,
        rows=torch.tensor(rows, device=data.device),
        places=(first_SK + cached_S1).view(-1),
        mask=mask_SC.masked_fill_(is_behind_SC, -torch.inf)[:, None, None, :],
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
        self._prefills = [(part, _pieces(part)) for part in prefills]

    def attend(
        self, layer_index: int, query_1HTd: Tensor, key_1KTd: Tensor, value_1KTd: Tensor, scaling: float
    ) -> Tensor:
        """See engine.attention.Attention."""
        _, num_heads, num_rows, head_dim = query_1HTd.shape
        mixed_THd = query_1HTd.new_zeros(num_rows, num_heads, head_dim)
        for decode in self._decodes:
            keys_SKCd = _append(decode, decode.data[layer_index, 0], key_1KTd)
            values_SKCd = _append(decode, decode.data[layer_index, 1], value_1KTd)
            query_SHd = query_1HTd[0].index_select(1, decode.rows).transpose(0, 1)
            mixed_SHd = _decode(query_SHd, keys_SKCd, values_SKCd, decode.mask, scaling)
            mixed_THd.index_copy_(0, decode.rows, mixed_SHd)
        for prefill, pieces in self._prefills:
            start, stop = prefill.start, prefill.start + prefill.num_tokens
            filled, end = prefill.cache.num_filled, prefill.cache.num_filled + prefill.num_tokens
            data_2SKPd = prefill.cache.data_N2SKPd[layer_index]
            data_2SKPd[0, 0, :, filled:end] = key_1KTd[0, :, start:stop]
            data_2SKPd[1, 0, :, filled:end] = value_1KTd[0, :, start:stop]
            for piece in pieces:
                mixed_1HPd = functional.scaled_dot_product_attention(
                    query_1HTd[:, :, piece.start : piece.stop],
                    data_2SKPd[0, :, :, : piece.end],
                    data_2SKPd[1, :, :, : piece.end],
                    attn_mask=piece.mask,
                    is_causal=piece.mask is None,
                    scale=scaling,
                    enable_gqa=True,
                )
                mixed_THd[piece.start : piece.stop] = mixed_1HPd[0].transpose(0, 1)
        return mixed_THd.unsqueeze(0)


def _append(part: DecodePart, cache_SKCd: Tensor, new_1KTd: Tensor) -> Tensor:
    """Write each row's new key or value behind its last one; the owned rows of the cache."""
    head_dim = cache_SKCd.shape[-1]
    new_SKd = new_1KTd[0].index_select(1, part.rows).transpose(0, 1)
    cache_SKCd.view(-1, head_dim).index_copy_(0, part.places, new_SKd.reshape(-1, head_dim))
    return cache_SKCd[: len(part.rows)]


def _decode(query_SHd: Tensor, keys_SKCd: Tensor, values_SKCd: Tensor, mask_S11C: Tensor, scaling: float) -> Tensor:
    """Mixed values [S, H, d] of one query per head; a group's query heads are the queries of their key head.

    On CPU by plain products: torch's fused CPU attention (2.13) rounds one query differently on each of its threads,
    whose scratch memory is aligned differently, so a row's bits would depend on how many others there are. Reading
    the whole capacity, not just the longest row, keeps the products' shape independent of company too.
    """
    num_rows, num_heads, head_dim = query_SHd.shape
    query_SKGd = query_SHd.reshape(num_rows, keys_SKCd.shape[1], -1, head_dim)
    if query_SHd.device.type == "cpu":
        # In float32, as the fused kernel of the trainer has it inside; no copies where the cache is float32.
        scores_SKGC = torch.matmul(query_SKGd.float() * scaling, keys_SKCd.float().transpose(-1, -2)) + mask_S11C
        mixed_SKGd = torch.matmul(torch.softmax(scores_SKGC, dim=-1), values_SKCd.float()).to(query_SHd.dtype)
    else:
        mixed_SKGd = functional.scaled_dot_product_attention(
            query_SKGd, keys_SKCd, values_SKCd, attn_mask=mask_S11C, scale=scaling
        )
    return mixed_SKGd.reshape(num_rows, num_heads, head_dim)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a chunk that attends in one call: pass rows [start, stop), which see the prompt's places up to `end`.

    mask [P, L]: which of these each row sees; None at a prompt's start, which is plainly causal.
    """

    start: int
    stop: int
    end: int
    mask: Tensor | None


def _pieces(part: PrefillPart) -> list[_Piece]:
    filled, grid, device = part.cache.num_filled, part.cache.piece_tokens, part.cache.data_N2SKPd.device
    pieces: list[_Piece] = []
    place, last = filled, filled + part.num_tokens
    while place < last:
        end = min(last, (place // grid + 1) * grid)
        start = part.start + place - filled
        mask = None
        if place > 0:
            mask = torch.ones(end - place, end, dtype=torch.bool, device=device).tril(diagonal=place)
        pieces.append(_Piece(start, start + end - place, end, mask))
        place = end
    return pieces
