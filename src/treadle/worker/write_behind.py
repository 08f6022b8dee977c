"""Staged versions on their way to the blob store: one thread writes them, again and again until they are there.

A version is readable by every process of the machine from the moment it is staged, and durable some time later. It
survives the death of this process in between: who finds its folder without an owner writes what is in it. It refuses to
know what the bytes mean. Invariants: a file goes only when its blob is durable; what is staged is bounded, in bytes and
in files; what cannot be written is tried for as long as the process lives, and named when it ends.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

from treadle.domain.limits import MAX_STAGED_BYTES, MAX_STAGED_FILES
from treadle.errors import InvalidRequest
from treadle.telemetry import phases
from treadle.telemetry.logs import get_logger
from treadle.worker.blob_io import BlobIO
from treadle.worker.staging import Folder, StagedFile, StagingArea

log = get_logger(__name__)

# A disk that flushes weights keeps the database's commits waiting, among them the one that tells of the save and the
# one of the first sample: these go first.
WRITE_AFTER_S = 0.1
# How long a durable version stays staged, for samplers in other processes that have not read it yet.
KEEP_DURABLE_S = 30.0
# Pauses after a failure, doubled from the first to the last one. While the process is to end: the first one.
FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 10.0
# How often folders without an owner are looked for: a listing of one small directory.
LOOK_AROUND_S = 10.0


@dataclass(slots=True)
class _Waiting:
    """due_at: when to write it. may_exist: an earlier try, of whichever process, may have succeeded unnoticed."""

    file: StagedFile
    folder: Folder
    due_at: float
    may_exist: bool = False


class WriteBehind:
    """Owns a folder of `area` and a thread. `offer` and `close` belong to one thread, the other one is its own."""

    def __init__(
        self,
        area: StagingArea,
        blobs: BlobIO,
        *,
        max_bytes: int = MAX_STAGED_BYTES,
        max_files: int = MAX_STAGED_FILES,
        write_after_s: float = WRITE_AFTER_S,
        keep_durable_s: float = KEEP_DURABLE_S,
    ) -> None:
        """Raises OSError when the area takes no folder."""
        self._area = area
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._write_after_s = write_after_s
        self._keep_durable_s = keep_durable_s
        self._mine = area.new_folder()
        # Guards everything below; notified when there is something to do, or to see.
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        # Durable and still staged: bytes and until when, oldest first.
        self._durable: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._num_bytes = 0
        self._left_in: Counter[str] = Counter()
        self._retry_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._look_around_at = 0.0
        self._is_ending = False
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="treadle-write-behind", daemon=True)
        self._thread.start()

    def offer(self, key: str, data: bytes) -> bool:
        """Stage `data` and write it later; False, and nothing was done, when there is no room for it."""
        with self._changed:
            if not self._makes_room(len(data)):
                return False
            self._num_bytes += len(data)
        file = self._staged(key, data)
        with self._changed:
            if file is None:
                self._num_bytes -= len(data)
                return False
            self._waiting.append(_Waiting(file, self._mine, time.monotonic() + self._write_after_s))
            self._changed.notify_all()
        return True

    def close(self, timeout_s: float) -> tuple[str, ...]:
        """End it: write what waits, for so long at most; the keys of what could not be written, which stays staged."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._is_ending = True
            self._retry_at = 0.0
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, timeout_s)
            self._is_over = True
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()) + FIRST_PAUSE_S)
        with self._changed:
            left = tuple(one.file.key for one in self._waiting)
        if self._thread.is_alive():
            return left  # in the middle of a write; the folder's lock ends with the process
        for one in self._waiting:
            one.file.close()
        for key in self._durable:
            self._mine.remove(key)
        for folder in {self._mine.name: self._mine, **{one.folder.name: one.folder for one in self._waiting}}.values():
            self._area.give_up(folder)
        return left

    def _staged(self, key: str, data: bytes) -> StagedFile | None:
        try:
            if self._area.has_room_for(len(data)):
                return self._mine.put(key, data)
            reason = "shared memory is full"
        except OSError as error:
            reason = error.strerror or type(error).__name__
        log.warning("version not staged", key=key, num_bytes=len(data), reason=reason)
        return None

    def _makes_room(self, num_bytes: int) -> bool:
        """Whether so much more may be staged, once what is durable has made way for it."""
        while self._durable and self._num_bytes + num_bytes > self._max_bytes:
            self._drop_oldest_durable()
        if not self._waiting:
            return True
        return len(self._waiting) < self._max_files and self._num_bytes + num_bytes <= self._max_bytes

    def _drop_oldest_durable(self) -> None:
        key, (num_bytes, _) = self._durable.popitem(last=False)
        self._num_bytes -= num_bytes
        self._mine.remove(key)

    def _run(self) -> None:
        """The other thread: what is due, one thing after another."""
        while True:
            with self._changed:
                while (pause_s := self._seconds_until_due()) > 0 and not self._is_over:
                    self._changed.wait(pause_s)
                if self._is_over:
                    return
                now = time.monotonic()
                while self._durable and next(iter(self._durable.values()))[1] <= now:
                    self._drop_oldest_durable()
                one = self._waiting[0] if self._waiting and self._write_at(self._waiting[0]) <= now else None
            if one is not None:
                self._settle(one, is_durable=self._write(one))
            elif now >= self._look_around_at:
                self._look_around(now)

    def _seconds_until_due(self) -> float:
        times = [self._look_around_at]
        times += [until for _, until in list(self._durable.values())[:1]]
        times += [self._write_at(self._waiting[0])] if self._waiting else []
        return min(times) - time.monotonic()

    def _write_at(self, one: _Waiting) -> float:
        return self._retry_at if self._is_ending else max(one.due_at, self._retry_at)

    def _write(self, one: _Waiting) -> bool:
        """Whether its blob is durable now."""
        key = one.file.key
        try:
            if not (one.may_exist and self._blobs.exists(key)):
                phases.phase(phases.Phase.WRITE_BEHIND, key=key)
                self._blobs.write(key, one.file.read())
        except InvalidRequest as error:
            log.error("a staged file that is none was dropped", key=key, reason=error.message)
        except Exception as error:  # noqa: BLE001 (background writer: whatever it was, the version must get there)
            log.warning("version not durable yet", key=key, reason=str(error), retry_in_s=self._pause_s)
            return False
        return True

    def _settle(self, one: _Waiting, *, is_durable: bool) -> None:
        with self._changed:
            now = time.monotonic()
            assert self._waiting[0] is one, "only this thread takes from the line"
            self._waiting.popleft()
            if is_durable:
                self._retry_at, self._pause_s = 0.0, FIRST_PAUSE_S
                one.file.close()
                self._done_with(one, now)
            else:
                one.may_exist = True
                # Behind the others: what is wrong may be wrong with this one alone.
                self._waiting.append(one)
                self._retry_at = now + (FIRST_PAUSE_S if self._is_ending else self._pause_s)
                self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
            self._changed.notify_all()

    def _done_with(self, one: _Waiting, now: float) -> None:
        """Its blob is durable: it stays for a while if this process has staged it, and goes if it was left behind."""
        key, num_bytes = one.file.key, one.file.num_bytes
        if one.folder is self._mine:
            self._durable[key] = (num_bytes, now + self._keep_durable_s)
            return
        one.folder.remove(key)
        self._num_bytes -= num_bytes
        self._left_in[one.folder.name] -= 1
        if self._left_in[one.folder.name] == 0:
            del self._left_in[one.folder.name]
            self._area.give_up(one.folder)

    def _look_around(self, now: float) -> None:
        """Take over what processes of this machine left behind when they died."""
        with self._changed:
            self._look_around_at = now + LOOK_AROUND_S
        try:
            for folder in self._area.take_abandoned():
                self._take_over(folder)
        except OSError as error:
            log.warning("staging directory not read", reason=error.strerror or type(error).__name__)

    def _take_over(self, folder: Folder) -> None:
        try:
            files = folder.open_all()
        except OSError:
            self._area.give_up(folder)
            raise
        if not files:
            self._area.give_up(folder)
            return
        log.info("staged versions taken over", num=len(files), folder=folder.name)
        with self._changed:
            self._left_in[folder.name] = len(files)
            for file in files:
                self._num_bytes += file.num_bytes
                self._waiting.append(_Waiting(file, folder, 0.0, may_exist=True))
