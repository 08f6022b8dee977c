"""What vLLM is started with. Nothing of vLLM is imported: a server without it says what another process needs.

Invariant: every value reaches the engine as it is, or the start fails.
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle.domain.limits import MAX_LORA_RANK


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """max_adapters: versions in memory at once, and in one batch. max_lora_rank: room reserved for each.

    memory_fraction: of a GPU's memory. cpu_cache_bytes: of the KV cache on a CPU. max_context_length: tokens of prompt
    and answer together, 0 for the model's own.
    """

    max_adapters: int = 8
    max_lora_rank: int = MAX_LORA_RANK
    memory_fraction: float = 0.9
    cpu_cache_bytes: int = 2**30
    max_context_length: int = 0

    def __post_init__(self) -> None:
        assert self.max_adapters >= 1
        assert self.max_lora_rank >= 1
        assert 0.0 < self.memory_fraction <= 1.0
        assert self.cpu_cache_bytes > 0
        assert self.max_context_length >= 0
