"""Snapshots on their way: encoded on the compute thread between two units of work, written by a thread of their own.

So training goes on while a disk flushes. The compute thread owns everything here; the writing thread sees bytes and
keys only, and what it has done comes back through a queue. It refuses to know what a state is and when to take one.
Invariant: a call is answered once, when each of its runs is durable, left out or failed; and what waits to be written
is bounded in bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from treadle.domain.ids import ModelId
from treadle.domain.limits import MAX_UNWRITTEN_SNAPSHOT_BYTES
from treadle.domain.outcome import SnapshotWritten
from treadle.domain.plan import StateTag
from treadle.errors import TreadleError
from treadle.telemetry import phases
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SnapshotCall:
    """States to write, each under a key of its own."""

    call_id: int
    targets: tuple[tuple[StateTag, str], ...]
    with_open_gradient: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotsDone:
    """The answer to a call: what is durable."""

    call_id: int
    written: dict[ModelId, SnapshotWritten]


@dataclass(slots=True)
class _OpenCall:
    num_left: int
    written: dict[ModelId, SnapshotWritten] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Target:
    call_id: int
    tag: StateTag
    key: str
    with_open_gradient: bool


@dataclass(frozen=True, slots=True)
class _Encoded:
    target: _Target
    data: bytes
    compute_s: float


@dataclass(frozen=True, slots=True)
class _Settled:
    """What the writing thread is through with. num_bytes None: it could not be written."""

    encoded: _Encoded
    num_bytes: int | None


class Snapshots:
    """encode: a run's file, or None to leave it out. write: stores one durably, on the other thread.

    wake: called by the other thread when something was written. max_bytes: what may wait to be written; a larger
    snapshot waits alone.
    """

    def __init__(
        self,
        *,
        encode: Callable[[StateTag, bool], bytes | None],
        write: Callable[[str, bytes], int],
        wake: Callable[[], object],
        max_bytes: int = MAX_UNWRITTEN_SNAPSHOT_BYTES,
    ) -> None:
        self._encode = encode
        self._write = write
        self._wake = wake
        self._max_bytes = max_bytes
        self._calls: dict[int, _OpenCall] = {}
        self._waiting: deque[_Target] = deque()
        self._unwritten_bytes = 0
        self._to_write: queue.SimpleQueue[_Encoded] = queue.SimpleQueue()
        self._settled: queue.SimpleQueue[_Settled] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def has_work(self) -> bool:
        """Whether the compute thread has something to do here now."""
        is_through = any(call.num_left == 0 for call in self._calls.values())
        return is_through or (bool(self._waiting) and self._has_room) or not self._settled.empty()

    @property
    def is_open(self) -> bool:
        """Whether some call is not answered yet."""
        return bool(self._calls)

    def ask(self, call: SnapshotCall) -> None:
        """Take a call on."""
        assert call.call_id not in self._calls
        self._calls[call.call_id] = _OpenCall(num_left=len(call.targets))
        self._waiting.extend(_Target(call.call_id, tag, key, call.with_open_gradient) for tag, key in call.targets)

    def run_one(self) -> Sequence[SnapshotsDone]:
        """Encode one run's state, if one waits and there is room for it; the calls that are through by now."""
        self._take_settled()
        if self._waiting and self._has_room:
            self._encode_one(self._waiting.popleft())
        done = [call_id for call_id, call in self._calls.items() if call.num_left == 0]
        return [SnapshotsDone(call_id, self._calls.pop(call_id).written) for call_id in done]

    @property
    def _has_room(self) -> bool:
        return self._unwritten_bytes < self._max_bytes

    def _encode_one(self, target: _Target) -> None:
        started = time.perf_counter()
        data = self._encode(target.tag, target.with_open_gradient)
        if data is None:
            self._calls[target.call_id].num_left -= 1
            return
        self._unwritten_bytes += len(data)
        self._to_write.put(_Encoded(target, data, compute_s=time.perf_counter() - started))
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_forever, name="treadle-snapshots", daemon=True)
            self._thread.start()

    def _take_settled(self) -> None:
        while not self._settled.empty():
            settled = self._settled.get()
            encoded = settled.encoded
            self._unwritten_bytes -= len(encoded.data)
            assert self._unwritten_bytes >= 0
            call = self._calls[encoded.target.call_id]
            call.num_left -= 1
            if settled.num_bytes is not None:
                call.written[encoded.target.tag.model_id] = SnapshotWritten(settled.num_bytes, encoded.compute_s)

    def _write_forever(self) -> None:
        """The other thread: one file after another, for as long as the process lives."""
        while True:
            encoded = self._to_write.get()
            self._settled.put(_Settled(encoded, self._write_one(encoded)))
            del encoded  # or the bytes of the last one would stay until the next one comes
            self._wake()

    def _write_one(self, encoded: _Encoded) -> int | None:
        tag = encoded.target.tag
        phases.phase(phases.Phase.SNAPSHOT, model_id=tag.model_id, seq_id=tag.applied_seq)
        try:
            return self._write(encoded.target.key, encoded.data)
        except TreadleError as error:
            log.error("snapshot not written", model_id=tag.model_id, reason=error.message)
        except Exception as error:  # noqa: BLE001 (worker entry: the thread must go on for the other runs)
            log.error("snapshot not written", model_id=tag.model_id, exc=error)
        return None
