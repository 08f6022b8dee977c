"""Attention within packed sequences, the choice of its path, and what flash attention is told about a pack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from treadle.engine import attention
from treadle.engine.attention import (
    AttentionPath,
    PackedCausalAttention,
    VarlenCausalAttention,
    VarlenLayout,
    attention_path,
    packed_attention,
    varlen_layout,
    varlen_options,
)

# Parameters of varlen_attn, by torch version.
TORCH_2_10 = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "return_aux")
TORCH_2_11 = (*TORCH_2_10[:7], "return_aux", "scale", "window_size")
TORCH_2_13 = (*TORCH_2_11, "enable_gqa", "seqused_k", "block_table", "num_splits")


def random_heads(num_rows: int, *, num_heads: int = 4, num_kv_heads: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, num_rows, 8, generator=generator) for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def test_padding_rows_get_zeros_and_sequences_do_not_meet() -> None:
    query, key, value = random_heads(16, num_kv_heads=4)
    packed = PackedCausalAttention([3, 3, 6], 16)
    mixed = packed.attend(0, query, key, value, 0.3)
    assert mixed.shape == (1, 16, 4, 8)
    assert not mixed[:, 12:].any()
    torch.testing.assert_close(mixed[0, 3], value[0, :, 3])
    changed = value.clone()
    changed[:, :, 3:6] += 1
    again = packed.attend(0, query, key, changed, 0.3)
    assert torch.equal(again[:, :3], mixed[:, :3])
    assert torch.equal(again[:, 6:], mixed[:, 6:])
    assert not torch.equal(again[:, 3:6], mixed[:, 3:6])


@pytest.mark.parametrize(
    ("device_type", "dtype", "head_dim", "capability", "parameters", "path"),
    [
        ("cuda", torch.bfloat16, 128, (9, 0), TORCH_2_11, AttentionPath.VARLEN),
        ("cuda", torch.bfloat16, 64, (8, 0), TORCH_2_13, AttentionPath.VARLEN),
        ("cuda", torch.float32, 128, (9, 0), TORCH_2_13, AttentionPath.SDPA),
        ("cuda", torch.bfloat16, 128, (7, 5), TORCH_2_13, AttentionPath.SDPA),
        ("cuda", torch.bfloat16, 512, (9, 0), TORCH_2_13, AttentionPath.SDPA),
        ("cuda", torch.bfloat16, 100, (9, 0), TORCH_2_13, AttentionPath.SDPA),
        ("cuda", torch.bfloat16, 128, (9, 0), TORCH_2_10, AttentionPath.SDPA),
        ("cuda", torch.bfloat16, 128, (9, 0), (), AttentionPath.SDPA),
        ("cuda", torch.bfloat16, 128, None, TORCH_2_13, AttentionPath.SDPA),
        ("cpu", torch.bfloat16, 128, None, TORCH_2_13, AttentionPath.SDPA),
    ],
)
def test_flash_attention_is_used_where_it_can_run(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int] | None,
    parameters: tuple[str, ...],
    path: AttentionPath,
) -> None:
    chosen = attention_path(device_type, dtype, head_dim, capability=capability, varlen_parameters=parameters)
    assert chosen is path


def test_a_cpu_always_takes_sdpa() -> None:
    made = packed_attention([3], 16, device=torch.device("cpu"), dtype=torch.bfloat16, num_heads=4, head_dim=8)
    assert isinstance(made, PackedCausalAttention)


def test_padding_becomes_short_sequences_and_empty_ones_fill_up() -> None:
    layout = varlen_layout([3, 130], 512, min_sequences=8)
    assert layout.boundaries == (0, 3, 133, 261, 389, 512, 512, 512, 512)
    assert layout.max_length == 256
    full = varlen_layout([5, 11], 16, min_sequences=1)
    assert full == VarlenLayout((0, 5, 16), 128)


def test_the_number_of_sequences_never_splits_the_sum_of_a_query_gradient() -> None:
    # flash_api.cpp: nsplits = ceil(multiprocessors / (sequences * heads)); 132 of them on an H200, 32 heads.
    for lengths in ([16], [1] * 16, [8, 8]):
        layout = varlen_layout(lengths, 16, min_sequences=-(-132 // 32))
        num_sequences = len(layout.boundaries) - 1
        assert -(-132 // (num_sequences * 32)) == 1
        assert layout.boundaries[-1] == 16


def test_options_follow_the_installed_signature() -> None:
    assert varlen_options(TORCH_2_11) == {"window_size": (-1, 0)}
    assert varlen_options(TORCH_2_13) == {"window_size": (-1, 0), "enable_gqa": True, "num_splits": 1}


def test_flash_attention_is_told_the_same_problem_that_sdpa_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch's function, which needs a GPU: layouts, boundaries and options, not its arithmetic."""

    def plain(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert cu_seq_q.dtype == torch.int32
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert window_size == (-1, 0), "causal"
        lengths = cu_seq_q.diff()
        assert int(lengths.max()) <= max_q == max_k
        assert int(cu_seq_q[-1]) == query.shape[0], "every row is in a sequence"
        parts: list[Any] = [part.split(lengths.tolist()) for part in (query, key, value)]
        mixed = [
            functional.scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in one), is_causal=True, scale=scale, enable_gqa=enable_gqa
            ).transpose(0, 1)
            for one in zip(*parts, strict=True)
            if len(one[0])
        ]
        return torch.cat(mixed)

    monkeypatch.setattr(attention, "_varlen_attn", lambda: plain)
    lengths = [3, 7, 7, 1]
    query, key, value = random_heads(32)
    varlen = VarlenCausalAttention(varlen_layout(lengths, 32, min_sequences=9), torch.device("cpu"))
    actual = varlen.attend(0, query, key, value, 0.3)
    expected = PackedCausalAttention(lengths, 32).attend(0, query, key, value, 0.3)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual[:, :18], expected[:, :18])
    assert bool(actual.isfinite().all())


def test_the_installed_torch_is_understood() -> None:
    function = attention._varlen_attn()
    assert function is not None
    assert {"scale", "window_size"} <= set(attention._parameters(function))
