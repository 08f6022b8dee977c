"""What a pass costs in memory, measured on the loaded model, and how many tokens of it the device has room for.

A few tokens really run, forward and backward, at two sizes per recompute mode; the difference is the cost per token.
On a GPU the allocator tells the peak; on a CPU every tensor that is made is counted while it lives, so the figure is
exact and does not move with what else the machine does. This module decides no packing and retries nothing.
Invariant: limits never change numbers, only how quanta share passes and what a backward computes twice.

The GPU side has not run on a GPU yet: it uses torch.cuda.max_memory_allocated and mem_get_info as documented.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # documented for extenders; there is no public name

from treadle.domain.limits import PACK_MULTIPLE
from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import AdapterArena, AdapterWeights, adapter_layout
from treadle.engine.attention import PackedCausalAttention
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.head import piece_rows
from treadle.engine.kernels.base import LoraSegment

# Tokens of the two measured passes. A CPU's count is exact at any size, and small ones keep the start short; a GPU's
# allocator rounds, so its passes are larger.
_PROBE_TOKENS_CPU = (PACK_MULTIPLE, 2 * PACK_MULTIPLE)
_PROBE_TOKENS_GPU = (256, 1_024)
# What x A^T keeps grows with the rank, but is percents of the rest; the margin below covers it.
_PROBE_RANK = 8
# Head inputs, allocator rounding, fragmentation, ranks above the probe's.
_MARGIN = 1.15
# The share of the memory found free after loading that passes may take. The rest is for runs, their gradients,
# published versions, the sampler's cache, and on a CPU for everybody else on the machine.
_GPU_SHARE = 0.6
_CPU_SHARE = 0.25
# On a CPU nobody owns the memory alone: two workers on a laptop with much of it free must not fight for it.
_MAX_CPU_ROOM_BYTES = 2 * 2**30
# Packs of several quanta stay below these, whatever room there is: beyond some hundred tokens a CPU gains nothing
# from a longer pack, and a GPU nothing beyond some thousand, but both hold its activations.
_MAX_CPU_PACK_BYTES = 512 * 2**20
_MAX_GPU_PACK_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class PassCost:
    """Bytes of one recorded pass at its peak: fixed_bytes + tokens * bytes_per_token[mode]."""

    bytes_per_token: Mapping[Recompute, float]
    fixed_bytes: int

    def num_bytes(self, num_tokens: int, recompute: Recompute) -> int:
        """The peak of a pass of this many tokens, above what is there without it."""
        return self.fixed_bytes + int(num_tokens * self.bytes_per_token[recompute])

    def num_tokens(self, room_bytes: int, recompute: Recompute) -> int:
        """Tokens of the largest pass that stays within the room; never less than one row block."""
        fitting = int((room_bytes - self.fixed_bytes) / self.bytes_per_token[recompute])
        return max(PACK_MULTIPLE, fitting // PACK_MULTIPLE * PACK_MULTIPLE)


@dataclass(frozen=True, slots=True)
class PassLimits:
    """Tokens of one pass: several quanta together up to `packed`; one quantum alone up to the limit of each mode.

    none: nothing is computed twice. selective, full: with recompute (see Recompute). A quantum over `full` does not
    fit at all.
    """

    packed: int
    none: int
    selective: int
    full: int

    def __post_init__(self) -> None:
        assert 0 <= self.packed <= self.none <= self.selective <= self.full, self

    def mode_of(self, num_tokens: int) -> Recompute:
        """The weakest recompute with which a pass of this many tokens fits."""
        if num_tokens <= self.none:
            return Recompute.NONE
        return Recompute.SELECTIVE if num_tokens <= self.selective else Recompute.FULL

    def below(self, num_tokens: int, num_quanta: int) -> PassLimits:
        """Limits under which a pass of this many tokens in `num_quanta` quanta, which did not fit, is not tried again.

        Several quanta: packs shrink to half of it. One quantum: its mode's limit falls below it, so that the next
        try recomputes more. `full` stays: what is refused for good must not depend on one bad moment.
        """
        if num_quanta > 1:
            return replace(self, packed=min(self.packed, num_tokens // 2))
        limit = min(num_tokens - 1, num_tokens * 7 // 8)
        match self.mode_of(num_tokens):
            case Recompute.NONE:
                return replace(self, packed=min(self.packed, limit), none=limit)
            case Recompute.SELECTIVE:
                return replace(self, packed=min(self.packed, limit), none=min(self.none, limit), selective=limit)
            case Recompute.FULL:
                return self
            case mode:
                assert_never(mode)

    def towards(self, lower: PassLimits) -> PassLimits:
        """These limits, lowered to `lower`, but none to less than its half.

        One pass that did not fit says little when memory was taken by something else at that moment: a worker that
        believed it would recompute everything for the rest of its life.
        """
        return PassLimits(
            packed=max(lower.packed, self.packed // 2),
            none=max(lower.none, self.none // 2),
            selective=max(lower.selective, self.selective // 2),
            full=self.full,
        )


def pass_limits(base: BaseModel, cost: PassCost, *, micro_batch_tokens: int = 0) -> PassLimits:
    """Limits from the memory that is free now, after loading; micro_batch_tokens > 0 sets the packs' instead.

    Then a pack is as long as asked, and tried without recompute, whatever was measured.
    """
    room_bytes = _room_bytes(base.device)
    none, selective, full = (cost.num_tokens(room_bytes, mode) for mode in Recompute)
    if micro_batch_tokens:
        packed, none = micro_batch_tokens, max(none, micro_batch_tokens)
    elif base.device.type == "cpu":
        packed = min(none, cost.num_tokens(min(room_bytes, _MAX_CPU_PACK_BYTES), Recompute.NONE))
    else:
        packed = min(none, _MAX_GPU_PACK_TOKENS)
    selective = max(none, selective)
    return PassLimits(packed=packed, none=none, selective=selective, full=max(selective, full))


def measure_pass_cost(base: BaseModel) -> PassCost:
    """Run small passes of a throw-away adapter in every mode; what they cost. Leaves no trace but a warm allocator."""
    layout = adapter_layout(base.groups, LoraSpec(rank=_PROBE_RANK, seed=0))
    flat = torch.zeros(layout.num_elements, dtype=torch.float32, device=base.device)
    weights = AdapterWeights(layout, flat, 1.0)
    grads = AdapterArena(layout, torch.zeros_like(flat))
    fewer, more = _PROBE_TOKENS_CPU if base.device.type == "cpu" else _PROBE_TOKENS_GPU
    if base.device.type != "cpu":
        _run_trunk(
            base, LoraSegment(weights, 0, fewer, grads), Recompute.NONE
        )  # libraries take their workspaces on first use
    per_token = {}
    for mode in Recompute:
        peaks = []
        for num_tokens in (fewer, more):
            with _peak_bytes(base.device) as peak:
                _run_trunk(base, LoraSegment(weights, 0, num_tokens, grads), mode)
            peaks.append(peak.num_bytes)
        assert peaks[1] > peaks[0] > 0, "a longer pass takes more memory"
        per_token[mode] = _MARGIN * (peaks[1] - peaks[0]) / (more - fewer)
    return PassCost(per_token, fixed_bytes=_head_bytes(base) + _expert_padding_bytes(base))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the device or on the host, and nothing worse.

    torch has a class for the GPU's allocator only; its CPU allocator and the CUDA libraries raise RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error).lower()
    return any(sign in message for sign in _OUT_OF_MEMORY_SIGNS)


_OUT_OF_MEMORY_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process could still take: the machine's, or less where a control group (v1 or v2) says so.

    Page cache that the kernel would give back counts as available. Where nothing tells: half of physical memory.
    """
    found = [*_machine_bytes(root), *_cgroup_bytes(root)]
    if not found:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min(found))


def _run_trunk(base: BaseModel, segment: LoraSegment, mode: Recompute) -> None:
    """One sequence through all layers and back. The head is not part of it: its memory does not grow with tokens."""
    num_tokens = segment.stop
    tokens_T = torch.zeros(num_tokens, dtype=torch.int64, device=base.device)
    positions_T = torch.arange(num_tokens, device=base.device)
    with torch.enable_grad():
        hidden_TD = base.forward_hidden(
            tokens_T,
            positions_T,
            attention=PackedCausalAttention([num_tokens], num_tokens),
            segments=[segment],
            recompute=mode,
        )
        hidden_TD.backward(torch.zeros_like(hidden_TD))  # type: ignore[no-untyped-call]  # torch types it as untyped


def _head_bytes(base: BaseModel) -> int:
    """The head's float32 logits of one group of rows, and what it casts of them below float32."""
    cast_bytes = 0 if base.dtype == torch.float32 else base.dtype.itemsize
    return piece_rows(base.vocab_size) * base.vocab_size * (torch.float32.itemsize + cast_bytes)


def _expert_padding_bytes(base: BaseModel) -> int:
    """The most that padding each expert's rows can add, read and written side; the probe sends all rows to a few."""
    num_rows = PACK_MULTIPLE - 1
    return sum(
        group.num_experts * num_rows * (group.in_features + group.out_features) * base.dtype.itemsize
        for group in base.groups
    )


def _room_bytes(device: torch.device) -> int:
    """What passes may take of the memory that is free now."""
    if device.type == "cpu":
        return min(int(_CPU_SHARE * available_host_bytes()), _MAX_CPU_ROOM_BYTES)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(_GPU_SHARE * free)


@dataclass(slots=True)
class _Peak:
    num_bytes: int = 0


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator[_Peak]:
    """The most bytes that tensors made in the block took at one time, known when it ends."""
    peak = _Peak()
    if device.type == "cpu":
        with _LiveTensors() as live:
            yield peak
        peak.num_bytes = live.peak_bytes
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield peak
    torch.cuda.synchronize(device)
    peak.num_bytes = torch.cuda.max_memory_allocated(device) - before


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types it as untyped
    """Counts the bytes of storages made while it is active, in forward and backward, for as long as they live.

    What a kernel takes and gives back within one call is not seen; torch's CPU kernels take little.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch types it as untyped
        self.peak_bytes = 0
        self._live_bytes = 0
        # By address; the references tell when a storage goes.
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors_in(result):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            # Views and results written in place are not new, whether the memory is ours or was there before.
            if address not in self._live and address not in _addresses_in((args, kwargs)):
                self._book(storage, address, storage.nbytes())
        return result

    def _book(self, storage: torch.UntypedStorage, address: int, num_bytes: int) -> None:
        def freed(_: object) -> None:
            self._live_bytes -= num_bytes
            del self._live[address]

        self._live[address] = weakref.ref(storage, freed)
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)


def _addresses_in(value: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors_in(value)}


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors_in(part)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


def _machine_bytes(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroup_bytes(root: Path) -> Iterator[int]:
    """Limit minus use of this process's groups and all groups above them."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = ("memory.max", "memory.current", "inactive_file")
            mount = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, which is not there; its own group is then the mount itself.
        for directory in {group, *(parent for parent in group.parents if parent.is_relative_to(mount))}:
            yield from _group_bytes(directory, *files)


def _group_bytes(directory: Path, limit_file: str, usage_file: str, cache_key: str) -> Iterator[int]:
    limit, usage = _number(directory / limit_file), _number(directory / usage_file)
    if limit is None or usage is None:
        return
    cache = next((int(x.split()[1]) for x in _lines(directory / "memory.stat") if x.split()[0] == cache_key), 0)
    yield limit - usage + cache


def _number(path: Path) -> int | None:
    """The number in a one-line file; None when there is no file, or no number ("max": unlimited)."""
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
