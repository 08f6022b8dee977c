"""What checkpoints took until they ended: deleted, expired or replaced, so that their last hour is counted as well.

It refuses to touch blobs and to know who ends a checkpoint. Invariant: whoever deletes a row of `checkpoints` notes in
the same transaction what the statement returned, so that a checkpoint is live or noted, and never both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from treadle.store.tables import AnyRow, checkpoints, ended_checkpoints

# What a statement that ends checkpoints returns.
ENDED = (
    checkpoints.c.tinker_path,
    checkpoints.c.tenant_id,
    checkpoints.c.model_id,
    checkpoints.c.base_model,
    checkpoints.c.size_bytes,
    checkpoints.c.created_at,
    checkpoints.c.expires_at,
    checkpoints.c.blob_key,
)
_ADD = ended_checkpoints.insert()


def end_checkpoints(conn: sa.Connection, deletion: sa.Delete, values: dict[str, Any], *, now: float) -> list[AnyRow]:
    """The rows that `deletion` deleted, with the columns of ENDED, each noted as ended now, or when its time was up."""
    rows = list(conn.execute(deletion.returning(*ENDED), values).all())
    note_ended(conn, rows, now=now)
    return rows


def note_ended(conn: sa.Connection, rows: Sequence[AnyRow], *, now: float) -> None:
    """Note checkpoints whose rows were deleted in this transaction."""
    ended = [
        {
            "tenant_id": row.tenant_id,
            "model_id": row.model_id,
            "base_model": row.base_model,
            "size_bytes": row.size_bytes,
            "created_at": row.created_at,
            "ended_at": now if row.expires_at is None else min(now, row.expires_at),
        }
        for row in rows
        if row.size_bytes
    ]
    if ended:
        conn.execute(_ADD, ended)
