"""Adapters under the names, shapes and settings that peft and vLLM read. It knows no files' headers and no training.

peft keeps the experts of a layer in two nested wrappers of one module: the outer one adapts `down_proj` and has the
module's name, the inner one adapts `gate_up_proj` and has `.base_layer` behind it. A lies as ours does, [E * R, I];
column r * E + e of its B [O, R * E] is column r of expert e's. Source: peft 0.21, ParamWrapper.
vLLM reads experts one by one, gate and up apart. Source: its LoRA loader, as published; vLLM itself was not run on
these files. The tests merge them by hand and read them with peft, which knows that form from older transformers.
Invariant: names and values are the adapter's own; nothing is merged, split or cast on the way but what is said here.

Legend: E experts, R rank, I inputs, O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.domain.adapter_file import TENSOR_PREFIX
from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import ATTENTION_PROJECTIONS, HEAD_MODULE, MLP_PROJECTIONS, AdapterLayout

FloatArray = NDArray[np.float32]

_EXPERTS = ".mlp.experts"
_GATE_UP = "gate_up_proj"
_EXPERT_PARAMETERS = (f"mlp.experts.{_GATE_UP}", "mlp.experts.down_proj")


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One tensor as peft has it: `shape` is how it is written, `view` the same numbers where they lie in an arena.

    The view may have more dimensions than the shape; reshaped in C order they agree.
    """

    name: str
    shape: tuple[int, int]
    view: FloatArray


def named_tensors(layout: AdapterLayout, flat: FloatArray) -> Iterator[NamedTensor]:
    """An arena's tensors as peft names and shapes them: A [R, I], B [O, R]; experts' as the module says."""
    for places in layout.groups:
        num_experts = places.group.num_experts
        for place in (*places.a, *places.b):
            rows, columns = place.shape
            view = flat[place.offset : place.offset + place.num_elements].reshape(rows, columns)
            name = _name(place.module, place.which, is_expert=num_experts > 0)
            if place.which == "A":
                yield NamedTensor(name, (rows, columns), view)
            elif num_experts == 0:
                yield NamedTensor(name, (columns, rows), view.T)
            else:
                by_expert_ERO = view.reshape(num_experts, layout.rank, columns)
                yield NamedTensor(name, (columns, rows), by_expert_ERO.transpose(2, 1, 0))


def adapter_config(layout: AdapterLayout, spec: LoraSpec, base_model: str) -> dict[str, Any]:
    """adapter_config.json for peft; target_modules is always written, the base by its stable name."""
    modules = {place.module for place in layout.places}
    leaves = {module.rpartition(".")[2] for module in modules if _EXPERTS not in module}
    targets = [leaf for leaf in (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS, HEAD_MODULE) if leaf in leaves]
    parameters: list[str] | None = None
    if any(_EXPERTS in module for module in modules):
        # Beside experts, peft takes gate_proj, up_proj and down_proj for the experts' of an older transformers and
        # targets those instead; the dense layers' are reached as parameters, under the same tensor names.
        dense = [leaf for leaf in targets if leaf in MLP_PROJECTIONS]
        targets = [leaf for leaf in targets if leaf not in MLP_PROJECTIONS]
        parameters = [*_EXPERT_PARAMETERS, *(f"mlp.{leaf}.weight" for leaf in dense)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": targets,
        "target_parameters": parameters,
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


def vllm_config(peft_config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings for per-expert tensors; those of an adapter without experts are left as they are."""
    if not peft_config["target_parameters"]:
        return dict(peft_config)
    chosen = {*peft_config["target_modules"], *MLP_PROJECTIONS}
    targets = [leaf for leaf in (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS, HEAD_MODULE) if leaf in chosen]
    return {**peft_config, "target_modules": targets, "target_parameters": None}


def vllm_tensors(tensors: Mapping[str, FloatArray], rank: int) -> dict[str, FloatArray]:
    """peft's tensors with those of experts taken apart: `....experts.E.{gate,up,down}_proj.lora_{A,B}.weight`.

    Exact: the one A of the fused gate and up is written for both, and their B's are halves of the one B.
    """
    apart: dict[str, FloatArray] = {}
    for name, array in tensors.items():
        path, experts, rest = name.partition(f"{_EXPERTS}.")
        if not experts:
            apart[name] = array
            continue
        is_gate_up = rest.startswith("base_layer.")
        leaves = ("gate_proj", "up_proj") if is_gate_up else ("down_proj",)
        which = rest.removeprefix("base_layer.")
        for expert, matrix in enumerate(_by_expert(array, rank, is_a=which.startswith("lora_A"))):
            # The same A for every leaf; each leaf's own rows of B.
            parts = [matrix] * len(leaves) if which.startswith("lora_A") else np.split(matrix, len(leaves))
            for leaf, part in zip(leaves, parts, strict=True):
                apart[f"{path}{experts}{expert}.{leaf}.{which}"] = part
    return apart


def _by_expert(array: FloatArray, rank: int, *, is_a: bool) -> FloatArray:
    """A [E * R, I] as [E, R, I], or B [O, R * E] as [E, O, R]."""
    if is_a:
        return array.reshape(-1, rank, array.shape[1])
    return array.reshape(array.shape[0], rank, -1).transpose(2, 0, 1)


def _name(module: str, which: str, *, is_expert: bool) -> str:
    if is_expert:
        path, _, leaf = module.rpartition(".")
        module = f"{path}.base_layer" if leaf == _GATE_UP else path
    return f"{TENSOR_PREFIX}{module}.lora_{which}.weight"
