"""Our side of every comparison: whole steps of many tenants through the engine's public functions, no server.

    python scripts/bench/engine_side.py MODEL_DIR --tenants 8 --lengths 128 128 128 128 --steps 10

Run alone it prints JSON: tokens per CPU-second and peak resident memory of a process that does nothing else.
Knows no peft. Invariant: quanta are cut and packed as the worker does it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from report import peak_rss_mb
from torch import Tensor
from workload import Workload, micro_batches, token_sequences

from treadle.domain.losses import Loss, resolve_loss
from treadle.domain.ops import AdamParams, Datum, LoraSpec
from treadle.domain.quanta import cut_quanta
from treadle.engine.arenas import GradientArena
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.context import Recompute
from treadle.engine.optim import adamw_steps
from treadle.engine.passes import QuantumInput, run_micro_batch, sum_metrics
from treadle.engine.state import TrainingState, commit_scratch, new_training_state
from treadle.errors import TreadleError

# What torch.optim.AdamW is given on the other sides.
LEARNING_RATE = 1e-4
ADAM = AdamParams(learning_rate=LEARNING_RATE, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
# B starts at zero, which would leave every dA zero and the comparison of gradients empty.
_B_SCALE = 0.02

Gradients = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class TenantPass:
    """One tenant's summed loss, and dA [R, I] and dB [O, R] by module name."""

    loss: float
    gradients: Gradients


class EngineSide:
    """All tenants in one pass (or as few as `pass_tokens` allows), then one AdamW step each."""

    name = "ours"

    def __init__(
        self,
        base: BaseModel,
        workload: Workload,
        *,
        pass_tokens: int,
        losses: Sequence[str] = ("cross_entropy",),
        recompute: Recompute = Recompute.NONE,
    ) -> None:
        self.base = base
        self.workload = workload
        self._recompute = recompute
        self._losses = [resolve_loss(losses[tenant % len(losses)], {}) for tenant in range(workload.num_tenants)]
        self.states = [_new_state(base, workload, tenant) for tenant in range(workload.num_tenants)]
        self._datums = [
            [
                _datum(tokens, loss, (workload.seed, tenant))
                for tokens in token_sequences(workload, tenant, base.vocab_size)
            ]
            for tenant, loss in enumerate(self._losses)
        ]
        self._cuts = [cut_quanta([datum.num_tokens for datum in datums]) for datums in self._datums]
        self._pass_tokens = pass_tokens

    def step(self) -> list[float]:
        """Forward, losses, backward and AdamW of every tenant; their summed losses."""
        losses, scratches = self.run_passes()
        self.run_optimizer(scratches)
        return losses

    def run_passes(self, *, forward_only: bool = False) -> tuple[list[float], list[GradientArena]]:
        """Forward, losses and backward only; each tenant's loss and gradient (none with forward_only)."""
        scratches = [] if forward_only else [state.new_scratch() for state in self.states]
        tenants: list[int] = []
        quanta: list[QuantumInput] = []
        for tenant, loss in enumerate(self._losses):
            scratch = None if forward_only else scratches[tenant]
            for start, stop in self._cuts[tenant]:
                tenants.append(tenant)
                quanta.append(QuantumInput(self.states[tenant], self._datums[tenant][start:stop], loss, scratch, start))
        sizes = [sum(datum.num_tokens for datum in quantum.datums) for quantum in quanta]
        losses = [0.0] * len(self.states)
        for batch in micro_batches(sizes, self._pass_tokens):
            results = run_micro_batch(self.base, [quanta[index] for index in batch], recompute=self._recompute)
            for index, result in zip(batch, results, strict=True):
                if result.failure is not None:
                    raise result.failure
                losses[tenants[index]] += sum_metrics([result])["loss:sum"]
        return losses, scratches

    def run_optimizer(self, scratches: Sequence[GradientArena]) -> None:
        """Take over the gradients and step every tenant."""
        for state, scratch in zip(self.states, scratches, strict=True):
            commit_scratch(state, scratch)
        for result in adamw_steps([(state, ADAM) for state in self.states]):
            if isinstance(result, TreadleError):
                raise result

    def passes(self) -> list[TenantPass]:
        """Losses and gradients, without a step: what the correctness gate compares."""
        losses, scratches = self.run_passes()
        passes = []
        for loss, scratch in zip(losses, scratches, strict=True):
            grads = {module: (scratch.a(module).clone(), scratch.b(module).clone()) for module in scratch.modules}
            passes.append(TenantPass(loss, grads))
            scratch.release()
        return passes

    def adapters(self) -> list[Gradients]:
        """Each tenant's A [R, I] and B [O, R] by module name, to start another side from the same weights."""
        return [
            {module: (state.weights.a(module), state.weights.b(module)) for module in state.weights.modules}
            for state in self.states
        ]


def load(model_dir: str | Path, *, dtype: str = "float32", device: str = "cpu", threads: int = 1) -> BaseModel:
    """The base model under the engine."""
    return load_base_model(str(model_dir), name="bench/model", device=device, dtype=dtype, num_threads=threads)


def _new_state(base: BaseModel, workload: Workload, tenant: int) -> TrainingState:
    spec = LoraSpec(rank=workload.rank, seed=tenant, train_unembed=workload.train_unembed)
    state = new_training_state(base, spec)
    generator = torch.Generator(base.device).manual_seed(tenant)
    for module in state.weights.modules:
        state.weights.b(module).normal_(0, _B_SCALE, generator=generator)
    # The optimiser's bounds were those of the fresh weights.
    state.magnitudes = None
    return state


def _datum(tokens: np.ndarray, loss: Loss, seed: tuple[int, int]) -> Datum:
    """The sequence as a client would send it for this loss; RL inputs are random but plausible."""
    targets = tokens[1:].astype(np.int64)
    if loss.name == "cross_entropy":
        return Datum(tokens[:-1], {"target_tokens": targets, "weights": np.ones(len(targets), np.float32)})
    rng = np.random.default_rng((*seed, len(targets)))
    return Datum(
        tokens[:-1],
        {
            "target_tokens": targets,
            "logprobs": rng.normal(-8.0, 0.5, len(targets)).astype(np.float32),
            "advantages": rng.normal(size=len(targets)).astype(np.float32),
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tenants", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128] * 4, help="one tenant's sequences")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pass-tokens", type=int, default=4096)
    args = parser.parse_args()
    workload = Workload(args.tenants, tuple(args.lengths), args.rank)
    side = EngineSide(load(args.model), workload, pass_tokens=args.pass_tokens)
    for _ in range(2):
        side.step()
    started = time.process_time()
    for _ in range(args.steps):
        side.step()
    cpu_s = time.process_time() - started
    rate = args.steps * workload.num_tokens / cpu_s
    print(json.dumps({"tokens_per_cpu_s": rate, "peak_rss_mb": peak_rss_mb()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
