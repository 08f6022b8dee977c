"""One compute thread, two kinds of work: training cycles and samples share the device here.

Each call of `run_unit` runs one bounded piece (a micro-batch, a prefill chunk, a decode burst) of the side whose
turn it is; domain/share.py decides whose. Idle runs are parked between units. Nothing here knows how messages arrive
or leave.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from treadle.domain.ids import RequestId
from treadle.domain.outcome import CycleOutcome, SampleOutcome
from treadle.domain.share import DeviceShare, Side, charge, next_side
from treadle.worker.work import DecodedCycle, DecodedSample
from treadle.worker.worker import Worker

# Longest unit of sampling while a cycle waits; a micro-batch cannot be cut, so training's units are what they are.
MAX_UNIT_S = 0.15


@dataclass(frozen=True, slots=True)
class Finished:
    """What one unit completed."""

    cycle: CycleOutcome | None = None
    samples: tuple[SampleOutcome, ...] = ()


class ComputeLoop:
    """The work at hand and whose turn it is."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._cycle: Generator[None, None, CycleOutcome] | None = None
        self._share = DeviceShare()

    @property
    def has_work(self) -> bool:
        return self._cycle is not None or self.worker.has_samples

    @property
    def idle_s(self) -> float | None:
        """Without work: how long `run_unit` may wait to be called again. None: until there is some."""
        return self.worker.seconds_until_parking

    def begin_cycle(self, cycle: DecodedCycle) -> None:
        """Take a cycle on. Raises Fenced when a newer leader has spoken to this worker."""
        assert self._cycle is None, "one cycle at a time"
        self._cycle = self.worker.begin_cycle(cycle)

    def submit_samples(self, samples: Sequence[DecodedSample]) -> None:
        """Queue samples."""
        self.worker.submit_samples(samples)

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """Drop samples that nobody waits for."""
        self.worker.cancel_samples(request_ids)

    def run_unit(self) -> Finished:
        """Run one bounded piece of work, if there is any."""
        side = next_side(self._share, training_waits=self._cycle is not None, sampling_waits=self.worker.has_samples)
        if side is None:
            self.worker.park_idle()
            return Finished()
        started = time.perf_counter()
        finished = self._train() if side is Side.TRAINING else Finished(samples=self.worker.sample_step(MAX_UNIT_S))
        self._share = charge(self._share, side, time.perf_counter() - started)
        if self._cycle is None:
            # Also behind samples, which may never end: an idle run's memory is theirs to use.
            self.worker.park_idle()
        return finished

    def _train(self) -> Finished:
        assert self._cycle is not None
        try:
            next(self._cycle)
        except StopIteration as done:
            self._cycle = None
            return Finished(cycle=done.value)
        return Finished()
