"""Attention over a packed batch: the seam between the base model's layers and whoever owns keys and values.

Training attends within each packed sequence without a cache; sampling brings its own `Attention` with cached keys.
On a CPU, and on a GPU in float32, sequences go through SDPA; on a GPU in bfloat16 one call of torch's variable-length
flash attention takes them all. Nothing here knows adapters or losses.
State: the variable-length path has not been run on a GPU yet; its choice and its metadata are tested on a CPU.
Invariant: the rows of a sequence depend on that sequence alone, bit for bit, whatever else is in the pack. (On a GPU
that needs strict.enable_strict for the backward, and is measured there.)

Legend: T tokens of the packed batch, H query heads, K key and value heads, d size of a head, N sequences of
one length L.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

# What flash attention computes in, and the sizes of heads that it has kernels for.
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_MAX_FLASH_HEAD_DIM = 256
_MIN_FLASH_CAPABILITY = (8, 0)
# Padding is cut into sequences of this many rows: each row must be written, and long ones would cost their square.
_PADDING_PIECE = 128
# Longest-sequence bounds are rounded up to this, so that they do not name the neighbours' lengths. It only sizes
# grids; above 1 it also keeps flash attention from its rearrangement for single queries.
_LENGTH_MULTIPLE = 128


class Attention(Protocol):
    """Who attends to what in one pass. One instance serves every layer of that pass, in layer order."""

    def attend(
        self, layer_index: int, query_1HTd: Tensor, key_1KTd: Tensor, value_1KTd: Tensor, scaling: float
    ) -> Tensor:
        """The mixed values [1, T, H, d] of every row; rows that belong to nobody must be finite (zeros).

        Rotary embeddings are already applied. `scaling` multiplies the scores before the softmax.
        """
        ...


class AttentionPath(StrEnum):
    """How a packed batch is attended to; part of the numerics profile."""

    SDPA = "sdpa"
    VARLEN = "varlen"


def attention_path(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    capability: tuple[int, int] | None,
    varlen_parameters: Collection[str],
) -> AttentionPath:
    """Variable-length flash attention where it can run, SDPA elsewhere. A pure function of the arguments.

    capability: of the CUDA device, None for others. varlen_parameters: names that the installed torch's varlen_attn
    takes, empty where there is none. Before torch 2.11 it takes no scale; that one is not used.
    """
    is_usable = (
        device_type == "cuda"
        and capability is not None
        and capability >= _MIN_FLASH_CAPABILITY
        and dtype in _FLASH_DTYPES
        and head_dim % 8 == 0
        and head_dim <= _MAX_FLASH_HEAD_DIM
        and {"scale", "window_size"} <= set(varlen_parameters)
    )
    return AttentionPath.VARLEN if is_usable else AttentionPath.SDPA


def device_attention_path(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionPath:
    """attention_path for what is installed here."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return attention_path(
        device.type,
        dtype,
        head_dim,
        capability=torch.cuda.get_device_capability(device) if is_nvidia else None,
        varlen_parameters=_parameters(_varlen_attn()),
    )


def packed_attention(
    sequence_lengths: Sequence[int],
    num_rows: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    head_dim: int,
) -> Attention:
    """Causal attention within each packed sequence, by the path that fits the device; built once per pass.

    Sequences lie one after another from row 0, without holes; rows behind the last one are padding.
    """
    if device_attention_path(device, dtype, head_dim) is AttentionPath.SDPA:
        return PackedCausalAttention(sequence_lengths, num_rows)
    num_units = torch.cuda.get_device_properties(device).multi_processor_count
    layout = varlen_layout(sequence_lengths, num_rows, min_sequences=-(-num_units // num_heads))
    return VarlenCausalAttention(layout, device)


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """Sequences of a pack as flash attention wants them.

    boundaries: rows at which sequences start, and the end. max_length: at least the longest one.
    """

    boundaries: tuple[int, ...]
    max_length: int


def varlen_layout(sequence_lengths: Sequence[int], num_rows: int, *, min_sequences: int) -> VarlenLayout:
    """The pack's sequences, its padding as further ones, and empty ones up to min_sequences.

    Deterministic flash attention splits the sum of d query over ceil(multiprocessors / (sequences * heads)) parts, so
    its bits depend on the number of neighbours until that is 1; source: mha_varlen_bwd in flash_api.cpp of
    FlashAttention 2. Empty sequences cost their grid entries only.
    """
    assert all(length > 0 for length in sequence_lengths), "an empty sequence has no rows"
    num_padding = num_rows - sum(sequence_lengths)
    assert num_padding >= 0, "more tokens than rows"
    padding = [min(_PADDING_PIECE, num_padding - start) for start in range(0, num_padding, _PADDING_PIECE)]
    lengths = [*sequence_lengths, *padding]
    lengths += [0] * (min_sequences - len(lengths))
    longest = -(-max(lengths) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    return VarlenLayout(tuple(accumulate(lengths, initial=0)), longest)


class VarlenCausalAttention:
    """Causal attention within each packed sequence by one call of torch's varlen_attn.

    Its backward is deterministic under torch.use_deterministic_algorithms. Padding rows attend to padding, and get
    finite values.
    """

    def __init__(self, layout: VarlenLayout, device: torch.device) -> None:
        self._varlen_attn = _varlen_attn()
        assert self._varlen_attn is not None, "attention_path says when this can be used"
        self._options = varlen_options(_parameters(self._varlen_attn))
        self._boundaries = torch.tensor(layout.boundaries, dtype=torch.int32).to(device)
        self._max_length = layout.max_length

    def attend(
        self, layer_index: int, query_1HTd: Tensor, key_1KTd: Tensor, value_1KTd: Tensor, scaling: float
    ) -> Tensor:
        """See Attention.attend."""
        assert self._varlen_attn is not None
        mixed_THd: Tensor = self._varlen_attn(
            *(part.squeeze(0).transpose(0, 1) for part in (query_1HTd, key_1KTd, value_1KTd)),
            self._boundaries,
            self._boundaries,
            self._max_length,
            self._max_length,
            scale=scaling,
            **self._options,
        )
        return mixed_THd.unsqueeze(0)


def varlen_options(parameters: Collection[str]) -> dict[str, Any]:
    """Options for varlen_attn, by what the installed one takes.

    Before 2.12 it has no enable_gqa and checks no numbers of heads: flash attention groups them by itself. num_splits
    (2.12) is documented as what makes a sequence's bits independent of the batch; before, it never splits packed keys.
    """
    wanted: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True, "num_splits": 1}
    return {name: value for name, value in wanted.items() if name in parameters}


def _varlen_attn() -> Callable[..., Tensor] | None:
    """torch's varlen_attn, or None before 2.10."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    function: Callable[..., Tensor] = module.varlen_attn
    return function


def _parameters(function: Callable[..., Any] | None) -> tuple[str, ...]:
    return () if function is None else tuple(inspect.signature(function).parameters)


class PackedCausalAttention:
    """Causal attention within each packed sequence by SDPA, one call per run of equal lengths.

    Sequences lie one after another from row 0, without holes; rows behind the last one are padding and get zeros.
    In float32 neighbouring sequences of equal length share one call, which keeps the bits (tests/numerics says so).
    Below float32 it does not: with one key head and two threads d query of the first row then depends on how many
    share it (measured, torch 2.13); so each has its own.
    """

    def __init__(self, sequence_lengths: Sequence[int], num_rows: int) -> None:
        assert all(length > 0 for length in sequence_lengths), "an empty sequence has no rows"
        num_padding = num_rows - sum(sequence_lengths)
        assert num_padding >= 0, "more tokens than rows"
        self._runs = _runs_of_equal_length(sequence_lengths)
        self._single_runs = [(1, length) for length in sequence_lengths]
        self._num_padding = num_padding

    def attend(
        self, layer_index: int, query_1HTd: Tensor, key_1KTd: Tensor, value_1KTd: Tensor, scaling: float
    ) -> Tensor:
        """See Attention.attend."""
        num_groups = query_1HTd.shape[1] // key_1KTd.shape[1]
        runs = self._runs if query_1HTd.dtype == torch.float32 else self._single_runs
        sizes = [count * length for count, length in runs]
        if self._num_padding:
            sizes.append(self._num_padding)
        # Splitting once makes the backward one concatenation; slicing would make one full-size zero tensor per slice.
        queries = torch.split(query_1HTd, sizes, dim=2)
        keys = torch.split(key_1KTd, sizes, dim=2)
        values = torch.split(value_1KTd, sizes, dim=2)
        mixed = []
        for index, (count, length) in enumerate(runs):
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
