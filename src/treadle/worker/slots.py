"""The runs a worker holds: training state and state tag of each.

A tag changes only here. An op that starts from another state than the one held is refused (R1 of the log),
so nothing is ever applied twice or on top of the wrong weights.
"""

from __future__ import annotations

from treadle.domain.ids import ModelId
from treadle.domain.plan import StateTag
from treadle.engine.adapter import TrainingState
from treadle.errors import StaleTag


class Slots:
    """Resident runs by model id. Not thread-safe: one compute thread owns it."""

    def __init__(self) -> None:
        self._states: dict[ModelId, TrainingState] = {}
        self._tags: dict[ModelId, StateTag] = {}
        # Failed forward_backward ops since each run's last step; the step reports them.
        self._skipped_passes: dict[ModelId, int] = {}

    def __contains__(self, model_id: ModelId) -> bool:
        return model_id in self._states

    def tag(self, model_id: ModelId) -> StateTag | None:
        """The tag held, or None when the run is not resident."""
        return self._tags.get(model_id)

    def put(self, state: TrainingState, tag: StateTag) -> None:
        """Make `state` the run's state, replacing any other."""
        self._states[tag.model_id] = state
        self._tags[tag.model_id] = tag
        self._skipped_passes[tag.model_id] = 0

    def state(self, model_id: ModelId) -> TrainingState:
        """The run's state. Raises StaleTag when it is not resident."""
        state = self._states.get(model_id)
        if state is None:
            raise StaleTag(f"run {model_id} is not resident in this worker")
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
        return tag

    def drop(self, model_id: ModelId) -> None:
        """Forget a run and free its memory. Idempotent."""
        self._states.pop(model_id, None)
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
