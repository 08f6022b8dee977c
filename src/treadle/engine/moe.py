"""The mixture-of-experts half of a decoder layer (Qwen3-MoE) over a packed batch, with adapters on every expert.

A router picks k experts per row. The rows are copied k times, sorted by expert, and an expert's rows, whoever they
belong to, are one product with its frozen weights; kernels/experts.py adds the adapters' terms. The router is frozen
and has no adapter, but the gradient flows through its weights to its input.
It knows neither tenants nor losses. tests/numerics compares it with transformers and peft.
Invariant: a row's numbers depend on the row alone and a segment's gradients on its own rows alone, wherever the
other rows of the pack are sent. Rows meet in the padded groups of an expert and nowhere else.

y = x + sum_j down_e(w_j * silu(gate_e(n)) * up_e(n)) with n = norm(x), e the j-th expert of the row and w_j its weight.
transformers multiplies by w_j behind `down`, which is linear, so only rounding differs; before it, the gradient of w_j
does not need the outputs of `down` (k rows of hidden size per token, the largest activation there would be).

Legend: T rows of the packed batch, P sorted copies of them with padding, K experts per row, E experts, D hidden size,
M inner size of an expert, I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from treadle.domain.limits import PACK_MULTIPLE
from treadle.engine.adapter import ProjectionGroup, ProjectionShape
from treadle.engine.blocks import gated, gated_backward
from treadle.engine.context import PassContext, Recompute
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.kernels.experts import ExpertKernel, ExpertLoop, ExpertRun
from treadle.engine.norm import RMSNorm

# The first compute capability with a grouped product of bfloat16 matrices.
_GROUPED_MM_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Where the rows of a pass lie when sorted by expert.

    rows_P: the row of the pack that each sorted row copies; padding copies row 0 and nobody reads what comes of it.
    places_TK: where the j-th copy of each row lies. stops: behind each expert's last row, padding included, a multiple
    of PACK_MULTIPLE; stops_E the same on the device, int32. runs: see ExpertRun, by expert, then segment.
    """

    rows_P: Tensor
    places_TK: Tensor
    stops: tuple[int, ...]
    stops_E: Tensor
    runs: tuple[ExpertRun, ...]

    def spread(self, x_TI: Tensor) -> Tensor:
        """Copies of the rows in sorted order, [P, I]."""
        return x_TI.index_select(0, self.rows_P)

    def gather(self, x_PI: Tensor, onto_TI: Tensor) -> Tensor:
        """onto + the sum of each row's copies, best expert first, in float32 [T, I]."""
        total_TI = onto_TI.to(torch.float32, copy=True)
        for places_T in self.places_TK.unbind(1):
            total_TI.add_(x_PI.index_select(0, places_T))
        return total_TI


def dispatch(experts_TK: Tensor, segments: Sequence[LoraSegment], num_experts: int) -> Dispatch:
    """Sort each row's copies by expert; rows outside all segments are sorted too but belong to no run.

    experts_TK: int64, K different experts per row. Waits for the device once, to learn how many rows go where.
    """
    num_rows, num_choices = experts_TK.shape
    assert num_rows % PACK_MULTIPLE == 0, "the caller pads the pack"
    device = experts_TK.device
    experts_S, order_S = torch.sort(experts_TK.reshape(-1), stable=True)
    rows_S = order_S.div(num_choices, rounding_mode="floor")
    edges = [edge for segment in segments for edge in (segment.start, segment.stop)]
    assert edges == sorted(edges), "segments are in row order"
    # Odd labels lie within a segment, even ones between two.
    labels_S = torch.bucketize(rows_S, torch.tensor(edges, dtype=torch.int64, device=device), right=True)
    num_labels = len(edges) + 1
    counts = torch.bincount(experts_S * num_labels + labels_S, minlength=num_experts * num_labels)
    runs: list[ExpertRun] = []
    shifts: list[int] = []
    stops: list[int] = []
    cursor = num_sorted = 0
    for expert, of_labels in enumerate(counts.view(num_experts, num_labels).tolist()):
        shifts.append(cursor - num_sorted)
        for label, count in enumerate(of_labels):
            if count and label % 2:
                runs.append(ExpertRun(segments[label // 2], expert, cursor, cursor + count))
            cursor += count
            num_sorted += count
        cursor = -(-cursor // PACK_MULTIPLE) * PACK_MULTIPLE
        stops.append(cursor)
    places_S = torch.tensor(shifts, device=device)[experts_S]
    places_S += torch.arange(num_sorted, device=device)
    rows_P = torch.zeros(cursor, dtype=torch.int64, device=device).index_copy_(0, places_S, rows_S)
    places_TK = torch.empty_like(order_S).index_copy_(0, order_S, places_S).view(num_rows, num_choices)
    stops_E = torch.tensor(stops, dtype=torch.int32, device=device)
    return Dispatch(rows_P, places_TK, tuple(stops), stops_E, tuple(runs))


@dataclass(frozen=True, slots=True)
class Router:
    """The frozen choice of experts: softmax over all in float32, the best K, their weights in the model's dtype.

    is_normalised: whether a row's K weights are made to sum to one.
    """

    weight_ED: Tensor
    num_choices: int
    is_normalised: bool

    def forward(self, n_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts [T, K], best first, their weights [T, K], and the float32 probabilities [T, E] for `backward`."""
        probs_TE = functional.softmax(torch.mm(n_TD, self.weight_ED.t()), dim=-1, dtype=torch.float32)
        best_TK, experts_TK = torch.topk(probs_TE, self.num_choices, dim=-1)
        if self.is_normalised:
            best_TK = best_TK / best_TK.sum(dim=-1, keepdim=True)
        return experts_TK, best_TK.to(n_TD.dtype), probs_TE

    def backward(self, d_weights_TK: Tensor, experts_TK: Tensor, probs_TE: Tensor) -> Tensor:
        """d loss / d n from the float32 d loss / d weights; the choice itself has no gradient.

        w_k = p_k / s with s = sum_k p_k: d p_k = (d w_k - sum_j w_j d w_j) / s.
        p = softmax(l): d l = p (d p - sum p d p).
        """
        d_best_TK = d_weights_TK
        if self.is_normalised:
            best_TK = probs_TE.gather(1, experts_TK)
            sum_T1 = best_TK.sum(dim=-1, keepdim=True)
            mean_T1 = (d_weights_TK * best_TK).sum(dim=-1, keepdim=True).div_(sum_T1)
            d_best_TK = (d_weights_TK - mean_T1).div_(sum_T1)
        d_probs_TE = torch.zeros_like(probs_TE).scatter_(1, experts_TK, d_best_TK)
        d_logits_TE = (d_probs_TE - (d_probs_TE * probs_TE).sum(dim=-1, keepdim=True)).mul_(probs_TE)
        return torch.mm(d_logits_TE.to(self.weight_ED.dtype), self.weight_ED)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The frozen weights [E, O, I] of one group of projections, one matrix per expert."""

    group: str
    weight_EOI: Tensor

    def forward(self, x_PI: Tensor, plan: Dispatch, kernel: ExpertKernel) -> tuple[Tensor, object]:
        """Each sorted row times its expert, plus its run's term, [P, O]; and what `backward` needs of the adapters."""
        y_PO = _times_experts(x_PI, self.weight_EOI.transpose(1, 2), plan)
        return y_PO, kernel.add(x_PI, y_PO, plan.runs, self.group)

    def backward(
        self, dy_PO: Tensor, x_PI: Tensor, kept: object, plan: Dispatch, kernel: ExpertKernel, *, wants_dx: bool
    ) -> Tensor | None:
        """d loss / d x, or None when nobody wants it; dA and dB go into the segments' arenas."""
        dx_PI = _times_experts(dy_PO, self.weight_EOI, plan) if wants_dx else None
        kernel.add_grads(dy_PO, x_PI, kept, dx_PI, plan.runs, self.group)
        return dx_PI


@dataclass(frozen=True, slots=True)
class MoeMlp:
    """The second half of a mixture-of-experts layer (blocks.Mlp)."""

    norm: RMSNorm
    router: Router
    gate_up: ExpertStack
    down: ExpertStack
    kernel: ExpertKernel = field(default_factory=ExpertLoop)

    @property
    def group_names(self) -> tuple[str, ...]:
        return (self.gate_up.group, self.down.group)

    def forward(self, x_TD: Tensor, ctx: PassContext) -> Tensor:
        """x + experts(norm(x)), [T, D]."""
        if ctx.records(x_TD, *self.group_names):
            y_TD: Tensor = _RecordedMoe.apply(x_TD, ctx.anchor, self, ctx)  # type: ignore[no-untyped-call]  # torch, untyped
            return y_TD
        return _run(self, x_TD, ctx).y_TD


def moe_mlp(module: Any, path: str, norm: RMSNorm) -> tuple[MoeMlp, list[ProjectionGroup]]:
    """A Qwen3MoeSparseMoeBlock of transformers at `path` as one of ours, and its groups in the order they run in."""
    gate = module.gate
    mlp = MoeMlp(
        norm=norm,
        router=Router(gate.weight.detach(), int(gate.top_k), bool(gate.norm_topk_prob)),
        gate_up=ExpertStack(f"{path}.experts.gate_up_proj", module.experts.gate_up_proj.detach()),
        down=ExpertStack(f"{path}.experts.down_proj", module.experts.down_proj.detach()),
    )
    return mlp, [_group(mlp.gate_up), _group(mlp.down)]


def _group(stack: ExpertStack) -> ProjectionGroup:
    num_experts, num_outputs, num_inputs = stack.weight_EOI.shape
    return ProjectionGroup(stack.group, (ProjectionShape(stack.group, num_inputs, num_outputs),), num_experts)


class _Saved(NamedTuple):
    """The tensors that a forward leaves for its backward; None where one is to be computed again."""

    n_TD: Tensor | None
    inner_PM: Tensor | None
    r_T1: Tensor
    gate_up_P2M: Tensor
    weights_P1: Tensor
    experts_TK: Tensor
    probs_TE: Tensor


@dataclass(frozen=True, slots=True)
class _Ran:
    """What one forward gave: its output, where the rows lay, and what the backward needs."""

    y_TD: Tensor
    plan: Dispatch
    saved: _Saved
    of_gate_up: object
    of_down: object


def _run(moe: MoeMlp, x_TD: Tensor, ctx: PassContext) -> _Ran:
    n_TD, r_T1 = moe.norm.forward(x_TD)
    experts_TK, weights_TK, probs_TE = moe.router.forward(n_TD)
    plan = dispatch(experts_TK, ctx.segments, probs_TE.shape[1])
    gate_up_P2M, of_gate_up = moe.gate_up.forward(plan.spread(n_TD), plan, moe.kernel)
    # Padding has weight 0 and no reader.
    weights_P1 = weights_TK.new_zeros(plan.rows_P.shape[0], 1)
    weights_P1.index_copy_(0, plan.places_TK.reshape(-1), weights_TK.reshape(-1, 1))
    inner_PM = gated(gate_up_P2M)
    outputs_PD, of_down = moe.down.forward(inner_PM * weights_P1, plan, moe.kernel)
    is_all_kept = ctx.recompute is Recompute.NONE
    saved = _Saved(
        n_TD=n_TD if is_all_kept else None,
        inner_PM=inner_PM if is_all_kept else None,
        r_T1=r_T1,
        gate_up_P2M=gate_up_P2M,
        weights_P1=weights_P1,
        experts_TK=experts_TK,
        probs_TE=probs_TE,
    )
    return _Ran(plan.gather(outputs_PD, x_TD).to(x_TD.dtype), plan, saved, of_gate_up, of_down)


class _RecordedMoe(torch.autograd.Function):
    """x + experts(norm(x)). Keeps x, gate and up of every copy, and unless they are to be computed again n and the
    experts' inner activations; the sorted copies of n and the experts' outputs never."""

    @staticmethod
    def forward(node: Any, x_TD: Tensor, anchor: Tensor, moe: MoeMlp, ctx: PassContext) -> Tensor:
        ran = _run(moe, x_TD, ctx)
        node.save_for_backward(x_TD, *ran.saved)
        node.moe, node.plan, node.of_gate_up, node.of_down = moe, ran.plan, ran.of_gate_up, ran.of_down
        return ran.y_TD

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *tensors = node.saved_tensors
        saved = _Saved(*tensors)
        moe: MoeMlp = node.moe
        plan: Dispatch = node.plan
        inner_PM = gated(saved.gate_up_P2M) if saved.inner_PM is None else saved.inner_PM
        # A row's copies were added up as they are, so each has the row's gradient.
        d_weighted_PM = moe.down.backward(
            plan.spread(grads[0]), inner_PM * saved.weights_P1, node.of_down, plan, moe.kernel, wants_dx=True
        )
        assert d_weighted_PM is not None
        # The first layer may read the frozen embedding, whose gradient nobody wants.
        wants_dx = node.needs_input_grad[0]
        d_weights_P = (d_weighted_PM.float() * inner_PM).sum(dim=1) if wants_dx else None
        d_gate_up_P2M = gated_backward(d_weighted_PM.mul_(saved.weights_P1), saved.gate_up_P2M)
        n_TD = moe.norm.forward(x_TD)[0] if saved.n_TD is None else saved.n_TD
        d_copies_PD = moe.gate_up.backward(
            d_gate_up_P2M, plan.spread(n_TD), node.of_gate_up, plan, moe.kernel, wants_dx=wants_dx
        )
        if d_weights_P is None or d_copies_PD is None:
            return None, None, None, None
        d_n_TD = moe.router.backward(d_weights_P[plan.places_TK], saved.experts_TK, saved.probs_TE)
        d_x_TD = moe.norm.backward(plan.gather(d_copies_PD, d_n_TD), x_TD, saved.r_T1)
        return d_x_TD.add_(grads[0]).to(x_TD.dtype), None, None, None


def _times_experts(x_PI: Tensor, weight_EIO: Tensor, plan: Dispatch) -> Tensor:
    """Each sorted row times the matrix of its expert, [P, O]."""
    if _has_grouped_mm(x_PI):
        y_PO: Tensor = functional.grouped_mm(x_PI, weight_EIO, offs=plan.stops_E)
        return y_PO
    y_PO = x_PI.new_empty(x_PI.shape[0], weight_EIO.shape[2])
    start = 0
    for expert, stop in enumerate(plan.stops):
        if start < stop:
            torch.mm(x_PI[start:stop], weight_EIO[expert], out=y_PO[start:stop])
        start = stop
    return y_PO


def _has_grouped_mm(x: Tensor) -> bool:
    """Whether all experts' products are one call here. Written against the documentation; not run on a GPU yet."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(functional, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= _GROUPED_MM_CAPABILITY
