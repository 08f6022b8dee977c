"""What the engine does not understand is refused before a weight is read, by the name of what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_builders import make_model_dir
from safetensors.torch import save_file

from treadle.engine import architectures, loading
from treadle.engine.architectures import SUPPORTED_ARCHITECTURES, check_architecture
from treadle.errors import ConfigError

SIZES: Mapping[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
EXPERTS: Mapping[str, Any] = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}


def qwen3(**settings: Any) -> transformers.PreTrainedConfig:
    return transformers.Qwen3Config(**{**SIZES, **settings})


def llama(**settings: Any) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**{**SIZES, **settings})


def qwen3_moe(**settings: Any) -> transformers.PreTrainedConfig:
    return transformers.Qwen3MoeConfig(**{**SIZES, **EXPERTS, **settings})


@pytest.mark.parametrize(
    "config",
    [
        qwen3(),
        llama(attention_bias=True, mlp_bias=True),
        qwen3_moe(),
        qwen3_moe(attention_bias=True, norm_topk_prob=True),
        qwen3_moe(mlp_only_layers=[0]),
        qwen3_moe(decoder_sparse_step=2),
        qwen3_moe(mlp_only_layers=[0, 1]),
        qwen3_moe(sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)
def test_understood_configurations_pass(config: transformers.PreTrainedConfig) -> None:
    check_architecture(config)


def mixtral() -> transformers.PreTrainedConfig:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    return transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)


def with_shared_expert() -> transformers.PreTrainedConfig:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    return transformers.Qwen2MoeConfig(**sizes, **EXPERTS, shared_expert_intermediate_size=8)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (mixtral(), ("MixtralForCausalLM", *SUPPORTED_ARCHITECTURES)),
        (with_shared_expert(), ("Qwen2MoeForCausalLM", "shared_expert_gate", "Qwen3MoeForCausalLM")),
        (qwen3(hidden_act="gelu"), ("Qwen3ForCausalLM", "'gelu'", "'silu'")),
        (llama(hidden_act="relu"), ("LlamaForCausalLM", "'relu'", "'silu'")),
        (qwen3_moe(hidden_act="gelu"), ("Qwen3MoeForCausalLM", "'gelu'", "'silu'")),
        (qwen3_moe(use_sliding_window=True, sliding_window=4), ("sliding_attention", "full_attention")),
        (qwen3_moe(quantization_config=FP8), ("'fp8'", "bfloat16", "float32")),
        (qwen3(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}), ("'bitsandbytes'",)),
        (
            qwen3_moe(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            ("'dynamic'", "frequencies"),
        ),
    ],
    ids=[
        "other router",
        "shared expert",
        "activation",
        "activation of llama",
        "activation of experts",
        "sliding window",
        "fp8",
        "4 bit",
        "dynamic rope",
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    config: transformers.PreTrainedConfig, named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_architecture(config)
    for word in named:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules": {"model.layers.1.mlp.gate": "Linear"}}, ("model.layers.1.mlp.gate", "Linear", "TopKRouter")),
        ({"modules": {"model.layers.0.mlp.experts": "ModuleList"}}, ("mlp.experts", "ModuleList", "transformers 5")),
        ({"parameters": {"model.layers.0.mlp.gate.e_score_correction_bias": (4,)}}, ("e_score_correction_bias [4]",)),
        ({"parameters": {"model.layers.1.mlp.experts.down_proj": (4, 8, 16)}}, ("down_proj [4, 8, 16]", "[4, 16, 8]")),
        ({"parameters": {"model.layers.1.mlp.experts.gate_up_proj_bias": (4, 16)}}, ("gate_up_proj_bias [4, 16]",)),
    ],
    ids=["router is linear", "experts apart", "router with bias", "transposed experts", "experts with bias"],
)
def test_experts_of_another_transformers_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, Mapping[str, Any]], named: tuple[str, ...]
) -> None:
    """Other releases of transformers may build the same class otherwise; then its own outline says so."""
    real = loading.outline(qwen3_moe())
    changed = loading.Outline(
        class_name=real.class_name,
        linears=real.linears,
        modules={**real.modules, **changes.get("modules", {})},
        parameters={**real.parameters, **changes.get("parameters", {})},
    )
    monkeypatch.setattr(architectures.loading, "outline", lambda config: changed)
    with pytest.raises(ConfigError) as caught:
        check_architecture(qwen3_moe())
    for word in named:
        assert word in caught.value.message


def test_an_edit_anywhere_in_the_weights_changes_the_revision(tmp_path: Path) -> None:
    directory = make_model_dir(tmp_path / "model", "qwen3_moe", tied=False)
    before = loading.directory_revision(directory)
    assert loading.directory_revision(directory) == before
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    seen = {before}
    for name, parameter in model.named_parameters():
        original = parameter.data.clone()
        parameter.data.mul_(1.0625)
        model.save_pretrained(tmp_path / "edited")
        seen.add(loading.directory_revision(tmp_path / "edited"))
        parameter.data.copy_(original)
        assert torch.equal(parameter.data, original), name
    model.save_pretrained(tmp_path / "edited")
    assert loading.directory_revision(tmp_path / "edited") == before
    assert len(seen) == 1 + len(list(model.named_parameters()))


def test_samples_reach_into_the_middle_of_a_large_tensor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensor = torch.zeros(3 * 2**20, dtype=torch.uint8)
    seen = set()
    for place in (None, 0, 2**20 + 100, 2 * 2**20, 3 * 2**20 - 1):
        edited = tensor.clone()
        if place is not None:
            edited[place] = 1
        save_file({"a": edited, "b": torch.ones(3)}, tmp_path / "model.safetensors")
        seen.add(loading.directory_revision(tmp_path))
    assert len(seen) == 5


def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        loading.directory_revision(tmp_path)
