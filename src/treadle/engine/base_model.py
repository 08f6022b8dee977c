"""A frozen base model, loaded through transformers and prepared for packed passes with adapters.

transformers reads configuration and weights; decoder.py arranges them. This module refuses what it does not
recognise, with the names it saw, rather than train half of it. It knows no tokenizer, losses or optimisers.
Invariant: `forward_hidden` reads each base weight once, whatever the number of adapters.

Legend: T rows of the packed batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from torch import Tensor

from treadle.domain.limits import PACK_MULTIPLE, QUANTUM_TOKENS
from treadle.domain.outcome import PoolFacts
from treadle.engine import loading
from treadle.engine.adapter import ATTENTION_PROJECTIONS, HEAD_MODULE, MLP_PROJECTIONS, ProjectionGroup
from treadle.engine.architectures import check_architecture
from treadle.engine.arenas import ArenaPool
from treadle.engine.attention import Attention, device_attention_path
from treadle.engine.context import PassContext, Recompute, trained_groups
from treadle.engine.decoder import PackedDecoder
from treadle.engine.head import head_profile, piece_rows
from treadle.engine.kernels.base import LoraKernel, LoraSegment, PassSegments
from treadle.engine.kernels.choose import AUTO, choose_kernel
from treadle.engine.kernels.experts import ExpertLoop
from treadle.engine.kernels.row_groups import RowGroupsKernel
from treadle.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BaseModel:
    """One loaded base model. Not thread-safe: its passes run one at a time.

    arenas: the device memory of all adapters on it. kernel: what computes their terms; facts.numerics_profile names it.
    pack_buckets: lengths that passes are padded to, see use_buckets; none unless set.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        *,
        device: torch.device,
        facts: PoolFacts,
        kernel: LoraKernel | None = None,
    ) -> None:
        config = model.config
        self.facts = facts
        self.config = config
        self.device = device
        self.dtype: torch.dtype = model.dtype
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(model.lm_head.weight.shape[0])
        self.max_context_length = int(config.max_position_embeddings)
        self.num_layers = int(config.num_hidden_layers)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.eos_token_ids = _eos_token_ids(model)
        self.head_weight_VD: Tensor = model.lm_head.weight.detach()
        self.transformer = PackedDecoder(model)
        self.groups: tuple[ProjectionGroup, ...] = self.transformer.groups
        self.kernel = kernel or choose_kernel(device)
        self.pack_buckets: tuple[int, ...] = ()
        self.has_experts = any(group.num_experts for group in self.groups)
        self.arenas = ArenaPool(device)
        self._anchor = torch.empty(0, device=device, requires_grad=True)
        self.note_profile()

    def note_profile(self) -> None:
        """Write into the facts what the numbers depend on now; again when the number of threads has changed."""
        self.facts = replace(self.facts, numerics_profile=numerics_profile(self))

    def use_buckets(self, buckets: Sequence[int]) -> None:
        """Pad every pass to one of these ascending lengths, and the head's products to one; () for as short as can be.

        For devices that choose a product's kernel by its number of rows (strict.py); a CPU's bits are the same either
        way. Each is a multiple of PACK_MULTIPLE and holds a whole piece of the head. The profile names them.
        """
        assert list(buckets) == sorted(set(buckets)), "buckets ascend"
        assert all(b % PACK_MULTIPLE == 0 and b >= piece_rows(self.vocab_size) for b in buckets), buckets
        self.pack_buckets = tuple(buckets)
        self.note_profile()

    def forward_hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        *,
        attention: Attention,
        segments: Sequence[LoraSegment],
        recompute: Recompute = Recompute.NONE,
        kernel: LoraKernel | None = None,
    ) -> Tensor:
        """Final-normed hidden states [T, D] of one packed batch, in the model's dtype.

        tokens_T, positions_T: int64 on the model's device, T a multiple of PACK_MULTIPLE. Autograd is recorded
        exactly when gradients are enabled; the backward writes adapters' gradients into the segments' arenas.
        Rows outside all segments run the bare base model. recompute changes memory and time, never a bit.
        kernel: what computes the terms of dense projections in this pass; the base model's own unless given.
        """
        assert tokens_T.shape == positions_T.shape
        assert tokens_T.shape[0] % PACK_MULTIPLE == 0, "the caller pads the pack"
        cos_Td, sin_Td = self.transformer.rotary(positions_T)
        ctx = PassContext(
            segments=PassSegments(segments),
            kernel=kernel or self.kernel,
            attention=attention,
            cos_Td=cos_Td,
            sin_Td=sin_Td,
            anchor=self._anchor,
            recompute=recompute,
            trained_groups=trained_groups(segments),
        )
        hidden_TD: Tensor = self.transformer(tokens_T, ctx)
        return hidden_TD


def load_base_model(
    source: str,
    *,
    name: str,
    device: str,
    dtype: str,
    revision: str | None = None,
    num_threads: int | None = None,
    kernel: str = AUTO,
) -> BaseModel:
    """The base model at `source` (local directory or hub name), frozen, under its stable `name`.

    device: "cpu", "cuda" or "cuda:N". dtype: "float32" or "bfloat16". num_threads: torch's intra-op threads, for the
    whole process. kernel: "auto", or the name of one in kernels/choose.py. Raises ConfigError for an unknown dtype or
    kernel, an unusable device, a source that cannot be read, or an architecture that the engine does not recognise.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; supported: {', '.join(_DTYPES)}")
    torch_device = loading.usable_device(device)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    lora_kernel = choose_kernel(torch_device, kernel)
    config = loading.read_config(source, revision)
    check_architecture(config)
    model = loading.read_model(source, config, revision=revision, dtype=_DTYPES[dtype], device=torch_device)
    model.requires_grad_(False)
    model.train(False)
    facts = _facts(model, source=source, name=name, device=torch_device, dtype=dtype, requested_revision=revision)
    return BaseModel(model, device=torch_device, facts=facts, kernel=lora_kernel)


def numerics_profile(base: BaseModel) -> str:
    """What must be equal for two runs to agree bit for bit (with the request's own content and order)."""
    # Vector width decides the order of sums on a CPU, the chip on a GPU.
    chip = (
        torch.backends.cpu.get_cpu_capability()
        if base.device.type == "cpu"
        else torch.cuda.get_device_name(base.device)
    )
    kind = f"{base.device.type}-{chip}".replace(" ", "-")
    return "/".join(
        (
            kind,
            f"torch-{torch.__version__}",
            f"transformers-{transformers.__version__}",
            f"threads-{torch.get_num_threads()}",
            str(base.dtype).removeprefix("torch."),
            base.kernel.name,
            RowGroupsKernel.name,
            *((ExpertLoop.name,) if base.has_experts else ()),
            str(device_attention_path(base.device, base.dtype, base.head_dim)),
            head_profile(base.vocab_size),
            f"quantum-{QUANTUM_TOKENS}",
            f"pack-{'-'.join(map(str, base.pack_buckets)) or PACK_MULTIPLE}",
        )
    )


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
        numerics_profile="",
        source_dir=place.source_dir,
        tokenizer_dir=place.tokenizer_dir,
        trainable_targets=(*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS, HEAD_MODULE),
    )
