"""One compute thread, two kinds of work: training cycles and samples share the device here.

Each call of `run_unit` runs one bounded piece (a micro-batch, a prefill chunk, a decode burst) of the side whose
turn it is; domain/share.py decides whose. Between units snapshots are encoded and idle runs are parked. Nothing here
knows how messages arrive or leave.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from treadle.domain.ids import RequestId
from treadle.domain.limits import PROGRESS_EVERY_S
from treadle.domain.outcome import CycleOutcome, SampledPart, SampleOutcome
from treadle.domain.share import DeviceShare, Side, charge, next_side
from treadle.telemetry.context import log_context
from treadle.worker.snapshots import SnapshotCall, Snapshots, SnapshotsDone
from treadle.worker.work import DecodedCycle, DecodedSample
from treadle.worker.worker import Worker

# Longest unit of sampling while a cycle waits; a micro-batch cannot be cut, so training's units are what they are.
MAX_UNIT_S = 0.15


@dataclass(frozen=True, slots=True)
class Finished:
    """What one unit completed."""

    cycle: CycleOutcome | None = None
    samples: tuple[SampleOutcome, ...] = ()
    parts: tuple[SampledPart, ...] = ()
    snapshots: tuple[SnapshotsDone, ...] = ()


@dataclass(frozen=True, slots=True)
class _RunningCycle:
    cycle: DecodedCycle
    units: Generator[None, None, CycleOutcome]


class ComputeLoop:
    """The work at hand and whose turn it is. wake: called from another thread when there is new work here."""

    def __init__(self, worker: Worker, *, wake: Callable[[], object]) -> None:
        self.worker = worker
        self._running: _RunningCycle | None = None
        self._snapshots = Snapshots(encode=worker.encode_snapshot, write=worker.write_blob, wake=wake)
        self._share = DeviceShare()
        # When samples came.
        self._came_at: dict[RequestId, float] = {}

    @property
    def has_work(self) -> bool:
        return self._running is not None or self.worker.has_samples or self._snapshots.has_work

    @property
    def is_writing(self) -> bool:
        """Whether snapshots are on their way, with or without work for the compute thread."""
        return self._snapshots.is_open

    @property
    def idle_s(self) -> float | None:
        """Without work: how long `run_unit` may wait to be called again. None: until there is some."""
        until_parking = self.worker.seconds_until_parking
        if not self.is_writing:
            return until_parking
        return PROGRESS_EVERY_S if until_parking is None else min(PROGRESS_EVERY_S, until_parking)

    def begin_cycle(self, cycle: DecodedCycle) -> DecodedCycle | None:
        """Take a cycle on; the older leader's cycle that is abandoned for it, if one was on its way.

        Raises Fenced when a newer leader has spoken to this worker.
        """
        units = self.worker.begin_cycle(cycle)
        before, self._running = self._running, _RunningCycle(cycle, units)
        if before is None:
            return None
        assert before.cycle.token < cycle.token, "one cycle of a leader at a time"
        before.units.close()
        # Nobody will hear which of its ops were applied.
        self.worker.evict(sorted(before.cycle.model_ids))
        return before.cycle

    def submit_samples(self, samples: Sequence[DecodedSample]) -> None:
        """Queue samples."""
        now = time.time()
        self._came_at.update((sample.request_id, now) for sample in samples)
        self.worker.submit_samples(samples)

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """Drop samples that nobody waits for."""
        for request_id in request_ids:
            self._came_at.pop(request_id, None)
        self.worker.cancel_samples(request_ids)

    def ask_snapshots(self, call: SnapshotCall) -> None:
        """Queue snapshots: of each run the state that it has when its turn comes, if that is the one asked for."""
        self._snapshots.ask(call)

    def run_unit(self) -> Finished:
        """Run one bounded piece of work, if there is any."""
        snapshots = tuple(self._snapshots.run_one())
        side = next_side(self._share, training_waits=self._running is not None, sampling_waits=self.worker.has_samples)
        if side is None:
            self.worker.park_idle()
            return Finished(snapshots=snapshots)
        started = time.perf_counter()
        finished = self._train() if side is Side.TRAINING else self._sample()
        self._share = charge(self._share, side, time.perf_counter() - started)
        if self._running is None:
            # Also behind samples, which may never end: an idle run's memory is theirs to use.
            self.worker.park_idle()
        return replace(finished, snapshots=snapshots)

    def _sample(self) -> Finished:
        samples = tuple(self._timed(outcome) for outcome in self.worker.sample_step(MAX_UNIT_S))
        return Finished(samples=samples, parts=self.worker.sampled_parts())

    def _timed(self, outcome: SampleOutcome) -> SampleOutcome:
        now = time.time()
        began_at = self._came_at.pop(outcome.request_id, now)
        return replace(outcome, began_at=began_at, worked_s=max(0.0, now - began_at))

    def _train(self) -> Finished:
        assert self._running is not None
        try:
            with log_context(cycle=self._running.cycle.cycle):
                next(self._running.units)
        except StopIteration as done:
            self._running = None
            return Finished(cycle=done.value)
        return Finished()
