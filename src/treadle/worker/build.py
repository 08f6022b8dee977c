"""From settings to a loaded worker: the base model, the sampler on top of it, and sizes chosen from both."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from treadle.domain.limits import PARK_AFTER_S
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.memory import available_host_bytes, measure_pass_cost, pass_limits
from treadle.errors import ConfigError
from treadle.sampler.base import SamplerLimits
from treadle.sampler.builtin import open_sampler
from treadle.telemetry.logs import get_logger
from treadle.worker.blob_io import BlobIO
from treadle.worker.guarded_sampler import GuardedSampler
from treadle.worker.handoff import Handoff
from treadle.worker.modelscope_hub import fetch_from_modelscope
from treadle.worker.parking import FileShelf, PinnedShelf, Shelf
from treadle.worker.slots import ParkingRules
from treadle.worker.worker import Worker

log = get_logger(__name__)

# A small model's matrices are too small to share between cores: a second thread mostly waits and burns its core.
SMALL_MODEL_PARAMETERS = 50_000_000
MAX_AUTO_THREADS = 8
# treadle.config knows it too, but a worker needs none of what importing that costs.
_BUNDLED_DIR = Path(__file__).parents[1] / "bundled" / "tiny"
# The share of free host memory that parked runs may take beside a GPU, page-locked; beyond it they go to the file.
PINNED_SHARE = 0.25
# Keys and values of running samples.
CACHE_BYTES = 1 * 2**30


def build_worker(
    *,
    base_model: str,
    source: str,
    revision: str | None,
    hub: str = "huggingface",
    device: str,
    num_on_host: int = 1,
    device_index: int = 0,
    dtype: str,
    num_threads: int,
    blobs: BlobIO,
    max_running_samples: int,
    max_cached_tokens: int,
    micro_batch_tokens: int,
    parking_dir: Path | None = None,
    park_after_s: float = PARK_AFTER_S,
    max_resident_bytes: int = 0,
    staging_dir: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Worker:
    """A worker with its base model loaded. 0 for the three sizes means: choose from model and device.

    parking_dir: where idle runs are parked, None for nowhere; max_resident_bytes: of runs, 0 for no limit.
    staging_dir: memory of this machine as a directory, for versions on their way to the blobs; None: they go there
    first. Raises ConfigError when the model cannot be loaded, its architecture is not supported, or that directory
    cannot be used.
    """
    device = _chosen_device(device, num_on_host, device_index)
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
        _choose_threads(base, num_on_host)
    limits = SamplerLimits(max_running=max_running_samples, max_cached_tokens=max_cached_tokens or _cached_tokens(base))
    cost = measure_pass_cost(base)
    passes = pass_limits(base, cost, micro_batch_tokens=micro_batch_tokens)
    log.info("pass limits", limits=passes, bytes_per_token=dict(cost.bytes_per_token), fixed_bytes=cost.fixed_bytes)
    worker = Worker(
        base=base,
        sampler=GuardedSampler(lambda: open_sampler(base, limits=limits), make_room=lambda: worker.make_room()),
        blobs=blobs,
        limits=passes,
        handoff=Handoff(blobs, staging_dir=staging_dir),
        parking=_parking_rules(base, parking_dir, park_after_s, max_resident_bytes),
        clock=clock,
    )
    return worker


def warm_up() -> None:
    """Load the bundled model on the CPU, run a little of it and forget it.

    A load imports half of transformers on its way, and the first passes set up torch: a process that has been through
    it loads a small model in 0.2 s of processor time instead of 2.5 (torch 2.13, transformers 5). It changes nothing
    that a later load does not set itself.
    """
    measure_pass_cost(
        load_base_model(str(_BUNDLED_DIR), name="treadle/tiny", device="cpu", dtype="float32", num_threads=1)
    )


def _chosen_device(device: str, num_on_host: int, index: int) -> str:
    """With several workers on a host each gets a GPU of its own. Raises ConfigError when there are too few."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda" or (num_on_host == 1 and index == 0):
        return device
    num = torch.cuda.device_count()
    place = index if index >= 0 else num + index
    if num_on_host > num or not 0 <= place < num:
        wanted = max(num_on_host, abs(index) + 1)
        raise ConfigError(
            f"{wanted} workers of one model want a GPU each, and this machine has {num}; have fewer workers, or pin "
            "engine.device to cuda:N to let them share one"
        )
    return f"cuda:{place}"


def _chosen_dtype(dtype: str, device: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def _choose_threads(base: BaseModel, num_on_host: int) -> None:
    """Intra-op threads for a model of this size on this machine's cores; part of the numerics profile."""
    is_small = base.facts.num_parameters < SMALL_MODEL_PARAMETERS
    cores = max(1, (os.cpu_count() or 1) // num_on_host)
    torch.set_num_threads(1 if is_small else min(cores, MAX_AUTO_THREADS))
    base.note_profile()


def _parking_rules(base: BaseModel, directory: Path | None, after_s: float, max_resident_bytes: int) -> ParkingRules:
    shelves: list[Shelf] = []
    if base.device.type != "cpu":
        shelves.append(PinnedShelf(int(PINNED_SHARE * available_host_bytes())))
    if directory is not None:
        shelves.append(FileShelf(directory))
    return ParkingRules(shelves=tuple(shelves), after_s=after_s, max_resident_bytes=max_resident_bytes)


def _cached_tokens(base: BaseModel) -> int:
    per_token = 2 * base.num_layers * base.num_kv_heads * base.head_dim * base.dtype.itemsize
    return max(base.max_context_length, CACHE_BYTES // per_token)
