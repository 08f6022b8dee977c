"""One immutable file for snapshots, training checkpoints and sampler weights, and its export for peft and vLLM.

A file is safetensors bytes: the adapter under PEFT's tensor names, optionally AdamW's moments and the open gradient
as flat arenas, and a header (JSON in the safetensors metadata) that says what they belong to. Nothing here does
I/O. A file for another base model, revision or shape is refused with both sides named, never adapted.
Invariant: decode(encode(state)) is the same state, bit for bit; a file in which a bit has changed is refused.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.domain.adapter_file import CONFIG_NAME, METADATA_KEY, TENSOR_PREFIX, WEIGHTS_NAME, config_file
from treadle.domain.ops import LoraSpec
from treadle.engine import peft_export
from treadle.engine.adapter import AdapterWeights, adapter_layout
from treadle.engine.base_model import BaseModel
from treadle.engine.state import TrainingState, placed_state
from treadle.errors import InvalidRequest

# 2: the arenas of moments and gradient hold the A's of a group side by side. 3: a checksum over header and tensors.
FORMAT_VERSION = 3
_WITHOUT_CHECKSUM = 2
# Among the header's fields: safetensors writes several metadata keys in an order of chance.
_CHECKSUM_FIELD = "crc32"
_EXP_AVG = "treadle.exp_avg"
_EXP_AVG_SQ = "treadle.exp_avg_sq"
_GRADS = "treadle.grads"
_HEADER_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What a file says about itself. applied_seq: the newest seq_id in it. adapter_config: peft's, complete."""

    format_version: int
    base_model: str
    revision: str
    lora: LoraSpec
    step: int
    num_open_passes: int
    applied_seq: int
    has_optimizer: bool
    numerics_profile: str
    adapter_config: Mapping[str, Any]


def encode_state(state: TrainingState, base: BaseModel, *, with_optimizer: bool, applied_seq: int) -> bytes:
    """The file of a run: with_optimizer True holds all its future depends on, False its weights alone.

    Copies everything to the host; later training does not change what was returned.
    """
    header = FileHeader(
        format_version=FORMAT_VERSION,
        base_model=base.facts.base_model,
        revision=base.facts.revision,
        lora=state.spec,
        step=state.step,
        num_open_passes=state.num_open_passes,
        applied_seq=applied_seq,
        has_optimizer=with_optimizer,
        numerics_profile=base.facts.numerics_profile,
        adapter_config=peft_export.adapter_config(state.layout, state.spec, base.facts.base_model),
    )
    flat = state.weights.flat.cpu().numpy()
    tensors = {one.name: one.view.reshape(one.shape) for one in peft_export.named_tensors(state.layout, flat)}
    if with_optimizer:
        tensors[_EXP_AVG] = state.exp_avg.cpu().numpy()
        tensors[_EXP_AVG_SQ] = state.exp_avg_sq.cpu().numpy()
        if state.grads is not None:
            tensors[_GRADS] = state.grads.flat.cpu().numpy()
    # safetensors writes memory as it lies, so transposed views must be laid out first.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return _file_of(asdict(header), tensors)


def _file_of(header: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    fields = {**header, _CHECKSUM_FIELD: _checksum(header, tensors)}
    return safetensors.numpy.save(dict(tensors), {METADATA_KEY: json.dumps(fields, sort_keys=True)})


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """CRC-32 of the header and of the tensors in the order of their names: it is for damage, not for malice."""
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].data.cast("B"), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def decode_state(data: bytes, base: BaseModel, *, with_optimizer: bool = True) -> TrainingState:
    """The run of a file, in a slot of the base model's arenas.

    with_optimizer False takes the weights alone and starts moments, step count and gradient afresh.
    Raises InvalidRequest when the file is malformed, was made for another base model, revision or shape, or lacks
    the optimiser's state that is asked for.
    """
    header, tensors = _read(data)
    weights = _weights_of(header, tensors, base)
    if not with_optimizer:
        return placed_state(base, header.lora, weights)
    if not header.has_optimizer:
        raise InvalidRequest("the checkpoint holds weights only, no optimizer state; load it without the optimizer")
    return placed_state(
        base,
        header.lora,
        weights,
        exp_avg=_flat_of(tensors, _EXP_AVG, len(weights)),
        exp_avg_sq=_flat_of(tensors, _EXP_AVG_SQ, len(weights)),
        grads=_flat_of(tensors, _GRADS, len(weights)) if _GRADS in tensors else None,
        step=header.step,
        num_open_passes=header.num_open_passes,
    )


def decode_weights(data: bytes, base: BaseModel) -> AdapterWeights:
    """The adapter of a file, on the base model's device, for sampling. Raises as decode_state."""
    header, tensors = _read(data)
    flat = _weights_of(header, tensors, base).to(base.device)
    return AdapterWeights(adapter_layout(base.groups, header.lora), flat, header.lora.alpha / header.lora.rank)


def read_header(data: bytes) -> FileHeader:
    """What a file says about itself. Raises InvalidRequest when it is not one of ours."""
    try:
        fields = _fields(data)
        version = fields["format_version"]
        if version not in (FORMAT_VERSION, _WITHOUT_CHECKSUM):
            raise InvalidRequest(f"checkpoint format {version!r} is not known; this server reads {FORMAT_VERSION}")
        if version != _WITHOUT_CHECKSUM:
            del fields[_CHECKSUM_FIELD]
        return FileHeader(**{**fields, "lora": LoraSpec(**fields["lora"])})
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("the file is not a treadle checkpoint: its header cannot be read") from error


def _fields(data: bytes) -> dict[str, Any]:
    """The header as it is written. Raises ValueError, KeyError or TypeError when there is none."""
    start = _HEADER_LENGTH_BYTES
    length = int.from_bytes(data[:start], "little")
    fields: dict[str, Any] = json.loads(json.loads(data[start : start + length])["__metadata__"][METADATA_KEY])
    return fields


def export_peft(data: bytes) -> dict[str, bytes]:
    """The files of an ordinary PEFT adapter by name: adapter_config.json and adapter_model.safetensors."""
    header, tensors = _read(data)
    return _adapter_files(header.adapter_config, _adapter_of(tensors))


def export_vllm(data: bytes) -> dict[str, bytes]:
    """The same for vLLM, which wants the tensors of experts one by one; equal to `export_peft` without experts."""
    header, tensors = _read(data)
    apart = peft_export.vllm_tensors(_adapter_of(tensors), header.lora.rank)
    return _adapter_files(peft_export.vllm_config(header.adapter_config), apart)


def export_state(state: TrainingState, base: BaseModel) -> dict[str, bytes]:
    """`export_peft` of a run as it is now, without the file between them."""
    flat = state.weights.flat.cpu().numpy()
    tensors = {one.name: one.view.reshape(one.shape) for one in peft_export.named_tensors(state.layout, flat)}
    return _adapter_files(peft_export.adapter_config(state.layout, state.spec, base.facts.base_model), tensors)


def _adapter_of(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    return {name: array for name, array in tensors.items() if name.startswith(TENSOR_PREFIX)}


def _adapter_files(config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, bytes]:
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return {
        CONFIG_NAME: config_file(config),
        WEIGHTS_NAME: safetensors.numpy.save(contiguous, {"format": "pt"}),
    }


def _read(data: bytes) -> tuple[FileHeader, dict[str, NDArray[np.float32]]]:
    header = read_header(data)
    try:
        tensors = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise InvalidRequest("the checkpoint is damaged: its tensors cannot be read") from error
    if header.format_version != _WITHOUT_CHECKSUM:
        fields = _fields(data)
        if fields.pop(_CHECKSUM_FIELD) != _checksum(fields, tensors):
            raise InvalidRequest("the checkpoint is damaged: its checksum does not match")
    return header, tensors


def _weights_of(header: FileHeader, tensors: Mapping[str, NDArray[np.float32]], base: BaseModel) -> Tensor:
    """The adapter's flat arena, on the host."""
    for what, theirs, ours in (
        ("base model", header.base_model, base.facts.base_model),
        ("base model revision", header.revision, base.facts.revision),
    ):
        if theirs != ours:
            raise InvalidRequest(f"the checkpoint was made for {what} {theirs!r}, this one is {ours!r}")
    layout = adapter_layout(base.groups, header.lora)
    flat = np.zeros(layout.num_elements, dtype=np.float32)
    found = _adapter_of(tensors)
    expected = {one.name: one for one in peft_export.named_tensors(layout, flat)}
    if found.keys() != expected.keys():
        odd = ", ".join(sorted(found.keys() ^ expected.keys())[:3])
        raise InvalidRequest(f"the checkpoint's tensors are not those of its LoRA settings; differing: {odd}")
    for name, one in expected.items():
        array = found[name]
        if array.shape != one.shape or array.dtype != np.float32:
            raise InvalidRequest(
                f"checkpoint tensor {name} is {array.dtype} {list(array.shape)}; "
                f"rank {header.lora.rank} on this base model needs float32 {list(one.shape)}"
            )
        one.view[...] = array.reshape(one.view.shape)
    return torch.from_numpy(flat)


def _flat_of(tensors: Mapping[str, NDArray[np.float32]], name: str, num_elements: int) -> Tensor:
    array = tensors.get(name)
    if array is None or array.shape != (num_elements,) or array.dtype != np.float32:
        seen = "absent" if array is None else f"{array.dtype} {list(array.shape)}"
        raise InvalidRequest(f"checkpoint tensor {name} is {seen}; expected float32 [{num_elements}]")
    return torch.from_numpy(array)
