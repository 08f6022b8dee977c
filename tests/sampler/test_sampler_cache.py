"""Buckets, their attention and the layout of rows: same values, same bits, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from treadle.domain.limits import PACK_MULTIPLE
from treadle.engine.adapter import AdapterLayout, AdapterWeights
from treadle.engine.kernels.row_groups import row_groups
from treadle.sampler.cache import (
    Bucket,
    CachedAttention,
    CacheShape,
    PrefillPart,
    PromptCache,
    capacity_for,
    decode_part,
)
from treadle.sampler.layout import GROUP_MULTIPLE, Block, lay_out

CPU = torch.device("cpu")


def filled_bucket(shape: CacheShape, capacity: int, lengths: list[int], *, seed: int) -> Bucket[int]:
    bucket: Bucket[int] = Bucket(shape, capacity)
    generator = torch.Generator().manual_seed(seed)
    for index, length in enumerate(lengths):
        row = bucket.add(index)
        values = torch.randn(
            shape.num_layers, 2, shape.num_kv_heads, length, shape.head_dim, generator=generator, dtype=torch.float32
        )
        bucket.data_N2SKCd[:, :, row, :, :length] = values.to(shape.dtype)
    return bucket


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("num_groups", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("capacity", "lengths"), [(96, [65, 66, 70, 80, 81, 90, 95]), (768, [513, 600, 767])])
def test_decoding_gives_the_same_bits_alone_and_beside_others(
    num_groups: int, dtype: torch.dtype, capacity: int, lengths: list[int]
) -> None:
    shape = CacheShape(num_layers=1, num_kv_heads=2, head_dim=32, dtype=dtype, device=CPU)
    num_rows = len(lengths)
    together = filled_bucket(shape, capacity, lengths, seed=4)
    query = torch.randn(1, 2 * num_groups, num_rows, 32).to(dtype)
    key, value = torch.randn(2, 1, 2, num_rows, 32).to(dtype)
    attention = CachedAttention([decode_part(together, range(num_rows), lengths)], [])
    mixed = attention.attend(0, query, key, value, 0.2)
    for row, length in enumerate(lengths):
        assert capacity_for(length + 1) == capacity
        alone = filled_bucket(shape, capacity, [0], seed=1)
        alone.data_N2SKCd[:, :, 0, :, :length] = together.data_N2SKCd[:, :, row, :, :length]
        one = slice(row, row + 1)
        attention = CachedAttention([decode_part(alone, [0], [length])], [])
        got = attention.attend(0, query[:, :, one], key[:, :, one], value[:, :, one], 0.2)
        assert torch.equal(got[0, 0], mixed[0, row]), f"length {length}"


def test_decoding_equals_plain_attention_over_all_places() -> None:
    shape = CacheShape(num_layers=1, num_kv_heads=2, head_dim=16, dtype=torch.float32, device=CPU)
    bucket = filled_bucket(shape, 64, [9, 30], seed=1)
    before = bucket.data_N2SKCd.clone()
    query, key, value = torch.randn(1, 6, 4, 16), torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16)
    mixed = CachedAttention([decode_part(bucket, [2, 0], [9, 30])], []).attend(0, query, key, value, 0.3)
    for bucket_row, (row, length) in enumerate([(2, 9), (0, 30)]):
        keys = torch.cat([before[0, 0, bucket_row, :, :length], key[0, :, row, None]], dim=1)
        values = torch.cat([before[0, 1, bucket_row, :, :length], value[0, :, row, None]], dim=1)
        expected = functional.scaled_dot_product_attention(
            query[0, :, row, None], keys.repeat_interleave(3, 0), values.repeat_interleave(3, 0), scale=0.3
        )
        torch.testing.assert_close(mixed[0, row], expected[:, 0], rtol=1e-5, atol=1e-6)
    assert not mixed[0, [1, 3]].any(), "rows that belong to nobody are zeros"


def test_prefill_in_chunks_equals_prefill_at_once() -> None:
    shape = CacheShape(num_layers=1, num_kv_heads=1, head_dim=16, dtype=torch.float32, device=CPU)
    query, key, value = torch.randn(1, 3, 40, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    whole = CachedAttention([], [PrefillPart(PromptCache(shape, 40), 0, 40)]).attend(0, query, key, value, 0.25)
    cache = PromptCache(shape, 40)
    for start, stop in [(0, 16), (16, 17), (17, 40)]:
        rows = slice(start, stop)
        attention = CachedAttention([], [PrefillPart(cache, 0, stop - start)])
        part = attention.attend(0, query[:, :, rows], key[:, :, rows], value[:, :, rows], 0.25)
        torch.testing.assert_close(part, whole[:, rows], rtol=1e-5, atol=1e-6)
        cache.num_filled = stop


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=60))
def test_a_bucket_keeps_each_owners_row_and_hands_out_clean_ones(actions: list[int | None]) -> None:
    """None adds an owner, a number removes one; every row holds its owner's number and nothing else."""
    shape = CacheShape(num_layers=2, num_kv_heads=1, head_dim=4, dtype=torch.float32, device=CPU)
    bucket: Bucket[int] = Bucket(shape, 8)
    for number, action in enumerate(actions, start=1):
        if action is None:
            row = bucket.add(number)
            assert not bucket.data_N2SKCd[:, :, row].any()
            bucket.data_N2SKCd[:, :, row] = number
        elif bucket.owners:
            row = action % len(bucket.owners)
            last = bucket.owners[-1]
            is_last = row == len(bucket.owners) - 1
            assert bucket.remove(row) == (None if is_last else last)
        for row, owner in enumerate(bucket.owners):
            assert bool((bucket.data_N2SKCd[:, :, row] == owner).all())
        assert bucket.data_N2SKCd.shape[2] < max(2, 4 * len(bucket.owners))


def test_a_bucket_gives_back_the_memory_of_those_who_left() -> None:
    shape = CacheShape(num_layers=1, num_kv_heads=1, head_dim=4, dtype=torch.float32, device=CPU)
    bucket: Bucket[int] = Bucket(shape, 64)
    for number in range(64):
        bucket.add(number)
    while len(bucket.owners) > 1:
        bucket.remove(0)
    assert bucket.data_N2SKCd.shape[2] == 2


@pytest.mark.parametrize(
    ("num_places", "capacity"),
    [(1, 64), (64, 64), (65, 96), (96, 96), (97, 128), (129, 192), (193, 256), (2_000, 2_048)],
)
def test_capacities_are_powers_of_two_and_the_middles_between(num_places: int, capacity: int) -> None:
    assert capacity_for(num_places) == capacity


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=9))
def test_blocks_lie_apart_in_padded_groups_of_their_adapter(decoding: list[int], drawn: list[tuple[int, int]]) -> None:
    layout = AdapterLayout(1, (), 0)
    adapters = [None, *(AdapterWeights(layout, torch.zeros(0), 1.0) for _ in range(3))]
    groups = row_groups([adapters[index] for index in decoding], torch.device("cpu"))
    blocks = [Block(adapters[index], num_rows) for index, num_rows in drawn]
    placed = lay_out(groups, blocks)
    assert sorted(groups.rows) == list(range(len(decoding)))
    spans = [(adapters[index], row, 1) for index, row in zip(decoding, groups.rows, strict=True)]
    spans += [(block.adapter, start, block.num_rows) for block, start in zip(blocks, placed.starts, strict=True)]
    rows = [row for _, start, num_rows in spans for row in range(start, start + num_rows)]
    assert len(set(rows)) == len(rows)
    assert max(rows, default=0) < max(1, placed.num_rows)
    assert placed.num_rows % PACK_MULTIPLE == 0
    assert [s.start for s in placed.segments] == sorted(s.start for s in placed.segments)
    for adapter, start, num_rows in spans:
        over = [s for s in placed.segments if s.start < start + num_rows and s.stop > start]
        assert [s.adapter for s in over] == [] if adapter is None else [adapter]
        assert all(s.start <= start and start + num_rows <= s.stop for s in over)
    assert all(s.start % GROUP_MULTIPLE == s.stop % GROUP_MULTIPLE == 0 for s in placed.prompts)
