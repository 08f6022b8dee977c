"""Which base models the engine understands, checked on their configuration before a weight is read.

Our own layers compute what transformers' classes of these names compute; so everything that could make a model of
such a class compute something else is looked at here and refused by name. It loads nothing.
Invariant: what passes `check_architecture` is a model of which every projection can be trained and served exactly.
"""

from __future__ import annotations

import transformers

from treadle.engine import loading
from treadle.engine.adapter import ATTENTION_PROJECTIONS, HEAD_MODULE, MLP_PROJECTIONS
from treadle.errors import ConfigError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_MOE_ARCHITECTURE = "Qwen3MoeForCausalLM"
_ACTIVATION = "silu"
# These rescale frequencies by the longest position in the pack, so a tenant's numbers would depend on its neighbours.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_MOE_ROUTER = "Qwen3MoeTopKRouter"
_MOE_EXPERTS = "Qwen3MoeExperts"
# Names shown in a message; a large model has thousands.
_MAX_NAMES = 6


def check_architecture(config: transformers.PreTrainedConfig) -> None:
    """Raises ConfigError, naming what was seen and what is supported, unless every layer is one we can train."""
    # First, because a quantised model cannot always be outlined without the library that quantised it.
    if getattr(config, "quantization_config", None) is not None:
        method = _quantisation_method(config.quantization_config)
        raise ConfigError(f"weights quantised by {method} are not supported; supported: bfloat16 and float32 weights")
    outline = loading.outline(config)
    if outline.class_name not in SUPPORTED_ARCHITECTURES:
        seen = ", ".join(sorted({linear.rpartition(".")[2] for linear in outline.linears})) or "none"
        raise ConfigError(
            f"architecture {outline.class_name} is not supported (supported: {', '.join(SUPPORTED_ARCHITECTURES)}); "
            f"projections seen: {seen}"
        )
    _check_settings(config, outline.class_name)
    sparse = _sparse_layers(config, outline.class_name)
    expected = _expected_linears(config, sparse)
    if expected != set(outline.linears):
        odd = ", ".join(sorted(expected ^ set(outline.linears))[:_MAX_NAMES])
        raise ConfigError(f"{outline.class_name} does not have the projections expected of it; differing: {odd}")
    for layer in sparse:
        _check_experts(config, outline, f"model.layers.{layer}.mlp")


def _check_settings(config: transformers.PreTrainedConfig, class_name: str) -> None:
    activation = getattr(config, "hidden_act", None)
    if activation != _ACTIVATION:
        raise ConfigError(f"{class_name} with hidden_act {activation!r} is not supported; only {_ACTIVATION!r}")
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None and getattr(config, "sliding_window", None) is not None:
        layer_types = ["sliding_attention"]
    seen = set(layer_types or ["full_attention"])
    if seen != {"full_attention"}:
        raise ConfigError(f"{class_name} with attention {sorted(seen)} is not supported; only full_attention")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ConfigError(f"rope_type {rope_type!r} is not supported: its frequencies depend on the batch")


def _sparse_layers(config: transformers.PreTrainedConfig, class_name: str) -> tuple[int, ...]:
    """Indexes of the layers with experts, as the modelling code chooses them."""
    if class_name != _MOE_ARCHITECTURE or config.num_experts == 0:
        return ()
    return tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    )


def _expected_linears(config: transformers.PreTrainedConfig, sparse: tuple[int, ...]) -> set[str]:
    linears = {HEAD_MODULE}
    for layer in range(config.num_hidden_layers):
        linears.update(f"model.layers.{layer}.self_attn.{leaf}" for leaf in ATTENTION_PROJECTIONS)
        if layer not in sparse:
            linears.update(f"model.layers.{layer}.mlp.{leaf}" for leaf in MLP_PROJECTIONS)
    return linears


def _check_experts(config: transformers.PreTrainedConfig, outline: loading.Outline, path: str) -> None:
    """Whether a layer's router and experts are those we know: their classes, and every parameter with its shape."""
    for leaf, known in (("gate", _MOE_ROUTER), ("experts", _MOE_EXPERTS)):
        seen = outline.modules.get(f"{path}.{leaf}", "nothing")
        if seen != known:
            raise ConfigError(
                f"{path}.{leaf} is {seen} in transformers {transformers.__version__}; only {known} is supported"
            )
    num_experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    expected = {
        f"{path}.gate.weight": (num_experts, hidden),
        f"{path}.experts.gate_up_proj": (num_experts, 2 * inner, hidden),
        f"{path}.experts.down_proj": (num_experts, hidden, inner),
    }
    seen_shapes = {name: shape for name, shape in outline.parameters.items() if name.startswith(f"{path}.")}
    if seen_shapes != expected:
        odd = sorted(set(seen_shapes.items()) ^ set(expected.items()))[:_MAX_NAMES]
        named = ", ".join(f"{name} {list(shape)}" for name, shape in odd)
        raise ConfigError(f"the experts of {path} do not have the parameters expected of them; differing: {named}")


def _quantisation_method(quantisation: object) -> str:
    """Its name; the configuration is a dictionary as it comes from the file and an object afterwards."""
    field = "quant_method"
    method = quantisation.get(field) if isinstance(quantisation, dict) else getattr(quantisation, field, None)
    return repr(str(getattr(method, "value", method)))
