"""Shapes in which a tenant's bits once depended on its company, or could: found by a fuzzer, kept as small cases.

Every comparison is bit for bit: each quantum of a mixed pass against the same quantum in a pass of its own.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_builders import load_tiny, make_datum, make_datums, make_model_dir, make_state, quantum_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.domain.losses import LOSSES
from treadle.domain.ops import LoraSpec
from treadle.engine import head
from treadle.engine.attention import PackedCausalAttention
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.passes import QuantumInput, QuantumResult, run_micro_batch


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def every_loss(base: BaseModel, *, seed: int = 0, lengths: Sequence[int] = (33, 1, 1, 18)) -> list[QuantumInput]:
    """A quantum of each loss, of ranks from 1 to 64, at offsets without a common factor; one has target columns."""
    rng = np.random.default_rng(seed)
    ranks = (1, 64, 3, 16, 2, 33, 6)
    quanta = [
        quantum_of(
            make_state(base, LoraSpec(rank=rank, seed=rank, train_attn=rank != 3, train_mlp=rank != 2)),
            make_datums(rng, [length + index for length in lengths], loss, idle=(0.0, 0.4, 0.9)[index % 3]),
            loss,
        )
        for index, (loss, rank) in enumerate(zip(LOSSES, ranks, strict=True))
    ]
    mixed = tuple(make_datum(rng, length, columns=columns) for length, columns in ((7, 3), (12, None), (1, 2)))
    return [*quanta, quantum_of(make_state(base, LoraSpec(rank=5, seed=9)), mixed)]


def passed(base: BaseModel, quanta: Sequence[QuantumInput], **options: Any) -> list[tuple[QuantumResult, Tensor]]:
    """Result and gradient of each, from one pass with fresh scratches."""
    fresh = [replace(quantum, scratch=quantum.state.new_scratch()) for quantum in quanta]
    results = run_micro_batch(base, fresh, **options)
    return [(result, q.scratch.flat) for result, q in zip(results, fresh, strict=True) if q.scratch is not None]


def assert_same(ours: tuple[QuantumResult, Tensor], theirs: tuple[QuantumResult, Tensor]) -> None:
    assert ours[0].failure is None
    assert theirs[0].failure is None
    assert ours[0].metrics == theirs[0].metrics
    for mine, other in zip(ours[0].logprobs, theirs[0].logprobs, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert ours[1].abs().max() > 0
    assert torch.equal(ours[1], theirs[1])


def assert_alone_as_together(base: BaseModel, quanta: Sequence[QuantumInput]) -> None:
    for quantum, together in zip(quanta, passed(base, quanta), strict=True):
        (alone,) = passed(base, [quantum])
        assert_same(alone, together)


@pytest.mark.parametrize("vocab_size", [161, 1_001])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vocabulary_of_odd_size(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    # A row of logits then does not end where the next one may start.
    base = load_tiny(make_model_dir(tmp_path, "qwen3", tied=True, vocab_size=vocab_size), dtype=dtype)
    for seed in range(3):
        assert_alone_as_together(base, every_loss(base, seed=seed))


def test_logits_of_a_sample_with_a_vocabulary_of_odd_size(tmp_path: Path) -> None:
    base = load_tiny(make_model_dir(tmp_path, "qwen3", tied=True, vocab_size=161))
    hidden_TD = torch.randn(64, base.hidden_size, generator=torch.Generator().manual_seed(0))
    logits_TV = head.logits(base, hidden_TD, [])
    assert logits_TV.stride() == (176, 1)
    torch.testing.assert_close(logits_TV, hidden_TD @ base.head_weight_VD.t())


def test_large_vocabulary_has_smaller_pieces(tmp_path: Path) -> None:
    base = load_tiny(make_model_dir(tmp_path, "qwen3", tied=False, vocab_size=65_600, hidden_size=16))
    assert head.piece_rows(base.vocab_size) == 128
    assert_alone_as_together(base, every_loss(base, lengths=(150, 3)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("two_threads")
def test_equal_lengths_with_one_key_head_on_two_threads(dtype: str) -> None:
    """In bfloat16 the gradient of a first row's query is rounding noise around 0, and that noise once moved."""
    generator = torch.Generator().manual_seed(0)
    count, size = 5, 16
    for num_heads, length in ((1, 7), (2, 16), (3, 15), (5, 23)):
        total = count * length
        shapes = [(total, heads, size) for heads in (num_heads, 1, 1, num_heads)]
        parts = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]
        together = attended(parts, [length] * count)
        for index in range(count):
            rows = slice(index * length, (index + 1) * length)
            for whole, alone in zip(together, attended([part[rows] for part in parts], [length]), strict=True):
                assert torch.equal(whole[rows], alone)


def attended(parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Mixed values and the gradients of q, k and v, all [T, H, d]; parts: q, k, v and the gradient of the values."""
    leaves = [part.clone().requires_grad_() for part in parts[:3]]
    views = [leaf.transpose(0, 1).unsqueeze(0) for leaf in leaves]
    mixed = PackedCausalAttention(lengths, len(parts[0])).attend(0, *views, 0.25)
    mixed.backward(parts[3][None])
    return [mixed.detach()[0], *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("sizes", [{"num_experts": 1, "num_experts_per_tok": 1}, {"num_experts": 40}])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_moe_mixed"])
def test_one_expert_and_many(tmp_path: Path, architecture: str, sizes: dict[str, int]) -> None:
    base = load_tiny(make_model_dir(tmp_path, architecture, tied=True, **sizes))
    assert_alone_as_together(base, every_loss(base))


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe_mixed"])
def test_buckets_change_no_bit_on_a_cpu(model_dir_of: Callable[[str, bool], Path], architecture: str) -> None:
    base = load_tiny(model_dir_of(architecture, True))
    profile = base.facts.numerics_profile
    quanta = every_loss(base)
    plain = passed(base, quanta)
    seen: list[int] = []
    handle = base.transformer.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    base.use_buckets((512, 1_024))
    try:
        for ours, theirs in zip(passed(base, quanta), plain, strict=True):
            assert_same(ours, theirs)
        assert base.facts.numerics_profile != profile
    finally:
        handle.remove()
        base.use_buckets(())
    assert seen == [512]
    assert base.facts.numerics_profile == profile


def test_with_buckets_all_products_of_the_head_have_one_size(model_dir_of: Callable[[str, bool], Path]) -> None:
    base = load_tiny(model_dir_of("qwen3", True))
    base.use_buckets((512,))
    with _RowsOfProducts(base.head_weight_VD) as seen:
        run_micro_batch(base, every_loss(base))
    assert seen.rows == {256}
    base.use_buckets(())
    with _RowsOfProducts(base.head_weight_VD) as seen:
        run_micro_batch(base, every_loss(base))
    assert len(seen.rows) > 1


class _RowsOfProducts(TorchDispatchMode):
    """How many rows are multiplied by a frozen weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows: set[int] = set()
        self._address = weight.data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and args[1].data_ptr() == self._address:
            self.rows.add(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", list(Recompute))
def test_a_pass_lets_go_of_its_activations_without_the_collector(base: BaseModel, recompute: Recompute) -> None:
    """Reference cycles would keep them until the next collection: gigabytes, on a GPU."""
    quanta = every_loss(base)
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    gc.collect()
    gc.disable()
    try:
        with _Storages(alive):
            results = run_micro_batch(base, quanta, recompute=recompute)
        assert len(alive) > 100
        assert sum(storage() is not None for storage in alive) == 0
        assert len(results) == len(quanta)
    finally:
        gc.enable()


class _Storages(TorchDispatchMode):
    """Weak references to the memory of every tensor that an operation returns, but for what was there before."""

    def __init__(self, seen: list[weakref.ref[torch.UntypedStorage]]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._seen.append(weakref.ref(tensor.untyped_storage()))
        return result
