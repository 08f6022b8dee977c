"""The worker's side of the messages, whatever carries them: load a model, then serve until told to stop.

It composes a Worker with its blob store, decodes payloads, encodes results, and turns messages into calls. Used by the
child process of a local executor and by the actor of a Ray executor; it refuses to know which.
Invariant: one thread computes; messages are taken in the order in which they were put.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

from treadle.blobs import open_blobs
from treadle.domain.limits import PROGRESS_EVERY_S, VITALS_EVERY_S
from treadle.domain.plan import CycleWork
from treadle.errors import ConfigError, Fenced
from treadle.executor.codec import decode_cycle, decode_samples, encode_cycle, encode_samples
from treadle.executor.messages import (
    CallDone,
    CancelSamples,
    CycleDone,
    CycleRefused,
    Evict,
    FromWorker,
    Loaded,
    LoadFailed,
    Progress,
    RunCycle,
    SamplesDone,
    SamplesGrew,
    Snapshot,
    Stop,
    SubmitSamples,
    ToWorker,
    WorkerConfig,
)
from treadle.telemetry.context import bind_context
from treadle.telemetry.logs import get_logger
from treadle.worker.build import build_worker
from treadle.worker.compute import ComputeLoop
from treadle.worker.snapshots import SnapshotCall
from treadle.worker.vitals import vitals_now
from treadle.worker.worker import Worker

log = get_logger(__name__)


class WorkerService:
    """One worker's life. send: carries a message to the server; called from the thread that runs `run` alone."""

    def __init__(self, send: Callable[[FromWorker], None]) -> None:
        self._send_message = send
        # None: something else than a message asks for the compute thread.
        self._inbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        self._last_sent = time.monotonic()
        # Never yet.
        self._vitals_at = float("-inf")

    def put(self, message: ToWorker) -> None:
        """Hand a message to the worker; from any thread."""
        self._inbox.put(message)

    def run(self, config: WorkerConfig) -> int:
        """Load the model and serve until told to stop; the exit status."""
        bind_context(pool=config.base_model)
        try:
            worker = _worker_of(config)
        except Exception as error:  # noqa: BLE001 (worker entry: whatever stops the load must reach the operator)
            log.error("base model failed to load", base_model=config.base_model, error=repr(error))
            is_config = isinstance(error, ConfigError | OSError | ValueError)
            # Libraries explain themselves over many lines; an operator gets one.
            reason = " ".join(str(error).split())
            message = f"base model {config.base_model} could not be loaded: {reason}"
            self._send(LoadFailed(message=message, is_config=is_config))
            return 1
        self._send(Loaded(worker.facts))
        try:
            self.serve(worker)
        except Exception as error:  # noqa: BLE001 (worker entry: the device is lost, or we are; the server starts anew)
            log.error("worker gives up", base_model=config.base_model, exc=error)
            return 1
        return 0

    def serve(self, worker: Worker) -> None:
        """Serve messages until Stop."""
        loop = ComputeLoop(worker, wake=lambda: self._inbox.put(None))
        while True:
            for message in self._pending(loop):
                if isinstance(message, Stop):
                    worker.close()
                    return
                self._accept(loop, message)
            finished = loop.run_unit()
            if finished.cycle is not None:
                self._send(CycleDone(encode_cycle(finished.cycle)))
            if finished.parts:
                self._send(SamplesGrew(finished.parts))
            if finished.samples:
                self._send(SamplesDone(encode_samples(finished.samples)))
            for snapshots in finished.snapshots:
                self._send(CallDone(call_id=snapshots.call_id, written=snapshots.written))
            if time.monotonic() - self._vitals_at >= VITALS_EVERY_S:
                self._vitals_at = time.monotonic()
                self._send(Progress(vitals_now()))
            elif time.monotonic() - self._last_sent >= PROGRESS_EVERY_S and (loop.has_work or loop.is_writing):
                self._send(Progress())

    def _send(self, message: FromWorker) -> None:
        self._send_message(message)
        self._last_sent = time.monotonic()

    def _pending(self, loop: ComputeLoop) -> list[ToWorker]:
        """All messages that wait. Without work at hand: once there is one, or the loop has something else to do."""
        messages = []
        if not loop.has_work:
            try:
                messages.append(self._inbox.get(timeout=loop.idle_s))
            except queue.Empty:
                return []
        while not self._inbox.empty():
            messages.append(self._inbox.get())
        return [message for message in messages if message is not None]

    def _accept(self, loop: ComputeLoop, message: ToWorker) -> None:
        match message:
            case RunCycle(work=work):
                self._begin_cycle(loop, work)
            case SubmitSamples(samples=samples):
                decoded, refused = decode_samples(samples)
                loop.submit_samples(decoded)
                if refused:
                    self._send(SamplesDone(refused))
            case CancelSamples(request_ids=request_ids):
                loop.cancel_samples(request_ids)
            case Snapshot(call_id=call_id, targets=targets, with_open_gradient=with_open_gradient):
                loop.ask_snapshots(SnapshotCall(call_id, targets, with_open_gradient))
            case Evict(call_id=call_id, model_ids=model_ids):
                loop.worker.evict(model_ids)
                self._send(CallDone(call_id=call_id))
            case Stop():
                raise AssertionError("Stop ends the loop before it is dispatched")
            case _:
                assert_never(message)

    def _begin_cycle(self, loop: ComputeLoop, work: CycleWork) -> None:
        try:
            abandoned = loop.begin_cycle(decode_cycle(work))
        except Fenced as error:
            self._send(CycleRefused(token=work.token, cycle=work.cycle, message=error.message))
            return
        if abandoned is not None:
            message = f"cycle {abandoned.cycle} was abandoned: a leader with the newer token {work.token} has spoken"
            self._send(CycleRefused(token=abandoned.token, cycle=abandoned.cycle, message=message))


def _worker_of(config: WorkerConfig) -> Worker:
    return build_worker(
        base_model=config.base_model,
        source=config.source,
        revision=config.revision,
        hub=config.hub,
        device=config.device,
        num_on_host=config.num_on_host,
        device_index=config.device_index,
        dtype=config.dtype,
        num_threads=config.num_threads,
        # The server makes the place. A worker that did would take one that is not mounted for an empty one.
        blobs=open_blobs(config.blobs_url, create=False),
        max_running_samples=config.max_running_samples,
        max_cached_tokens=config.max_cached_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        parking_dir=None if config.parking_dir is None else Path(config.parking_dir),
        park_after_s=config.park_after_s,
        max_resident_bytes=config.max_resident_bytes,
        staging_dir=None if config.staging_dir is None else Path(config.staging_dir),
    )
