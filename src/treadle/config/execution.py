"""How models are run: by which processes, on which devices, with which sampler.

Sections of the Settings tree; tree.py puts them in their places. Invariant: nothing here says what a model is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from treadle.config.section import Section
from treadle.domain import limits


class EngineSettings(Section):
    """How the base model is run."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where the base model lives: auto, cpu, cuda or cuda:N. `auto` takes the GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the base weights. `auto`: float32 on a CPU, bfloat16 on a GPU."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where hub names are looked up. `modelscope` needs the extra: pip install 'treadle[modelscope]'."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one worker; 0 chooses from the number of cores."""
    micro_batch_tokens: int = Field(default=0, ge=0)
    """Most tokens of several requests in one forward/backward; 0 chooses from the memory measured at the start."""


class WorkerSettings(Section):
    """The processes that run a model: how many, where they keep the runs that they hold, what happens when one ends."""

    count: int = Field(default=1, ge=1, le=limits.MAX_WORKERS_PER_POOL)
    """Workers of each pool. Each holds the whole base model; a tenant's runs live on one of them. A model's own
    `workers` comes first, and `treadle admin pools scale` changes it while servers run."""
    samplers: int = Field(default=0, ge=0, le=limits.MAX_WORKERS_PER_POOL)
    """Workers of each pool that only sample. 0: those that train sample as well. A model's own `samplers` comes first.
    With `sampler.kind` vllm there is at least one."""

    park_after_s: float = Field(default=limits.PARK_AFTER_S, gt=0)
    """Seconds without work after which a run leaves device memory: to host memory beside a GPU, to a file in the data
    directory beside a CPU. It comes back when its next request runs."""
    max_resident_bytes: int = Field(default=0, ge=0)
    """Most device memory of runs, in bytes; beyond it the one that has been idle the longest leaves at once. 0: no
    limit but the memory there is."""
    hang_after_s: float = Field(default=limits.HANG_AFTER_S, ge=5)
    """Seconds that a worker with work may be silent before it counts as hung and is replaced; ten times as long as
    predicted for a cycle that was predicted to take longer. Loading the model is not bounded."""
    spare: bool = True
    """Keep a second worker process that has imported everything and takes over when the worker dies, some seconds
    sooner than a new one. It holds no model, but about 0.3 GB of memory."""


class ExecutorSettings(Section):
    """Where workers run. `executor = "ray"` is short for `executor.kind`."""

    kind: Literal["local", "ray"] = "local"
    """`local`: child processes of the server. `ray`: actors of a Ray cluster, which needs the extra `ray`."""
    ray_address: str = Field(default="", max_length=500)
    """Address of the Ray cluster's head, HOST:6379; `auto`: of the cluster that this machine is part of. Empty: a
    cluster on this machine, for as long as the server runs."""
    num_cpus: float = Field(default=1.0, ge=0)
    """Ray's CPUs that each worker reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray's GPUs that each worker reserves; a fraction lets several workers share one."""
    sampler_num_cpus: float = Field(default=1.0, ge=0)
    """The same for workers that only sample."""
    sampler_num_gpus: float = Field(default=0.0, ge=0)
    """The same for workers that only sample."""
    object_store_bytes: int = Field(default=0, ge=0)
    """Size of the object store of a cluster that the server starts itself; 0 leaves it to Ray."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Accepts the kind alone."""
        return {"kind": value} if isinstance(value, str) else value


class VllmSettings(Section):
    """vLLM as the sampler (`sampler.kind` vllm). Its own HTTP server is never started."""

    python: Path | None = None
    """The Python of another environment that has vllm and treadle installed, for where their requirements clash.
    Empty: the server's own."""
    max_adapters: int = Field(default=8, ge=1, le=256)
    """Adapters that one batch may hold."""
    max_lora_rank: int = Field(default=limits.MAX_LORA_RANK, ge=1)
    """Largest rank that vLLM reserves room for. Adapters of a higher one are sampled by the built-in sampler."""
    memory_fraction: float = Field(default=0.9, gt=0, le=1)
    """Share of the device's memory that one vLLM takes (of host memory on a CPU: see `cpu_cache_bytes`)."""
    cpu_cache_bytes: int = Field(default=2**30, gt=0)
    """Bytes of its KV cache on a CPU."""
    max_context_length: int = Field(default=0, ge=0)
    """Longest prompt and answer together, in tokens; 0: the model's own. Longer ones go to the built-in sampler."""


class SamplerSettings(Section):
    """Who draws tokens, and how many at once."""

    kind: Literal["builtin", "vllm"] = "builtin"
    """`builtin`: the worker's own, over the weights that it trains with. `vllm`: vLLM in processes of its own, which
    needs the extra `vllm`, or `sampler.vllm.python`."""
    vllm: VllmSettings = VllmSettings()

    max_running: int = Field(default=96, gt=0)
    """Most sequences decoded together; one tenant gets at most three quarters of them."""
    max_cached_tokens: int = Field(default=0, ge=0)
    """Most tokens in the KV cache; 0 chooses from the memory there is."""
    max_queued_samples_per_tenant: int = Field(default=4096, gt=0)
    """Requests of any kind a tenant may have waiting before its samples are told to back off (429)."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Accepts the kind alone: `sampler = "vllm"`."""
        return {"kind": value} if isinstance(value, str) else value
