"""Blobs that no row names: left behind by a process that died between a blob and its row, or by names that were taken
back.

It refuses to know what is in a blob. Invariant: a blob goes only when it belongs to a session of this database, is
older than any commit that could still name it, and two looks in a row found it without a name. The second look is for
a request that found a name just before it was taken back, and whose own row came just behind the first. What belongs
to no session of this database may be named by another one, whose operator gave both the same place for blobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from itertools import islice

from treadle.blobs import BlobStore
from treadle.domain.ids import BlobKey, session_of_blob
from treadle.domain.limits import MAX_BLOBS_PER_QUERY, MAX_UNNAMED_BLOBS
from treadle.domain.ops import LoadWeightsOp, OpKind
from treadle.errors import TreadleError
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.wire.payloads import decode_payload

log = get_logger(__name__)


class UnnamedBlobs:
    """Looks through all blobs, and remembers from one look to the next which had no name."""

    def __init__(self, *, store: Store, blobs: BlobStore, kept_s: float) -> None:
        self._store = store
        self._blobs = blobs
        self._kept_s = kept_s
        self._suspects: set[BlobKey] = set()

    async def sweep(self, now: float) -> int:
        """Delete what had no name twice, and what writes left half-way; how many blobs went."""
        await asyncio.to_thread(self._blobs.drop_unfinished, older_than_s=self._kept_s)
        # Read before the names: a load that is done by then has a snapshot that names its blob.
        wanted = await wanted_by_loads(self._store)
        unnamed: set[BlobKey] = set()
        old = self._older_than(now - self._kept_s)
        while keys := await asyncio.to_thread(_next_chunk, old):
            unnamed.update(await self._own(await self._store.retention.unnamed(keys)))
            if len(unnamed) >= MAX_UNNAMED_BLOBS:
                break
        unnamed -= wanted
        gone = await delete_blobs(self._blobs, unnamed & self._suspects)
        self._suspects = unnamed - gone
        return len(gone)

    async def _own(self, keys: Collection[BlobKey]) -> list[BlobKey]:
        """Those of these blobs that this database's sessions made."""
        makers = {key: session_of_blob(key) for key in keys}
        known = await self._store.sessions.known_among({maker for maker in makers.values() if maker is not None})
        own = [key for key, maker in makers.items() if maker in known]
        if len(own) < len(makers):
            log.debug("blobs of another database left alone", num_blobs=len(makers) - len(own))
        return own

    def _older_than(self, written_before: float) -> Iterator[BlobKey]:
        return (BlobKey(blob.key) for blob in self._blobs.iter_blobs() if blob.written_at < written_before)


async def wanted_by_loads(store: Store) -> set[BlobKey]:
    """Blobs that queued loads will read, whether or not a checkpoint still names them."""
    wanted = set()
    for payload in await store.retention.queued_loads():
        op = decode_payload(OpKind.LOAD_WEIGHTS, payload)
        assert isinstance(op, LoadWeightsOp)
        wanted.add(op.blob_key)
    return wanted


async def delete_blobs(blobs: BlobStore, keys: Collection[BlobKey]) -> set[BlobKey]:
    """Delete these blobs; those that went. One that stays has no name, and is found again."""
    return await asyncio.to_thread(_delete_all, blobs, keys) if keys else set()


def _delete_all(blobs: BlobStore, keys: Collection[BlobKey]) -> set[BlobKey]:
    gone = set()
    for key in sorted(keys):
        try:
            blobs.delete(key)
        except TreadleError as error:
            log.warning("blob not deleted", key=key, reason=error.message)
        else:
            gone.add(key)
    return gone


def _next_chunk(keys: Iterator[BlobKey]) -> list[BlobKey]:
    return list(islice(keys, MAX_BLOBS_PER_QUERY))
