"""From settings to a loaded worker: the base model, the sampler on top of it, and sizes chosen from both."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from treadle.domain.limits import QUANTUM_TOKENS
from treadle.engine.base_model import BaseModel, load_base_model, numerics_profile
from treadle.sampler.base import SamplerLimits
from treadle.sampler.builtin import open_sampler
from treadle.worker.blob_io import BlobIO
from treadle.worker.guarded_sampler import GuardedSampler
from treadle.worker.modelscope_hub import fetch_from_modelscope
from treadle.worker.worker import Worker

# A small model's matrices are too small to share between cores: a second thread mostly waits and burns its core.
SMALL_MODEL_PARAMETERS = 50_000_000
MAX_AUTO_THREADS = 8
# Memory that the activations of one micro-batch may take when nobody set micro_batch_tokens.
ACTIVATION_BYTES_CPU = 1 * 2**30
ACTIVATION_BYTES_GPU = 8 * 2**30
MAX_AUTO_MICRO_BATCH_TOKENS = 16_384
# Keys and values of running samples.
CACHE_BYTES = 1 * 2**30


def build_worker(
    *,
    base_model: str,
    source: str,
    revision: str | None,
    hub: str = "huggingface",
    device: str,
    dtype: str,
    num_threads: int,
    blobs: BlobIO,
    max_running_samples: int,
    max_cached_tokens: int,
    micro_batch_tokens: int,
) -> Worker:
    """A worker with its base model loaded. 0 for the three sizes means: choose from model and device.

    Raises ConfigError when the model cannot be loaded or its architecture is not supported.
    """
    device = _chosen_device(device)
    if hub == "modelscope" and not Path(source).is_dir():
        # What was downloaded is a directory like any other, whose digest is recorded as the revision.
        source, revision = fetch_from_modelscope(source, revision), None
    base = load_base_model(
        source,
        name=base_model,
        device=device,
        dtype=_chosen_dtype(dtype, device),
        revision=revision,
        num_threads=num_threads or None,
    )
    if num_threads == 0:
        _choose_threads(base)
    limits = SamplerLimits(max_running=max_running_samples, max_cached_tokens=max_cached_tokens or _cached_tokens(base))
    return Worker(
        base=base,
        sampler=GuardedSampler(lambda: open_sampler(base, limits=limits)),
        blobs=blobs,
        micro_batch_tokens=micro_batch_tokens or _micro_batch_tokens(base),
    )


def _chosen_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _chosen_dtype(dtype: str, device: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def _choose_threads(base: BaseModel) -> None:
    """Intra-op threads for a model of this size on this machine's cores; part of the numerics profile."""
    is_small = base.facts.num_parameters < SMALL_MODEL_PARAMETERS
    torch.set_num_threads(1 if is_small else min(os.cpu_count() or 1, MAX_AUTO_THREADS))
    base.facts = replace(base.facts, numerics_profile=numerics_profile(base.device, base.facts.dtype))


def _micro_batch_tokens(base: BaseModel) -> int:
    """Tokens whose activations fit: per layer about 16 vectors of the hidden and 4 of the MLP's size are kept."""
    element = base.dtype.itemsize
    per_layer = 16 * base.hidden_size + 4 * int(base.config.intermediate_size)
    room = ACTIVATION_BYTES_CPU if base.device.type == "cpu" else ACTIVATION_BYTES_GPU
    fitting = room // (element * base.num_layers * per_layer)
    return max(QUANTUM_TOKENS, min(MAX_AUTO_MICRO_BATCH_TOKENS, fitting))


def _cached_tokens(base: BaseModel) -> int:
    per_token = 2 * base.num_layers * base.num_kv_heads * base.head_dim * base.dtype.itemsize
    return max(base.max_context_length, CACHE_BYTES // per_token)
