"""Rebuilding a run before a cycle's ops: from a registered snapshot, or fresh from its seed.

The one repair, whatever went wrong before. It refuses to know what is replayed afterwards, and never takes another
blob than the one that it is given: which snapshot is the newest good one is its leader's to say.
Invariant: a run whose restore did not succeed is not held at all.
"""

from __future__ import annotations

from collections.abc import Callable

from treadle.domain.outcome import RestoreEnd, RestoreOutcome
from treadle.domain.plan import RestoreItem
from treadle.engine.base_model import BaseModel
from treadle.engine.files import decode_state
from treadle.engine.memory import is_out_of_memory
from treadle.engine.state import TrainingState, new_training_state
from treadle.errors import TreadleError
from treadle.telemetry import phases
from treadle.telemetry.logs import get_logger
from treadle.worker.blob_io import BlobIO
from treadle.worker.device_loss import reraise_if_device_is_lost
from treadle.worker.failures import restore_end_of
from treadle.worker.slots import Slots

log = get_logger(__name__)

WithRoom = Callable[[Callable[[], TrainingState]], TrainingState]


def restore_run(
    restore: RestoreItem, *, base: BaseModel, blobs: BlobIO, slots: Slots, with_room: WithRoom
) -> RestoreOutcome:
    """Put the run into its slot, and how that ended. with_room: calls again, with more memory, what ran out of it.

    The run must have been dropped before. Raises only when the device is lost.
    """
    model_id = restore.model_id
    assert model_id not in slots
    try:
        state = with_room(lambda: _state_of(restore, base, blobs))
    except Exception as error:  # noqa: BLE001 (worker entry: no memory for one run must not end the others)
        reraise_if_device_is_lost(error)
        end = restore_end_of(error)
        message = _reason_of(error)
        unexpected = None if isinstance(error, TreadleError) else error
        log.error("restore failed", model_id=model_id, end=end, reason=message, exc=unexpected)
        return RestoreOutcome(model_id, end, message)
    slots.put(state, restore.tag)
    log.debug("run restored", model_id=model_id, seq_id=restore.tag.applied_seq, incarnation=restore.tag.incarnation)
    phases.phase(phases.Phase.RESTORED, model_id=model_id, seq_id=restore.tag.applied_seq)
    return RestoreOutcome(model_id, RestoreEnd.DONE)


def _reason_of(error: Exception) -> str:
    """What may be shown of an error."""
    if isinstance(error, TreadleError):
        return error.message
    return "there was no memory for it" if is_out_of_memory(error) else "internal error"


def _state_of(restore: RestoreItem, base: BaseModel, blobs: BlobIO) -> TrainingState:
    if restore.blob_key is None:
        return new_training_state(base, restore.lora)
    return decode_state(blobs.read(restore.blob_key), base, with_optimizer=restore.with_optimizer)
