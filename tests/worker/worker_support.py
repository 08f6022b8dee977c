"""Driving a real worker without a process around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treadle.config import bundled_model_dir
from treadle.domain.ids import BlobKey, ModelId, SamplingSessionId, op_request_id
from treadle.domain.losses import resolve_loss
from treadle.domain.ops import (
    AdamParams,
    CreateModelOp,
    Datum,
    LoraSpec,
    OptimStepOp,
    PassOp,
    SaveForSamplerOp,
    SaveWeightsOp,
    TrainingOp,
    kind_of,
)
from treadle.domain.outcome import CycleOutcome, OpOutcome
from treadle.domain.plan import PlannedOp, RestoreItem, StateTag, WorkItem
from treadle.domain.quanta import cut_quanta
from treadle.errors import NotFound
from treadle.testing.clock import ManualClock
from treadle.worker.build import build_worker
from treadle.worker.work import DecodedCycle, DecodedItem
from treadle.worker.worker import Worker


class MemoryBlobs:
    """A blob store in a dictionary."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def write(self, key: str, data: bytes) -> int:
        assert key not in self.blobs, "blobs are never overwritten"
        self.blobs[key] = data
        return len(data)

    def read(self, key: str) -> bytes:
        if key not in self.blobs:
            raise NotFound(f"there is no blob {key}")
        return self.blobs[key]

    def exists(self, key: str) -> bool:
        return key in self.blobs


def model_id(index: int = 0) -> ModelId:
    return ModelId(f"session:train:{index}")


def datums(num_datums: int, num_tokens: int, *, seed: int = 0) -> tuple[Datum, ...]:
    """Random sequences of the bundled model's vocabulary with their targets."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(10, 900, (num_datums, num_tokens + 1))
    return tuple(Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:].astype(np.int64)}) for row in rows)


def create(run: ModelId, *, rank: int = 8, seed: int = 1) -> CreateModelOp:
    return CreateModelOp(run, "treadle/tiny", LoraSpec(rank=rank, seed=seed))


def passed(
    run: ModelId, seq_id: int, data: tuple[Datum, ...], *, loss: str = "cross_entropy", forward_only: bool = False
) -> PassOp:
    return PassOp(run, seq_id, data, resolve_loss(loss, {}), forward_only)


def step(run: ModelId, seq_id: int, *, learning_rate: float = 1e-2) -> OptimStepOp:
    return OptimStepOp(run, seq_id, AdamParams(learning_rate=learning_rate))


def save(run: ModelId, seq_id: int) -> SaveWeightsOp:
    return SaveWeightsOp(run, seq_id, name=f"at-{seq_id}")


def publish(run: ModelId, seq_id: int) -> SaveForSamplerOp:
    return SaveForSamplerOp(run, seq_id, name=f"at-{seq_id}")


def hand_off(run: ModelId, seq_id: int) -> SaveForSamplerOp:
    """A save without a name, as save_weights_and_get_sampling_client sends it."""
    return SaveForSamplerOp(run, seq_id, sampling_session_id=SamplingSessionId(f"session:sample:{seq_id}"))


def item(
    op: TrainingOp,
    *,
    starts_from: StateTag | str | None = "previous",
    quanta: tuple[int, int] | None = None,
    blob_key: str | None = None,
) -> DecodedItem:
    """A work item for `op`; starts_from "previous" is incarnation 1 at seq_id - 1 (None for a create)."""
    seq_id = getattr(op, "seq_id", 0)
    if starts_from == "previous":
        starts_from = StateTag(op.model_id, 1, seq_id - 1) if seq_id else None
    assert not isinstance(starts_from, str)
    all_quanta: tuple[tuple[int, int], ...] = ()
    num_tokens = 0
    if isinstance(op, PassOp):
        all_quanta = cut_quanta([datum.num_tokens for datum in op.datums])
        num_tokens = sum(datum.num_tokens for datum in op.datums)
    start, stop = quanta or (0, len(all_quanta))
    planned = PlannedOp(
        request_id=op_request_id(op.model_id, seq_id),
        model_id=op.model_id,
        seq_id=seq_id,
        kind=kind_of(op),
        quantum_start=start,
        quantum_stop=stop,
        num_tokens=num_tokens,
        is_last_part=stop == len(all_quanta),
    )
    key = BlobKey(blob_key or f"states/{op.model_id}/{seq_id}".replace(":", "_"))
    return DecodedItem(item=WorkItem(planned, b"", starts_from, blob_key=key), op=op)


class Driver:
    """Runs cycles on a worker, numbering them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.token = 1
        self._cycle = 0

    def run(self, items: Sequence[DecodedItem], *, restores: Sequence[RestoreItem] = ()) -> CycleOutcome:
        """One cycle, driven to its end."""
        self._cycle += 1
        running = self.worker.begin_cycle(DecodedCycle(self.token, self._cycle, tuple(items), tuple(restores)))
        while True:
            try:
                next(running)
            except StopIteration as done:
                outcome: CycleOutcome = done.value
                return outcome

    def snapshot(self, tag: StateTag, key: str, *, with_open_gradient: bool = True) -> bytes | None:
        """Write the state held at exactly this tag; its file."""
        data = self.worker.encode_snapshot(tag, with_open_gradient)
        if data is not None:
            self.worker.write_blob(key, data)
        return data

    def run_ops(self, *ops: TrainingOp) -> tuple[OpOutcome, ...]:
        """One cycle of whole ops that all succeed."""
        outcomes = self.run([item(op) for op in ops]).outcomes
        assert [outcome.failure for outcome in outcomes] == [None] * len(ops)
        return outcomes


def new_driver(
    blobs: MemoryBlobs,
    *,
    micro_batch_tokens: int = 0,
    parking_dir: Path | None = None,
    max_resident_bytes: int = 0,
    staging_dir: Path | None = None,
    clock: ManualClock | None = None,
) -> Driver:
    """A fresh worker on the bundled model; several of them may share the blobs, as processes do."""
    worker = build_worker(
        base_model="treadle/tiny",
        source=str(bundled_model_dir()),
        revision=None,
        device="cpu",
        dtype="float32",
        num_threads=1,
        blobs=blobs,
        max_running_samples=8,
        max_cached_tokens=0,
        micro_batch_tokens=micro_batch_tokens,
        parking_dir=parking_dir,
        max_resident_bytes=max_resident_bytes,
        staging_dir=staging_dir,
        clock=(clock or ManualClock()).monotonic,
    )
    return Driver(worker)


def metrics_of(outcome: OpOutcome) -> dict[str, float]:
    result: Any = outcome.result
    return dict(result.metrics)
