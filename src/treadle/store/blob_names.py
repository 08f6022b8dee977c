"""Which blobs some row still names. It refuses to touch blobs.

Invariant: a key that `named_among` leaves out is named by no row of any table, as far as this transaction sees. The key
of a payload or of a snapshot of its own then never comes back; a checkpoint's does with a load that is queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import BlobKey
from treadle.store.request_rows import chunks
from treadle.store.tables import checkpoints, requests, sampling_sessions, snapshots

# Every key that some row names: one query per column that holds keys, each of which has an index.
KEYS_IN_USE: tuple[sa.Select[Any], ...] = (
    sa.select(snapshots.c.blob_key).where(snapshots.c.blob_key.is_not(None)),
    sa.select(checkpoints.c.blob_key),
    sa.select(sampling_sessions.c.blob_key).where(
        sampling_sessions.c.blob_key.is_not(None), sampling_sessions.c.is_dropped.is_(sa.false())
    ),
    sa.select(requests.c.payload_key).where(requests.c.payload_key.is_not(None)),
)
# Weights that a save without a name has made: the blob comes some time after the row that names it.
IS_UNNAMED_VERSION = sampling_sessions.c.seq_id.is_not(None) & sampling_sessions.c.model_path.is_(None)
NAMED = tuple(query.where(query.selected_columns[0].in_(sa.bindparam("keys", expanding=True))) for query in KEYS_IN_USE)


def named_among(conn: sa.Connection, keys: Sequence[BlobKey]) -> set[BlobKey]:
    """Those of these keys that a snapshot, checkpoint, sampling session with its weights, or request names."""
    return {
        BlobKey(key)
        for chunk in chunks(keys)
        for statement in NAMED
        for key in conn.execute(statement, {"keys": chunk}).scalars()
    }
