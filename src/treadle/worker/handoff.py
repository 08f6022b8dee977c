"""From training to sampling: sampler versions without a name, kept where the next sample finds them at once.

With shared memory such a save is answered when its bytes lie there: no process of the machine has to die for them to be
read, and none that dies takes them along. The blob is written behind. Without shared memory, or without room in it, a
save is answered when its blob is durable. It refuses to know what the bytes mean.
Invariant: what `keep` has returned for is found by `read` in any process of this machine, unless the machine itself
stops before the blob is durable; other machines find it as soon as the blob is there.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from treadle.domain.limits import WEIGHTS_ON_THEIR_WAY_S
from treadle.errors import ConfigError, NotFound, StoreUnavailable
from treadle.telemetry.logs import get_logger
from treadle.worker.blob_io import BlobIO
from treadle.worker.staging import StagingArea
from treadle.worker.write_behind import WriteBehind

log = get_logger(__name__)

# Keys of weights that were missing: beyond these the oldest are forgotten.
_MAX_MISSING = 1_024
_OPENING_TRIES = 3


class Handoff:
    """`keep` and `close` belong to one thread, which calls nothing behind `close`. staging_dir: memory of this machine
    as a directory, None for none.
    """

    def __init__(
        self,
        blobs: BlobIO,
        *,
        staging_dir: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError when the directory cannot be used, or can be by others."""
        self._blobs = blobs
        self._clock = clock
        self._area: StagingArea | None = None
        self._behind: WriteBehind | None = None
        if staging_dir is not None:
            self._area, self._behind = _opened(staging_dir, blobs)
        self._missing_since: OrderedDict[str, float] = OrderedDict()

    def keep(self, key: str, data: bytes) -> int:
        """Have `data` found under a fresh key; its bytes. Raises as the blob store does when it has to be asked."""
        if self._behind is not None and self._behind.offer(key, data):
            return len(data)
        return self._blobs.write(key, data)

    def read(self, key: str) -> bytes:
        """What lies under `key`, staged or stored.

        Raises StoreUnavailable while it may be on its way from another machine, NotFound when it is nowhere.
        """
        data = self._staged(key)
        if data is None:
            try:
                data = self._blobs.read(key)
            except NotFound:
                self._say_that_it_is_missing(key)
        self._missing_since.pop(key, None)
        return data

    def close(self, timeout_s: float) -> None:
        """Write what waits, for so long at most, and say what could not be written. Nothing is kept behind it."""
        if self._behind is None or self._area is None:
            return
        if left := self._behind.close(timeout_s):
            log.error("versions not durable; the next worker of this machine writes them", num=len(left), keys=left[:8])
        else:
            self._area.close()

    def _staged(self, key: str) -> bytes | None:
        if self._area is None:
            return None
        try:
            return self._area.read(key)
        except OSError as error:
            log.warning("staging directory not read", reason=error.strerror or type(error).__name__)
            return None

    def _say_that_it_is_missing(self, key: str) -> NoReturn:
        now = self._clock()
        since = self._missing_since.setdefault(key, now)
        if len(self._missing_since) > _MAX_MISSING:
            self._missing_since.popitem(last=False)
        if self._area is not None and now - since < WEIGHTS_ON_THEIR_WAY_S:
            raise StoreUnavailable("these weights are not stored yet; send the request again")
        log.error("weights are missing", key=key)
        raise NotFound(
            "these weights are not there: weights saved without a name are lost when the machine that has them stops "
            "before they are stored, and are dropped when newer ones replaced them; save them again, or under a name"
        )


def _opened(staging_dir: Path, blobs: BlobIO) -> tuple[StagingArea, WriteBehind]:
    """Tried again, because whoever leaves an empty directory takes it along."""
    for _ in range(_OPENING_TRIES):
        area = StagingArea(staging_dir)
        try:
            return area, WriteBehind(area, blobs)
        except OSError as error:
            area.close()
            reason = error.strerror
    raise ConfigError(f"staging directory {staging_dir} takes no files: {reason}")
