"""The PEFT loops that the engine and the server are measured against, one tenant after another.

    python scripts/bench/peft_baseline.py MODEL_DIR [--way p0|p1] [--tenants 1] [--steps 30]

P0, the stock loop: set_adapter, one padded batch with a mask, full logits, cross_entropy, backward, torch.optim.AdamW
as it comes, zero_grad. Adapters stay float32 over a bfloat16 base (peft's default).

P1, the best loop we could write around peft's layers and its one-adapter forward:
- packed: sequences one after another in one row, causal attention per sequence (equal neighbours share one call), no
  padding, no mask;
- no switching cost: the layers of all adapters are found once, and only their active name is written;
- the head runs on packed rows, in chunks that never hold more than 64 MiB of logits, each forward and backward at
  once, so that nothing is kept or computed twice;
- one fused AdamW over the adapters of all tenants;
- adapters in the base's dtype, so bfloat16 where the base is.

Both have LoRA on every projection and on lm_head, as the SDK sends it. Run alone it prints JSON: trained tokens per
CPU-second of whole steps and peak resident memory of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from report import peak_rss_mb
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from workload import Workload, micro_batches, token_sequences

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
LEARNING_RATE = 1e-4
_PACKED = "bench-packed"
_LENGTHS = "bench_lengths"
_LOGITS_BYTES = 64 << 20
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward of one tenant.

    P0: tokens, targets [N, L], padded on the right (mask None when nothing is). P1: one packed row [1, T], whose
    positions restart with each sequence.
    """

    tokens: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    mask: Tensor | None = None
    positions: Tensor | None = None


class PeftLoop:
    """What both loops share: one model with an adapter per tenant, named t0, t1, ..."""

    name = ""

    def __init__(self, model: nn.Module, workload: Workload, *, pass_tokens: int, keeps_float32: bool) -> None:
        config = LoraConfig(
            r=workload.rank, lora_alpha=32, target_modules=TARGETS if workload.train_unembed else TARGETS[:-1]
        )
        with warnings.catch_warnings():
            # Tied heads need care when merged; nothing is merged here.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            warnings.filterwarnings("ignore", category=FutureWarning)
            self.model = get_peft_model(model, config, adapter_name="t0", autocast_adapter_dtype=keeps_float32)
            for tenant in range(1, workload.num_tenants):
                self.model.add_adapter(f"t{tenant}", config, autocast_adapter_dtype=keeps_float32)
        self.workload = workload
        self.device = next(model.parameters()).device
        vocab_size = int(model.config.vocab_size)
        self._batches = [
            self._batches_of(token_sequences(workload, tenant, vocab_size), pass_tokens)
            for tenant in range(workload.num_tenants)
        ]
        self._layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}

    def load_adapters(self, adapters: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> None:
        """Start from these A [R, I] and B [O, R] per tenant, by module name."""
        with torch.no_grad():
            for tenant, weights in enumerate(adapters):
                pairs = self._pairs(tenant)
                assert pairs.keys() == weights.keys(), sorted(pairs.keys() ^ weights.keys())[:4]
                for module, (a, b) in weights.items():
                    pairs[module][0].copy_(a)
                    pairs[module][1].copy_(b)

    def passes(self) -> list[tuple[float, dict[str, tuple[Tensor, Tensor]]]]:
        """Per tenant the summed loss and the gradients of A and B by module name, without a step."""
        found = []
        for tenant in range(self.workload.num_tenants):
            loss = self.run_pass(tenant)
            pairs = self._pairs(tenant)
            grads = {}
            for module, (a, b) in pairs.items():
                assert a.grad is not None
                assert b.grad is not None
                grads[module] = (a.grad.clone(), b.grad.clone())
            found.append((loss.item(), grads))
            for a, b in pairs.values():
                a.grad = b.grad = None
        return found

    def run_pass(self, tenant: int) -> Tensor:
        """Forward, loss and backward of one tenant; its summed loss."""
        raise NotImplementedError

    def step(self) -> list[float]:
        """A whole step of every tenant; their summed losses."""
        raise NotImplementedError

    def _batches_of(self, sequences: Sequence[Any], pass_tokens: int) -> list[Batch]:
        lengths = [len(sequence) - 1 for sequence in sequences]
        return [self._batch([sequences[i] for i in chosen]) for chosen in micro_batches(lengths, pass_tokens)]

    def _batch(self, sequences: Sequence[Any]) -> Batch:
        lengths = tuple(len(sequence) - 1 for sequence in sequences)
        tokens = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
        targets = torch.full_like(tokens, _IGNORED)
        for row, sequence in enumerate(sequences):
            tokens[row, : lengths[row]] = torch.from_numpy(sequence[:-1].astype("int64"))
            targets[row, : lengths[row]] = torch.from_numpy(sequence[1:].astype("int64"))
        mask = None if len(set(lengths)) == 1 else (targets != _IGNORED).long().to(self.device)
        return Batch(tokens.to(self.device), targets.to(self.device), lengths, mask=mask)

    def _pairs(self, tenant: int) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        name = f"t{tenant}"
        return {
            path.removeprefix("base_model.model."): (layer.lora_A[name].weight, layer.lora_B[name].weight)
            for path, layer in self._layers.items()
        }


class StockPeft(PeftLoop):
    """P0."""

    name = "p0"

    def __init__(self, model: nn.Module, workload: Workload, *, pass_tokens: int) -> None:
        super().__init__(model, workload, pass_tokens=pass_tokens, keeps_float32=True)
        self._optimizers = []
        for tenant in range(workload.num_tenants):
            parameters = [weight for pair in self._pairs(tenant).values() for weight in pair]
            self._optimizers.append(torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0))

    def run_pass(self, tenant: int) -> Tensor:
        """See PeftLoop."""
        self.model.set_adapter(f"t{tenant}")
        total = torch.zeros((), device=self.device)
        for batch in self._batches[tenant]:
            logits = self.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
            loss = functional.cross_entropy(
                logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum", ignore_index=_IGNORED
            )
            loss.backward()
            total += loss.detach()
        return total

    def step(self) -> list[float]:
        """See PeftLoop."""
        losses = []
        for tenant, optimizer in enumerate(self._optimizers):
            losses.append(self.run_pass(tenant))
            optimizer.step()
            optimizer.zero_grad()
        return [loss.item() for loss in losses]


class PackedPeft(PeftLoop):
    """P1."""

    name = "p1"

    def __init__(self, model: nn.Module, workload: Workload, *, pass_tokens: int) -> None:
        AttentionInterface.register(_PACKED, _attend_per_sequence)
        model.set_attn_implementation(_PACKED)  # type: ignore[operator]  # a method of transformers' models
        super().__init__(model, workload, pass_tokens=pass_tokens, keeps_float32=False)
        causal_model = self.model.base_model.model
        self._transformer = causal_model.model
        self._head = causal_model.lm_head
        parameters = []
        for tenant in range(workload.num_tenants):
            for pair in self._pairs(tenant).values():
                parameters.extend(weight.requires_grad_(True) for weight in pair)
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def run_pass(self, tenant: int) -> Tensor:
        """See PeftLoop."""
        for layer in self._layers.values():
            # What set_adapter writes, without its walk over every adapter's requires_grad.
            layer._active_adapter = [f"t{tenant}"]
        total = torch.zeros((), device=self.device)
        for batch in self._batches[tenant]:
            hidden = self._transformer(
                input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, **{_LENGTHS: batch.lengths}
            ).last_hidden_state[0]
            total += self._head_and_back(hidden, batch.targets[0])
        return total

    def step(self) -> list[float]:
        """See PeftLoop."""
        losses = [self.run_pass(tenant) for tenant in range(self.workload.num_tenants)]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.stack(losses).tolist()

    def _head_and_back(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The loss; gradients of the head's adapter chunk by chunk, then one backward through the layers."""
        detached = hidden.detach().requires_grad_()
        rows = max(64, _LOGITS_BYTES // (4 * self.model.config.vocab_size))
        total = torch.zeros((), device=self.device)
        for part, wanted in zip(detached.split(rows), targets.split(rows), strict=True):
            loss = functional.cross_entropy(self._head(part).float(), wanted, reduction="sum")
            loss.backward()
            total += loss.detach()
        hidden.backward(detached.grad)
        return total

    def _batch(self, sequences: Sequence[Any]) -> Batch:
        lengths = tuple(len(sequence) - 1 for sequence in sequences)
        tokens = torch.cat([torch.from_numpy(sequence[:-1].astype("int64")) for sequence in sequences])
        targets = torch.cat([torch.from_numpy(sequence[1:].astype("int64")) for sequence in sequences])
        positions = torch.cat([torch.arange(length) for length in lengths])
        tokens, targets, positions = (row[None].to(self.device) for row in (tokens, targets, positions))
        return Batch(tokens, targets, lengths, positions=positions)


def _attend_per_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention over one packed row: [1, H, T, d] in, [1, T, H, d] out."""
    assert attention_mask is None
    runs: list[list[int]] = []
    for length in kwargs[_LENGTHS]:
        if runs and runs[-1][0] == length:
            runs[-1][1] += 1
        else:
            runs.append([length, 1])
    sizes = [length * count for length, count in runs]
    mixed = []
    for (length, count), *parts in zip(runs, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        q, k, v = (part.reshape(part.shape[1], count, length, part.shape[3]).transpose(0, 1) for part in parts)
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        mixed.append(out.transpose(1, 2).reshape(1, length * count, *out.shape[1::2]))
    return torch.cat(mixed, dim=1), None


LOOPS: Mapping[str, type[PeftLoop]] = {"p0": StockPeft, "p1": PackedPeft}


def load(model_dir: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The base model as a PEFT user loads it, frozen."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
    return model.requires_grad_(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--way", choices=sorted(LOOPS), default="p0")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tenants", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="one tenant's sequences")
    parser.add_argument("--batch", type=int, default=4, help="without --lengths: this many sequences")
    parser.add_argument("--seqlen", type=int, default=128, help="without --lengths: each of this length")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pass-tokens", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = tuple(args.lengths or [args.seqlen] * args.batch)
    workload = Workload(args.tenants, lengths, args.rank)
    loop = LOOPS[args.way](load(args.model), workload, pass_tokens=args.pass_tokens)  # type: ignore[call-arg]
    for _ in range(min(5, args.steps)):
        loop.step()
    started = time.process_time()
    for _ in range(args.steps):
        loop.step()
    cpu_s = time.process_time() - started
    rate = args.steps * workload.num_tokens / cpu_s
    print(json.dumps({"tokens_per_cpu_s": rate, "peak_rss_mb": peak_rss_mb()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
