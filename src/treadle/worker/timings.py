"""When the parts of a cycle began on this worker and how long they took, for traces and metrics.

It refuses to know what is done in them. Seconds are of the wall: what samples took of the device in between is in them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.ops import Phase
from treadle.domain.outcome import CyclePart, WorkTiming
from treadle.telemetry.context import log_context

PART_OF_PHASE = {
    Phase.SETUP: CyclePart.SETUP,
    Phase.PASS: CyclePart.PASSES,
    Phase.STEP: CyclePart.STEPS,
    Phase.PUBLISH: CyclePart.PUBLISH,
}


class Timings:
    """Of one cycle; `taken` in the order in which the parts ended."""

    def __init__(self) -> None:
        self.taken: list[WorkTiming] = []

    @contextmanager
    def of(self, part: CyclePart, model_id: ModelId, request_id: RequestId | None = None) -> Iterator[None]:
        """Times what is done for one run, also when it is left by an exception. Its log lines say whose it is."""
        began_at, began = time.time(), time.perf_counter()
        ids = {"model_id": model_id} if request_id is None else {"model_id": model_id, "request_id": request_id}
        try:
            with log_context(**ids):
                yield
        finally:
            seconds = time.perf_counter() - began
            self.taken.append(WorkTiming(part, began_at, seconds, model_id=model_id, request_id=request_id))

    def over(self, part: CyclePart, units: Iterator[None]) -> Iterator[None]:
        """The same units, timed together; nothing is noted when there are none."""
        began_at, began = time.time(), time.perf_counter()
        num_units = 0
        for num_units, _ in enumerate(units, start=1):  # noqa: B007 (their number is all that is wanted)
            yield
        if num_units:
            self.taken.append(WorkTiming(part, began_at, time.perf_counter() - began))
