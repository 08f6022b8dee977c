"""Snapshots as rows of their own, payloads that outlive their op, and what sweeps, admission and operators look for.

A run of the old schema keeps its snapshot only when that was exact (nothing changed behind it): there is no log to
replay, because payloads went with their outcomes. Without a snapshot it is lost when its state is needed, as before.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_tables()
    _keep_exact_snapshots()
    _add_columns()
    _add_indexes()


def _where(condition: Any) -> dict[str, Any]:
    """The condition of a partial index, for either database."""
    return {"sqlite_where": condition, "postgresql_where": condition}


def _create_tables() -> None:
    op.create_table(
        "snapshots",
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("seq_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("blob_key", sa.Text()),
        sa.Column("with_optimizer", sa.Boolean(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("numerics_profile", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name="fk_snapshots_model_id"),
        sa.PrimaryKeyConstraint("model_id", "seq_id", name="pk_snapshots"),
    )
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("weight_class", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_tenants"),
    )
    op.create_table(
        "pools",
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("pool", name="pk_pools"),
    )


def _keep_exact_snapshots() -> None:
    op.execute(
        "INSERT INTO snapshots (model_id, seq_id, blob_key, with_optimizer, num_bytes, numerics_profile, created_at) "
        "SELECT model_id, snapshot_seq, snapshot_key, true, 0, '', last_request_at FROM models "
        "WHERE state = 'ready' AND snapshot_seq >= 0 AND snapshot_seq >= changed_seq"
    )
    op.drop_column("models", "snapshot_key")
    op.drop_column("models", "snapshot_seq")


def _add_columns() -> None:
    zero = sa.text("0")
    op.add_column("models", sa.Column("retired_seq", sa.BigInteger(), nullable=False, server_default=zero))
    op.execute("UPDATE models SET retired_seq = next_seq_id - 1")
    op.add_column("requests", sa.Column("payload_bytes", sa.BigInteger(), nullable=False, server_default=zero))
    # These blobs were deleted with their outcomes.
    op.execute("UPDATE requests SET payload_key = NULL WHERE state <> 'queued' AND payload_key IS NOT NULL")
    op.execute(
        "UPDATE requests SET payload_bytes = "
        "(SELECT length(body) FROM payloads WHERE payloads.row_id = requests.row_id) "
        "WHERE row_id IN (SELECT row_id FROM payloads)"
    )
    for name, kind in (("queued_s", sa.Double()), ("run_s", sa.Double()), ("cycle", sa.BigInteger())):
        op.add_column("run_log", sa.Column(name, kind, nullable=False, server_default=zero))
    op.add_column("sampling_sessions", sa.Column("last_used_at", sa.Double(), nullable=False, server_default=zero))
    op.add_column("sampling_sessions", sa.Column("is_dropped", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("sampling_sessions", sa.Column("seq_id", sa.BigInteger()))
    # Nobody noted when it was last sampled; a version that is in use must not go because of that.
    op.execute(
        "UPDATE sampling_sessions SET last_used_at = coalesce((SELECT max(requests.finished_at) FROM requests "
        "WHERE requests.sampling_session_id = sampling_sessions.sampling_session_id "
        "AND requests.finished_order IS NOT NULL), created_at)"
    )


def _add_indexes() -> None:
    op.create_index("ix_snapshots_blob_key", "snapshots", ["blob_key"], **_is_set("blob_key"))
    op.create_index("ix_checkpoints_blob_key", "checkpoints", ["blob_key"])
    op.create_index("ix_checkpoints_expires_at", "checkpoints", ["expires_at"], **_is_set("expires_at"))
    op.create_index("ix_sampling_sessions_blob_key", "sampling_sessions", ["blob_key"], **_is_set("blob_key"))
    op.create_index(
        "ix_sampling_sessions_kept_versions",
        "sampling_sessions",
        ["model_id", "created_at"],
        **_where(sa.and_(sa.column("model_id").is_not(None), sa.column("is_dropped").is_(sa.false()))),
    )
    op.create_index("ix_sessions_active", "sessions", ["session_id"], **_where(sa.text("state = 'active'")))
    op.create_index("ix_requests_payload_key", "requests", ["payload_key"], **_is_set("payload_key"))
    op.drop_index("ix_requests_queued_of_tenant", "requests")
    # What waits is added up from its rows; columns in the index would only cost its writer.
    op.create_index("ix_requests_queued_of_tenant", "requests", ["tenant_id"], **_where(sa.text("state = 'queued'")))


def _is_set(column: str) -> dict[str, Any]:
    return _where(sa.column(column).is_not(None))
