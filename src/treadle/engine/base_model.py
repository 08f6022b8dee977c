"""A frozen base model, loaded through transformers and prepared for packed passes with adapters.

Loading replaces the adaptable projections by LoraLinear modules, the norms by leaner ones, and routes attention to
the pass. This module
refuses what it does not recognise, with the names it saw, rather than train half of it. It knows no tokenizer,
losses or optimisers.
Invariant: `forward_hidden` is exactly one call of the transformers model, whatever the number of adapters.

Legend: T rows of the packed batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

from treadle.domain.limits import PACK_MULTIPLE, QUANTUM_TOKENS
from treadle.domain.outcome import PoolFacts
from treadle.engine import loading
from treadle.engine.adapter import ATTENTION_PROJECTIONS, HEAD_MODULE, MLP_PROJECTIONS, ProjectionShape
from treadle.engine.attention import ATTENTION_KWARG, ATTENTION_NAME, Attention, register_attention
from treadle.engine.kernels import KERNEL_NAME, LoraSegment
from treadle.engine.lora import LoraLinear, PassRouter
from treadle.engine.norm import FrozenRMSNorm
from treadle.errors import ConfigError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
# Both compute x * rsqrt(mean(x^2) + variance_epsilon) * weight.
_NORM_CLASSES = ("LlamaRMSNorm", "Qwen3RMSNorm")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# These rescale frequencies by the longest position in the pack, so a tenant's numbers would depend on its neighbours.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class BaseModel:
    """One loaded base model. Not thread-safe: its passes run one at a time."""

    def __init__(self, model: transformers.PreTrainedModel, *, device: torch.device, facts: PoolFacts) -> None:
        config = model.config
        self.facts = facts
        self.config = config
        self.device = device
        self.dtype: torch.dtype = model.dtype
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(model.lm_head.weight.shape[0])
        self.max_context_length = int(config.max_position_embeddings)
        self.num_layers = int(config.num_hidden_layers)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.eos_token_ids = _eos_token_ids(model)
        self.head_weight_VD: Tensor = model.lm_head.weight.detach()
        self.transformer: nn.Module = model.model
        self.projections: tuple[ProjectionShape, ...] = _projection_shapes(model)
        self._router = PassRouter(device)
        _wrap_projections(model, self.projections, self._router)
        _replace_norms(self.transformer)

    def forward_hidden(
        self, tokens_T: Tensor, positions_T: Tensor, *, attention: Attention, segments: Sequence[LoraSegment]
    ) -> Tensor:
        """Final-normed hidden states [T, D] of one packed batch, in the model's dtype.

        tokens_T, positions_T: int64 on the model's device, T a multiple of PACK_MULTIPLE. Autograd is recorded
        exactly when gradients are enabled; the backward writes adapters' gradients into the segments' arenas.
        Rows outside all segments run the bare base model.
        """
        assert tokens_T.shape == positions_T.shape
        assert tokens_T.shape[0] % PACK_MULTIPLE == 0, "the caller pads the pack"
        with self._router.running(segments):
            output = self.transformer(
                input_ids=tokens_T.unsqueeze(0),
                position_ids=positions_T.unsqueeze(0),
                use_cache=False,
                **{ATTENTION_KWARG: attention},
            )
        hidden_1TD: Tensor = output.last_hidden_state
        return hidden_1TD.squeeze(0)


def load_base_model(
    source: str,
    *,
    name: str,
    device: str,
    dtype: str,
    revision: str | None = None,
    num_threads: int | None = None,
) -> BaseModel:
    """The base model at `source` (local directory or hub name), frozen, under its stable `name`.

    device: "cpu", "cuda" or "cuda:N". dtype: "float32" or "bfloat16". num_threads: torch's intra-op threads, for the
    whole process. Raises ConfigError for an unknown dtype, an unusable device, a source that cannot be read, or
    an architecture that the engine does not recognise.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; supported: {', '.join(_DTYPES)}")
    torch_device = loading.usable_device(device)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    config = loading.read_config(source, revision)
    check_architecture(config)
    register_attention()
    model = loading.read_model(
        source, config, revision=revision, dtype=_DTYPES[dtype], attention=ATTENTION_NAME, device=torch_device
    )
    model.requires_grad_(False)
    model.train(False)
    facts = _facts(model, source=source, name=name, device=torch_device, dtype=dtype, requested_revision=revision)
    return BaseModel(model, device=torch_device, facts=facts)


def check_architecture(config: transformers.PreTrainedConfig) -> None:
    """Raises ConfigError, naming the class and the projections seen, unless every layer is one we can train."""
    class_name, linears = loading.outline(config)
    if class_name not in SUPPORTED_ARCHITECTURES:
        seen = ", ".join(sorted({linear.rpartition(".")[2] for linear in linears})) or "none"
        raise ConfigError(
            f"architecture {class_name} is not supported (supported: {', '.join(SUPPORTED_ARCHITECTURES)}); "
            f"projections seen: {seen}"
        )
    expected = {
        f"model.layers.{layer}.{parent}.{leaf}"
        for layer in range(config.num_hidden_layers)
        for parent, leaves in (("self_attn", ATTENTION_PROJECTIONS), ("mlp", MLP_PROJECTIONS))
        for leaf in leaves
    } | {HEAD_MODULE}
    if expected != set(linears):
        odd = ", ".join(sorted(expected ^ set(linears))[:6])
        raise ConfigError(f"{class_name} does not have the projections expected of it; differing: {odd}")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ConfigError(f"{class_name} with attention {sorted(layer_types)} is not supported; only full_attention")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ConfigError(f"rope_type {rope_type!r} is not supported: its frequencies depend on the batch")


def numerics_profile(device: torch.device, dtype: str) -> str:
    """What must be equal for two runs to agree bit for bit (with the request's own content and order)."""
    # Vector width decides the order of sums on a CPU, the chip on a GPU.
    chip = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    kind = f"{device.type}-{chip}".replace(" ", "-")
    return "/".join(
        (
            kind,
            f"torch-{torch.__version__}",
            f"transformers-{transformers.__version__}",
            f"threads-{torch.get_num_threads()}",
            dtype,
            KERNEL_NAME,
            f"quantum-{QUANTUM_TOKENS}",
            f"pack-{PACK_MULTIPLE}",
        )
    )


def _projection_shapes(model: nn.Module) -> tuple[ProjectionShape, ...]:
    leaves = (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS, HEAD_MODULE)
    return tuple(
        ProjectionShape(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in leaves
    )


def _wrap_projections(model: nn.Module, projections: Sequence[ProjectionShape], router: PassRouter) -> None:
    for projection in projections:
        parent_name, _, leaf = projection.module.rpartition(".")
        # The head is not called as a module: head.py reads its weight and adds its adapter chunk by chunk.
        if leaf == HEAD_MODULE:
            continue
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, leaf)
        setattr(parent, leaf, LoraLinear(linear, name=projection.module, router=router))


def _replace_norms(transformer: nn.Module) -> None:
    for name, module in list(transformer.named_modules()):
        if type(module).__name__ in _NORM_CLASSES:
            parent_name, _, leaf = name.rpartition(".")
            norm = FrozenRMSNorm(module.weight, module.variance_epsilon)
            setattr(transformer.get_submodule(parent_name), leaf, norm)


def _eos_token_ids(model: transformers.PreTrainedModel) -> tuple[int, ...]:
    """EOS ids of generation_config, else of config; empty when neither has any."""
    for holder in (getattr(model, "generation_config", None), model.config):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return tuple(int(i) for i in ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()


def _facts(
    model: transformers.PreTrainedModel,
    *,
    source: str,
    name: str,
    device: torch.device,
    dtype: str,
    requested_revision: str | None,
) -> PoolFacts:
    place = loading.locate(source, model.config, requested_revision)
    return PoolFacts(
        base_model=name,
        revision=place.revision,
        architecture=type(model).__name__,
        vocab_size=int(model.lm_head.weight.shape[0]),
        max_context_length=int(model.config.max_position_embeddings),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=dtype,
        device=str(device),
        numerics_profile=numerics_profile(device, dtype),
        source_dir=place.source_dir,
        tokenizer_dir=place.tokenizer_dir,
        trainable_targets=(*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS, HEAD_MODULE),
    )
