"""One immutable file for snapshots, training checkpoints and sampler weights, and its export for peft.

A file is safetensors bytes: the adapter under PEFT's tensor names, optionally AdamW's moments and the open gradient
as flat arenas, and a header (JSON in the safetensors metadata) that says what they belong to. Nothing here does
I/O. A file for another base model, revision or shape is refused with both sides named, never adapted.
Invariant: decode(encode(state)) is the same state, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import (
    ATTENTION_PROJECTIONS,
    HEAD_MODULE,
    MLP_PROJECTIONS,
    AdapterArena,
    AdapterLayout,
    AdapterWeights,
    TrainingState,
    adapter_layout,
)
from treadle.engine.base_model import BaseModel
from treadle.errors import InvalidRequest

FORMAT_VERSION = 1
_METADATA_KEY = "treadle"
_PEFT_PREFIX = "base_model.model."
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
        adapter_config=peft_adapter_config(state.spec, base),
    )
    tensors = _named_tensors(state.layout, state.weights.flat.cpu().numpy())
    if with_optimizer:
        tensors[_EXP_AVG] = state.exp_avg.cpu().numpy()
        tensors[_EXP_AVG_SQ] = state.exp_avg_sq.cpu().numpy()
        if state.grads is not None:
            tensors[_GRADS] = state.grads.flat.cpu().numpy()
    # safetensors writes memory as it lies, so transposed views must be laid out first.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return safetensors.numpy.save(tensors, {_METADATA_KEY: json.dumps(asdict(header), sort_keys=True)})


def decode_state(data: bytes, base: BaseModel, *, with_optimizer: bool = True) -> TrainingState:
    """The run of a file, on the base model's device.

    with_optimizer False takes the weights alone and starts moments, step count and gradient afresh.
    Raises InvalidRequest when the file is malformed, was made for another base model, revision or shape, or lacks
    the optimiser's state that is asked for.
    """
    header, tensors = _read(data)
    weights = _weights_of(header, tensors, base)
    state = TrainingState(
        spec=header.lora,
        weights=weights,
        exp_avg=torch.zeros_like(weights.flat),
        exp_avg_sq=torch.zeros_like(weights.flat),
    )
    if not with_optimizer:
        return state
    if not header.has_optimizer:
        raise InvalidRequest("the checkpoint holds weights only, no optimizer state; load it without the optimizer")
    state.exp_avg = _flat_of(tensors, _EXP_AVG, state.layout, base.device)
    state.exp_avg_sq = _flat_of(tensors, _EXP_AVG_SQ, state.layout, base.device)
    if _GRADS in tensors:
        state.grads = AdapterArena(state.layout, _flat_of(tensors, _GRADS, state.layout, base.device))
    state.step = header.step
    state.num_open_passes = header.num_open_passes
    return state


def decode_weights(data: bytes, base: BaseModel) -> AdapterWeights:
    """The adapter of a file, on the base model's device, for sampling. Raises as decode_state."""
    header, tensors = _read(data)
    return _weights_of(header, tensors, base)


def read_header(data: bytes) -> FileHeader:
    """What a file says about itself. Raises InvalidRequest when it is not one of ours."""
    start = _HEADER_LENGTH_BYTES
    length = int.from_bytes(data[:start], "little")
    try:
        metadata = json.loads(data[start : start + length])["__metadata__"]
        fields = json.loads(metadata[_METADATA_KEY])
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise InvalidRequest(f"checkpoint format {version!r} is not known; this server reads {FORMAT_VERSION}")
        return FileHeader(**{**fields, "lora": LoraSpec(**fields["lora"])})
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("the file is not a treadle checkpoint: its header cannot be read") from error


def export_peft(data: bytes) -> dict[str, bytes]:
    """The files of an ordinary PEFT adapter by name: adapter_config.json and adapter_model.safetensors."""
    header, tensors = _read(data)
    adapter = {name: array for name, array in tensors.items() if name.startswith(_PEFT_PREFIX)}
    return {
        "adapter_config.json": (json.dumps(header.adapter_config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": safetensors.numpy.save(adapter, {"format": "pt"}),
    }


def peft_adapter_config(spec: LoraSpec, base: BaseModel) -> dict[str, Any]:
    """adapter_config.json for this adapter; target_modules is always written, the base by its stable name."""
    targets: list[str] = []
    for is_trained, leaves in (
        (spec.train_attn, ATTENTION_PROJECTIONS),
        (spec.train_mlp, MLP_PROJECTIONS),
        (spec.train_unembed, (HEAD_MODULE,)),
    ):
        if is_trained:
            targets.extend(leaves)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.facts.base_model,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "auto_mapping": None,
    }


def _named_tensors(layout: AdapterLayout, flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Views of the arena as peft shapes them: A [R, I], B [O, R]."""
    named = {}
    for place in layout.places:
        rows, columns = place.shape
        view = flat[place.offset : place.offset + rows * columns].reshape(rows, columns)
        named[_peft_name(place.module, place.which)] = view if place.which == "A" else view.T
    return named


def _peft_name(module: str, which: str) -> str:
    return f"{_PEFT_PREFIX}{module}.lora_{which}.weight"


def _read(data: bytes) -> tuple[FileHeader, dict[str, NDArray[np.float32]]]:
    header = read_header(data)
    try:
        return header, safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise InvalidRequest("the checkpoint is damaged: its tensors cannot be read") from error


def _weights_of(header: FileHeader, tensors: Mapping[str, NDArray[np.float32]], base: BaseModel) -> AdapterWeights:
    for what, theirs, ours in (
        ("base model", header.base_model, base.facts.base_model),
        ("base model revision", header.revision, base.facts.revision),
    ):
        if theirs != ours:
            raise InvalidRequest(f"the checkpoint was made for {what} {theirs!r}, this one is {ours!r}")
    layout = adapter_layout(base.projections, header.lora)
    flat = np.zeros(layout.num_elements, dtype=np.float32)
    found = {name for name in tensors if name.startswith(_PEFT_PREFIX)}
    views = _named_tensors(layout, flat)
    if found != views.keys():
        odd = ", ".join(sorted(found ^ views.keys())[:3])
        raise InvalidRequest(f"the checkpoint's tensors are not those of its LoRA settings; differing: {odd}")
    for name, view in views.items():
        if tensors[name].shape != view.shape or tensors[name].dtype != np.float32:
            raise InvalidRequest(
                f"checkpoint tensor {name} is {tensors[name].dtype} {list(tensors[name].shape)}; "
                f"rank {header.lora.rank} on this base model needs float32 {list(view.shape)}"
            )
        view[...] = tensors[name]
    return AdapterWeights(layout, torch.from_numpy(flat).to(base.device), header.lora.alpha / header.lora.rank)


def _flat_of(
    tensors: Mapping[str, NDArray[np.float32]], name: str, layout: AdapterLayout, device: torch.device
) -> torch.Tensor:
    array = tensors.get(name)
    if array is None or array.shape != (layout.num_elements,) or array.dtype != np.float32:
        seen = "absent" if array is None else f"{array.dtype} {list(array.shape)}"
        raise InvalidRequest(f"checkpoint tensor {name} is {seen}; expected float32 [{layout.num_elements}]")
    return torch.from_numpy(array.copy()).to(device)
