"""Which executor serves which slot of which pool: the settings' kinds of workers, on the devices that there are.

A part of the composition root: the only place that knows every executor. Invariants: two workers of one pool get two
devices, or are refused, unless the settings pin one; all workers of a pool compute alike, so that a run may move.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from treadle.config import ModelSettings, Settings
from treadle.domain.roles import Role, Scale
from treadle.errors import ConfigError
from treadle.executor.base import PartsCallback
from treadle.executor.channel import SamplingChannel
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.executor.ray import RayCluster, RayExecutor
from treadle.executor.spare import WORKER_COMMAND, Spare
from treadle.executor.vllm import VllmExecutor
from treadle.sampler.vllm_options import VllmOptions
from treadle.scheduler.slot import slot_name
from treadle.worker.staging import staging_place

# LocalExecutor, or something with the same arguments.
MakeLocal: TypeAlias = Callable[..., LocalExecutor]

_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_GPUS = Path("/proc/driver/nvidia/gpus")


class Workers:
    """Makes the workers of one server. make_local: a child process that is not started yet, for its configuration."""

    def __init__(self, settings: Settings, *, make_local: MakeLocal, on_parts: PartsCallback) -> None:
        """Raises ConfigError when something is missing that the settings ask for."""
        self._settings = settings
        self._make_local = make_local
        self._on_parts = on_parts
        is_local, log = settings.executor.kind == "local", settings.log
        self._spare = Spare() if settings.worker.spare and is_local else None
        self._cluster = None
        if not is_local:
            self._cluster = RayCluster(
                settings.executor, keeps_spare=settings.worker.spare, log_level=log.level, log_format=log.format
            )
        self._staging_dir: str | None = None

    def scale_of(self, model: ModelSettings) -> Scale:
        """How many workers the settings want for a pool."""
        worker = self._settings.worker
        samplers = worker.samplers if model.samplers is None else model.samplers
        if self._settings.sampler.kind == "vllm":
            samplers = max(1, samplers)
        return Scale(worker.count if model.workers is None else model.workers, samplers)

    def launch_early(self) -> dict[str, dict[str, SamplingChannel]]:
        """Start the workers of all pools: they import and load while the server opens its store. By pool and slot.

        Where another server may lead already, there is only a spare, which has no model until it leads.
        """
        settings = self._settings
        if settings.is_shareable and not settings.scheduler.preload_standby:
            if self._spare is not None:
                self._spare.prepare(WORKER_COMMAND)
            return {}
        launched: dict[str, dict[str, SamplingChannel]] = {}
        for model in settings.models:
            scale, of_pool = self.scale_of(model), launched.setdefault(model.name, {})
            role = Role.TRAINING if scale.samplers else Role.BOTH
            for index in range(scale.workers):
                of_pool[slot_name(index, trains=True)] = self.make(model, index, role)
            for index in range(scale.samplers):
                of_pool[slot_name(index, trains=False)] = self.make(model, index, Role.SAMPLING)
        for of_pool in launched.values():
            for executor in of_pool.values():
                executor.launch()
        return launched

    def make(self, model: ModelSettings, index: int, role: Role) -> SamplingChannel:
        """A worker that is not started yet. One that trains is an Executor."""
        settings = self._settings
        config = self._config(model, index, role)
        name = f"{model.name}#{slot_name(index, trains=role is not Role.SAMPLING)}"
        hang_after_s = settings.worker.hang_after_s
        if role is Role.SAMPLING and settings.sampler.kind == "vllm":
            return self._vllm(config, name)
        if self._cluster is not None:
            return RayExecutor(
                config,
                cluster=self._cluster,
                role=role,
                name=name,
                hang_after_s=hang_after_s,
                on_parts=self._on_parts,
            )
        return self._make_local(
            config, role=role, name=name, spare=self._spare, hang_after_s=hang_after_s, on_parts=self._on_parts
        )

    async def stop(self) -> None:
        """End what all workers share. They have ended before."""
        if self._spare is not None:
            self._spare.stop()
        if self._cluster is not None:
            await self._cluster.stop()

    def _vllm(self, config: WorkerConfig, name: str) -> VllmExecutor:
        vllm = self._settings.sampler.vllm
        return VllmExecutor(
            config,
            options=VllmOptions(
                max_adapters=vllm.max_adapters,
                max_lora_rank=vllm.max_lora_rank,
                memory_fraction=vllm.memory_fraction,
                cpu_cache_bytes=vllm.cpu_cache_bytes,
                max_context_length=vllm.max_context_length,
            ),
            python=vllm.python,
            role=Role.SAMPLING,
            name=name,
            hang_after_s=self._settings.worker.hang_after_s,
            on_parts=self._on_parts,
        )

    def _config(self, model: ModelSettings, index: int, role: Role) -> WorkerConfig:
        settings = self._settings
        engine, sampler, worker = settings.engine, settings.sampler, settings.worker
        scale, directory = self.scale_of(model), model.local_dir()
        # Ray gives an actor its own devices; beside others on this host each takes one, samplers from the last on.
        num_on_host = 1 if self._cluster is not None else scale.workers + scale.samplers
        place = 0 if self._cluster is not None else index if role is not Role.SAMPLING else -1 - index
        device = engine.device
        if role is Role.SAMPLING and sampler.kind == "vllm":
            device = _device_of_vllm(device, index)
        return WorkerConfig(
            base_model=model.name,
            source=model.source if directory is None else str(directory),
            revision=model.revision,
            device=device,
            dtype=engine.dtype,
            num_threads=engine.threads,
            blobs_url=settings.blobs_url,
            max_running_samples=sampler.max_running,
            max_cached_tokens=sampler.max_cached_tokens,
            micro_batch_tokens=engine.micro_batch_tokens,
            parking_dir=str(settings.data_dir.resolve() / "parked"),
            park_after_s=worker.park_after_s,
            max_resident_bytes=worker.max_resident_bytes,
            staging_dir=self._staging(),
            hub=engine.hub,
            log_level=settings.log.level,
            log_format=settings.log.format,
            num_on_host=num_on_host,
            device_index=place,
        )

    def _staging(self) -> str:
        """One for all workers of this machine that share the blobs. It is made with the first of them."""
        if self._staging_dir is None:
            otherwise = self._settings.data_dir.resolve() / "staged"
            self._staging_dir = str(staging_place(self._settings.blobs_url, otherwise))
        return self._staging_dir


def _device_of_vllm(device: str, index: int) -> str:
    """Of several GPUs the last ones, which no worker that trains takes; else as the settings say."""
    num = _num_gpus()
    if device not in ("auto", "cuda") or num < 2:
        return device
    if index >= num:
        raise ConfigError(f"{index + 1} samplers want a GPU each, and there are {num}; have fewer samplers")
    return f"cuda:{num - 1 - index}"


def _num_gpus() -> int:
    """That this process may use, without asking a library that would take hold of them."""
    visible = os.environ.get(_VISIBLE_DEVICES)
    if visible is not None:
        return sum(bool(device.strip()) for device in visible.split(","))
    return sum(1 for _ in _GPUS.iterdir()) if _GPUS.is_dir() else 0
