"""What crosses the pipe between a server and its local worker process: frozen values, pickled.

The pipe is private to the two processes of one treadle, started from the same installation; nothing from
the network is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.limits import PARK_AFTER_S
from treadle.domain.outcome import CycleOutcome, PoolFacts, SampledPart, SampleOutcome, SnapshotWritten, WorkerVitals
from treadle.domain.plan import CycleWork, SampleWork, StateTag


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Everything a worker process needs to know; sent as the first message.

    num_threads and micro_batch_tokens 0 mean: choose from the model and the device. parking_dir: a directory of this
    host for runs without work, None to keep them in memory; max_resident_bytes: of runs, 0 for no limit. staging_dir:
    memory of this host, as a directory, where new sampler versions lie until their blobs are durable; None: a save is
    answered when its blob is. num_on_host: workers of the pool that share this host's cores and devices; device_index:
    of several devices the one for this worker, from the last one on when negative, unless `device` names one.
    """

    base_model: str
    source: str
    revision: str | None
    device: str
    dtype: str
    num_threads: int
    blobs_url: str
    max_running_samples: int
    max_cached_tokens: int
    micro_batch_tokens: int = 0
    parking_dir: str | None = None
    park_after_s: float = PARK_AFTER_S
    max_resident_bytes: int = 0
    staging_dir: str | None = None
    num_on_host: int = 1
    device_index: int = 0
    hub: str = "huggingface"
    log_level: str = "info"
    log_format: Literal["console", "json"] = "console"


@dataclass(frozen=True, slots=True)
class RunCycle:
    work: CycleWork


@dataclass(frozen=True, slots=True)
class SubmitSamples:
    samples: tuple[SampleWork, ...]


@dataclass(frozen=True, slots=True)
class CancelSamples:
    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    call_id: int
    targets: tuple[tuple[StateTag, str], ...]
    with_open_gradient: bool


@dataclass(frozen=True, slots=True)
class Evict:
    call_id: int
    model_ids: tuple[ModelId, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True)
class Loaded:
    facts: PoolFacts


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The base model could not be loaded; `is_config` when an operator's setting is to blame."""

    message: str
    is_config: bool


@dataclass(frozen=True, slots=True)
class CycleDone:
    outcome: CycleOutcome


@dataclass(frozen=True, slots=True)
class CycleRefused:
    """The plan's token is older than one the worker has seen, from the start or since a newer one came."""

    token: int
    cycle: int
    message: str


@dataclass(frozen=True, slots=True)
class SamplesDone:
    outcomes: tuple[SampleOutcome, ...]


@dataclass(frozen=True, slots=True)
class SamplesGrew:
    """Tokens of running samples that somebody watches."""

    parts: tuple[SampledPart, ...]


@dataclass(frozen=True, slots=True)
class CallDone:
    """The answer to Snapshot or Evict; what is durable of a snapshot."""

    call_id: int
    written: Mapping[ModelId, SnapshotWritten] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """A unit of work ended, or the worker is only waiting for a disk: it is not hung. vitals: sent now and then."""

    vitals: WorkerVitals | None = None


ToWorker = RunCycle | SubmitSamples | CancelSamples | Snapshot | Evict | Stop
FromWorker = Loaded | LoadFailed | CycleDone | CycleRefused | SamplesDone | SamplesGrew | CallDone | Progress
