"""The frozen decoder: the weights that transformers loaded, arranged for packed passes.

Building it takes the layers out of the transformers model one by one, so that no weight is held twice. It refuses
nothing: base_model.py has checked the architecture by then.
Invariant: the weights here are never written.

Legend: T rows of the packed batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.engine.adapter import HEAD_MODULE, ProjectionGroup, ProjectionShape
from treadle.engine.blocks import GatedMlp, Layer, Mlp, SelfAttention
from treadle.engine.context import PassContext
from treadle.engine.lora import Projection
from treadle.engine.moe import moe_mlp
from treadle.engine.norm import RMSNorm
from treadle.engine.rotary import HeadSplit


class PackedDecoder(nn.Module):
    """Embedding, layers and last norm. A module so that it can be hooked; it has no parameters of its own."""

    def __init__(self, model: Any) -> None:
        """Takes the decoder out of a causal language model of transformers, which is of no use afterwards."""
        super().__init__()
        transformer = model.model
        self.embedding_VD: Tensor = transformer.embed_tokens.weight.detach()
        self.norm = _norm(transformer.norm)
        self.rotary_embedding: nn.Module = transformer.rotary_emb
        layers: list[Layer] = []
        groups: list[ProjectionGroup] = []
        for index in range(len(transformer.layers)):
            layer, layer_groups = _layer(transformer.layers[index], f"model.layers.{index}", index)
            # Its weights live on in ours; holding both would double the memory.
            transformer.layers[index] = nn.Identity()
            layers.append(layer)
            groups.extend(layer_groups)
        self.blocks = tuple(layers)
        head_VD: Tensor = model.lm_head.weight
        head = ProjectionShape(HEAD_MODULE, head_VD.shape[1], head_VD.shape[0])
        self.groups = (*groups, ProjectionGroup(HEAD_MODULE, (head,)))

    def forward(self, tokens_T: Tensor, ctx: PassContext) -> Tensor:
        """Hidden states [T, D] after the last norm."""
        x_TD = functional.embedding(tokens_T, self.embedding_VD)
        for block in self.blocks:
            x_TD = block.forward(x_TD, ctx)
        return last_norm(x_TD, self.norm)

    @torch.no_grad()
    def rotary(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of each row, [T, d] in the model's dtype."""
        cos_1Td, sin_1Td = self.rotary_embedding(self.embedding_VD, positions_T.unsqueeze(0))
        return cos_1Td.squeeze(0), sin_1Td.squeeze(0)


def last_norm(x_TD: Tensor, norm: RMSNorm) -> Tensor:
    """norm(x) as a part of the graph when x is."""
    if torch.is_grad_enabled() and x_TD.requires_grad:
        y_TD: Tensor = _Norm.apply(x_TD, norm)  # type: ignore[no-untyped-call]  # torch types apply as untyped
        return y_TD
    return norm.forward(x_TD)[0]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(node: Any, x_TD: Tensor, norm: RMSNorm) -> Tensor:
        y_TD, r_T1 = norm.forward(x_TD)
        node.save_for_backward(x_TD, r_T1)
        node.norm = norm
        return y_TD

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, r_T1 = node.saved_tensors
        return node.norm.backward(grads[0], x_TD, r_T1).to(x_TD.dtype), None


def _layer(module: Any, path: str, index: int) -> tuple[Layer, list[ProjectionGroup]]:
    """A decoder layer of transformers as one of ours, and its groups in the order in which they run."""
    attention, attention_groups = _attention(module, path, index)
    mlp, mlp_groups = _mlp(module, path)
    return Layer(attention, mlp), [*attention_groups, *mlp_groups]


def _attention(module: Any, path: str, index: int) -> tuple[SelfAttention, list[ProjectionGroup]]:
    attention = module.self_attn
    qkv_group = _group(f"{path}.self_attn", "qkv_proj", attention, ("q_proj", "k_proj", "v_proj"))
    o_group = _group(f"{path}.self_attn", "o_proj", attention, ("o_proj",))
    head_dim = int(attention.head_dim)
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    half = SelfAttention(
        layer_index=index,
        norm=_norm(module.input_layernorm),
        qkv=_side_by_side(qkv_group, [attention.q_proj, attention.k_proj, attention.v_proj]),
        heads=HeadSplit(
            num_heads=attention.q_proj.out_features // head_dim,
            num_kv_heads=attention.k_proj.out_features // head_dim,
            head_dim=head_dim,
            q_norm=None if q_norm is None else _norm(q_norm),
            k_norm=None if k_norm is None else _norm(k_norm),
        ),
        scaling=float(attention.scaling),
        o=_side_by_side(o_group, [attention.o_proj]),
    )
    return half, [qkv_group, o_group]


def _mlp(module: Any, path: str) -> tuple[Mlp, list[ProjectionGroup]]:
    mlp = module.mlp
    if hasattr(mlp, "experts"):
        return moe_mlp(mlp, f"{path}.mlp", _norm(module.post_attention_layernorm))
    gate_up_group = _group(f"{path}.mlp", "gate_up_proj", mlp, ("gate_proj", "up_proj"))
    down_group = _group(f"{path}.mlp", "down_proj", mlp, ("down_proj",))
    half = GatedMlp(
        norm=_norm(module.post_attention_layernorm),
        gate_up=_side_by_side(gate_up_group, [mlp.gate_proj, mlp.up_proj]),
        down=_side_by_side(down_group, [mlp.down_proj]),
    )
    return half, [gate_up_group, down_group]


def _group(path: str, name: str, parent: nn.Module, leaves: Sequence[str]) -> ProjectionGroup:
    members = []
    for leaf in leaves:
        linear = parent.get_submodule(leaf)
        assert isinstance(linear, nn.Linear), f"{path}.{leaf} was checked to be linear"
        members.append(ProjectionShape(f"{path}.{leaf}", linear.in_features, linear.out_features))
    return ProjectionGroup(f"{path}.{name}", tuple(members))


def _side_by_side(group: ProjectionGroup, linears: Sequence[nn.Linear]) -> Projection:
    """The linear maps' weights below one another, which writes their outputs side by side."""
    if len(linears) == 1:
        bias = linears[0].bias
        return Projection(group.name, linears[0].weight.detach(), None if bias is None else bias.detach())
    weight = torch.cat([linear.weight.detach() for linear in linears])
    has_bias = linears[0].bias is not None
    assert all((linear.bias is not None) == has_bias for linear in linears), "biases on all of a group or on none"
    return Projection(group.name, weight, torch.cat([linear.bias.detach() for linear in linears]) if has_bias else None)


def _norm(module: Any) -> RMSNorm:
    return RMSNorm(module.weight.detach(), float(module.variance_epsilon))
