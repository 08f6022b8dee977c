"""The first message to a vLLM child; what follows is the sampling half of messages.py."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.executor.messages import WorkerConfig
from treadle.sampler.vllm_options import VllmOptions


@dataclass(frozen=True, slots=True)
class StartVllm:
    """treadle_version: of the server; another environment must have the same. directory: the child's own, empty, for
    adapters on their way, in memory if there is any."""

    treadle_version: str
    worker: WorkerConfig
    options: VllmOptions
    directory: str
