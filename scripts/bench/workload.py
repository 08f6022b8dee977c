"""What the engine's benchmarks train on: tenants with random sequences, and how many FLOPs that is.

Knows no model beyond the shapes of its projections, and nothing of who trains. Invariant: the data of a workload
depends on the workload alone, so that every side of a comparison sees the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Ids below are special tokens in many vocabularies.
_FIRST_TOKEN = 10


@dataclass(frozen=True, slots=True)
class Workload:
    """One step of every tenant: `lengths` are one tenant's sequences; all tenants have the same ones.

    Targets are the next tokens, so a sequence of n has n inputs and n targets, all of weight 1.
    """

    num_tenants: int
    lengths: tuple[int, ...]
    rank: int
    train_unembed: bool = True
    seed: int = 0

    @property
    def tokens_per_tenant(self) -> int:
        return sum(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.num_tenants * self.tokens_per_tenant

    @property
    def label(self) -> str:
        """As people write it: tenants x sequences x length."""
        if len(set(self.lengths)) == 1:
            return f"{self.num_tenants} x {len(self.lengths)} x {self.lengths[0]}"
        return f"{self.num_tenants} x {len(self.lengths)} of {min(self.lengths)}..{max(self.lengths)}"

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        return {**asdict(self), "label": self.label, "tokens_per_tenant": self.tokens_per_tenant}


def even_lengths(num_tokens: int, longest: int) -> tuple[int, ...]:
    """num_tokens as equal sequences of at most `longest`, which must divide it when it is the shorter."""
    length = min(num_tokens, longest)
    assert num_tokens % length == 0, f"{num_tokens} tokens are not whole sequences of {length}"
    return (length,) * (num_tokens // length)


def uneven_lengths(count: int, shortest: int, longest: int, *, seed: int = 0) -> tuple[int, ...]:
    """`count` lengths spread evenly over [shortest, longest], in random order."""
    spread = np.linspace(shortest, longest, count).round().astype(int)
    return tuple(int(length) for length in np.random.default_rng(seed).permutation(spread))


def token_sequences(workload: Workload, tenant: int, vocab_size: int) -> list[NDArray[np.int32]]:
    """The tenant's sequences, each one token longer than its length: inputs are [:-1], targets [1:]."""
    rng = np.random.default_rng((workload.seed, tenant))
    return [rng.integers(_FIRST_TOKEN, vocab_size, length + 1, dtype=np.int32) for length in workload.lengths]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What FLOPs are counted from. projections: (inputs, outputs) of every adapted linear map, head included."""

    projections: tuple[tuple[int, int], ...]
    head: tuple[int, int]
    num_layers: int
    num_heads: int
    head_dim: int

    @staticmethod
    def of(config: Any) -> ModelShape:
        """From a transformers configuration of a dense Qwen3 or Llama."""
        hidden, middle = int(config.hidden_size), int(config.intermediate_size)
        heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
        layer = (
            (hidden, heads * head_dim),
            (hidden, kv_heads * head_dim),
            (hidden, kv_heads * head_dim),
            (heads * head_dim, hidden),
            (hidden, middle),
            (hidden, middle),
            (middle, hidden),
        )
        num_layers = int(config.num_hidden_layers)
        head = (hidden, int(config.vocab_size))
        return ModelShape((*layer * num_layers, head), head, num_layers, heads, head_dim)

    @property
    def num_matrix_parameters(self) -> int:
        """Weights that every token is multiplied with: all projections and the head, not the embedding's lookup."""
        return sum(inputs * outputs for inputs, outputs in self.projections)


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one step that no implementation can do without. Recomputed work, padding and optimiser do not count.

    base: 2 x 2 x weights per token (forward, and backward into the input; frozen weights have no gradient).
    lora: 2 x 3 x rank x (inputs + outputs) per token and projection (forward, into the input, dA and dB).
    attention: 2 x 6 x length/2 x heads x head size per token and layer (causal; two products forward, four backward).
    """

    base: float
    lora: float
    attention: float

    @property
    def total(self) -> float:
        return self.base + self.lora + self.attention


def useful_flops(shape: ModelShape, workload: Workload) -> Flops:
    """The step's useful FLOPs."""
    adapted = shape.projections if workload.train_unembed else shape.projections[:-1]
    lora_per_token = 6 * workload.rank * sum(inputs + outputs for inputs, outputs in adapted)
    squares = workload.num_tenants * sum(length * length for length in workload.lengths)
    return Flops(
        base=4.0 * shape.num_matrix_parameters * workload.num_tokens,
        lora=float(lora_per_token * workload.num_tokens),
        attention=6.0 * squares * shape.num_layers * shape.num_heads * shape.head_dim,
    )


def micro_batches(tokens: Sequence[int], limit: int) -> list[range]:
    """Indexes of consecutive units that go into one pass: up to `limit` tokens together, a larger unit alone."""
    batches: list[range] = []
    start = total = 0
    for index, count in enumerate(tokens):
        if index > start and total + count > limit:
            batches.append(range(start, index))
            start, total = index, 0
        total += count
    batches.append(range(start, len(tokens)))
    return batches
