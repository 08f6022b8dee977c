"""The runs a worker holds: training state and state tag of each, and which of them are parked.

A tag changes only here. An op that starts from another state than the one held is refused (R1 of the log),
so nothing is ever applied twice or on top of the wrong weights. A run without work for a while is parked
(parking.py) and comes back, with the same bits, when somebody asks for its state.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from treadle.domain.ids import ModelId
from treadle.domain.limits import PARK_AFTER_S
from treadle.domain.plan import StateTag
from treadle.engine.state import Adaptable, TrainingState
from treadle.errors import StaleTag
from treadle.telemetry.logs import get_logger
from treadle.worker.parking import ParkedRun, Shelf, park, unpark

log = get_logger(__name__)

_VECTOR_ELEMENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class ParkingRules:
    """When a run leaves device memory. after_s: seconds without an op. max_resident_bytes: 0 means no limit.

    shelves: where it may go, in order of preference; none of them means that runs stay.
    """

    shelves: Sequence[Shelf] = ()
    after_s: float = PARK_AFTER_S
    max_resident_bytes: int = 0


class Slots:
    """A worker's runs by model id. Not thread-safe: one compute thread owns it."""

    def __init__(
        self, base: Adaptable, rules: ParkingRules | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._base = base
        self._rules = rules or ParkingRules()
        self._clock = clock
        # In the order of last use, so that the first has been idle the longest.
        self._states: OrderedDict[ModelId, TrainingState] = OrderedDict()
        self._last_used: dict[ModelId, float] = {}
        self._parked: dict[ModelId, ParkedRun] = {}
        self._tags: dict[ModelId, StateTag] = {}
        # Failed forward_backward ops since each run's last step; the step reports them.
        self._skipped_passes: dict[ModelId, int] = {}

    def __contains__(self, model_id: ModelId) -> bool:
        return model_id in self._tags

    def tag(self, model_id: ModelId) -> StateTag | None:
        """The tag held, or None when the worker does not hold the run."""
        return self._tags.get(model_id)

    def put(self, state: TrainingState, tag: StateTag) -> None:
        """Make `state` the run's state, replacing any other. Takes it over: it is released when it leaves."""
        self.drop(tag.model_id)
        self._states[tag.model_id] = state
        self._last_used[tag.model_id] = self._clock()
        self._tags[tag.model_id] = tag
        self._skipped_passes[tag.model_id] = 0

    def state(self, model_id: ModelId) -> TrainingState:
        """The run's state, on the device; brought back when it was parked.

        Raises StaleTag when this worker does not hold the run, or cannot read it back: then the run is forgotten, so
        that it is restored. Raises what the device raises when it has no memory for it; then the run stays parked.
        """
        if (parked := self._parked.get(model_id)) is not None:
            self._states[model_id] = self._unparked(model_id, parked)
            del self._parked[model_id]
        state = self._states.get(model_id)
        if state is None:
            raise StaleTag(f"run {model_id} is not held by this worker")
        self._states.move_to_end(model_id)
        self._last_used[model_id] = self._clock()
        return state

    def check(self, model_id: ModelId, starts_from: StateTag | None, seq_id: int) -> None:
        """Raise StaleTag unless the state held is the one `starts_from` names (see WorkItem)."""
        held = self._tags.get(model_id)
        if starts_from is None:
            if held is not None:
                raise StaleTag(f"run {model_id} already exists at seq {held.applied_seq}")
            return
        if held is None or held.incarnation != starts_from.incarnation:
            raise StaleTag(f"run {model_id}: the plan starts from another incarnation than the one held")
        if not held.applied_seq <= starts_from.applied_seq < seq_id:
            raise StaleTag(
                f"run {model_id}: op {seq_id} starts from seq {starts_from.applied_seq}, held is {held.applied_seq}"
            )

    def advance(self, model_id: ModelId, seq_id: int) -> StateTag | None:
        """Mark `seq_id` as consumed (applied or failed without a trace); the new tag."""
        held = self._tags.get(model_id)
        if held is None:
            return None
        assert seq_id >= held.applied_seq, "sequence numbers only grow"
        tag = StateTag(model_id=model_id, incarnation=held.incarnation, applied_seq=seq_id)
        self._tags[model_id] = tag
        if model_id in self._states:
            # An op that took longer than runs may idle must not have its run parked as soon as it ends.
            self._states.move_to_end(model_id)
            self._last_used[model_id] = self._clock()
        return tag

    def drop(self, model_id: ModelId) -> None:
        """Forget a run and free its memory: nobody may look at its state any more. Idempotent."""
        if (parked := self._parked.pop(model_id, None)) is not None:
            parked.drop()
        if (state := self._states.pop(model_id, None)) is not None:
            state.release()
        self._last_used.pop(model_id, None)
        self._tags.pop(model_id, None)
        self._skipped_passes.pop(model_id, None)

    def note_skipped_pass(self, model_id: ModelId) -> None:
        """Count a forward_backward that failed since the last step."""
        if model_id in self._skipped_passes:
            self._skipped_passes[model_id] += 1

    def take_skipped_passes(self, model_id: ModelId) -> int:
        """How many passes failed since the last step; the count starts again."""
        num_skipped = self._skipped_passes.get(model_id, 0)
        self._skipped_passes[model_id] = 0
        return num_skipped

    def has_open_gradient(self, model_id: ModelId) -> bool:
        """Whether a run that is held, parked or not, has passes behind its last step."""
        parked = self._parked.get(model_id)
        return (self._states[model_id] if parked is None else parked).num_open_passes > 0

    def is_parked(self, model_id: ModelId) -> bool:
        """Whether the run is held, but not on the device."""
        return model_id in self._parked

    @property
    def resident_bytes(self) -> int:
        """Device memory that runs hold."""
        return sum(_num_bytes(state) for state in self._states.values())

    def seconds_until_due(self, *, busy: Collection[ModelId]) -> float | None:
        """Seconds until some run has been idle for long enough to be parked; None when there is nothing to wait for."""
        model_id = self._longest_idle(busy)
        if model_id is None or not self._rules.shelves:
            return None
        return max(0.0, self._last_used[model_id] + self._rules.after_s - self._clock())

    def park_one_due(self, *, busy: Collection[ModelId]) -> bool:
        """Park the run that has been idle the longest, if that is long enough; whether one was. busy: never these."""
        if self.seconds_until_due(busy=busy) != 0.0:
            return False
        return self._park_longest_idle(busy)

    def park_over_limit(self, *, busy: Collection[ModelId]) -> None:
        """Park runs, the longest idle first, until the others stay within the limit in bytes."""
        limit = self._rules.max_resident_bytes
        while limit and self.resident_bytes > limit and self._park_longest_idle(busy):
            pass

    def park_all(self, *, busy: Collection[ModelId]) -> bool:
        """Park every run that can be, because memory ran out; whether any was."""
        num_before = len(self._parked)
        while self._park_longest_idle(busy):
            pass
        return len(self._parked) > num_before

    def _longest_idle(self, busy: Collection[ModelId]) -> ModelId | None:
        return next((model_id for model_id in self._states if model_id not in busy), None)

    def _park_longest_idle(self, busy: Collection[ModelId]) -> bool:
        model_id = self._longest_idle(busy)
        return model_id is not None and self.park(model_id)

    def park(self, model_id: ModelId) -> bool:
        """Take a run that is on the device from it; whether there was room for it elsewhere."""
        num_bytes = _num_bytes(self._states[model_id])
        parked = park(self._states[model_id], self._rules.shelves)
        if parked is None:
            # It counts as used, so that a full disk is tried again later and not all the time.
            self._states.move_to_end(model_id)
            self._last_used[model_id] = self._clock()
            return False
        self._parked[model_id] = parked
        del self._states[model_id], self._last_used[model_id]
        log.info("run parked", model_id=model_id, num_bytes=num_bytes)
        return True

    def _unparked(self, model_id: ModelId, parked: ParkedRun) -> TrainingState:
        try:
            return unpark(parked, self._base)
        except OSError as error:
            log.error("parked run not readable", model_id=model_id, exc=error)
            self.drop(model_id)
            raise StaleTag(f"run {model_id} could not be read back from where it was parked") from error


def _num_bytes(state: TrainingState) -> int:
    return (3 if state.grads is None else 4) * state.layout.num_elements * _VECTOR_ELEMENT_BYTES
