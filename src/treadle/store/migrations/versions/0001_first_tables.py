"""The first tables: keys, sessions, runs, the queue with its payloads and results, checkpoints, leases, run log."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite numbers rows by itself only in a column of exactly this type.
_ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _create_keys_and_sessions()
    _create_runs()
    _create_requests()
    _create_side_tables()


def _where(condition: Any) -> dict[str, Any]:
    """The condition of a partial index, for either database."""
    return {"sqlite_where": condition, "postgresql_where": condition}


def _create_keys_and_sessions() -> None:
    op.create_table(
        "keys",
        sa.Column("key_id", _ROW_ID, autoincrement=True, nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("is_admin", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double()),
        sa.PrimaryKeyConstraint("key_id", name="pk_keys"),
        sa.UniqueConstraint("digest", name="uq_keys_digest"),
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("last_heartbeat_at", sa.Double(), nullable=False),
        sa.Column("sdk_version", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text()),
        sa.Column("display_name", sa.Text()),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("finished_at", sa.Double()),
        sa.Column("finish_reason", sa.Text()),
        sa.Column("finish_detail", sa.Text()),
        sa.PrimaryKeyConstraint("session_id", name="pk_sessions"),
        sa.UniqueConstraint("tenant_id", "idempotency_key", name="uq_sessions_tenant_id"),
    )
    op.create_index("ix_sessions_tenant", "sessions", ["tenant_id", "created_at"])


def _create_runs() -> None:
    op.create_table(
        "models",
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("lora", sa.JSON(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("state_message", sa.Text(), nullable=False),
        sa.Column("next_seq_id", sa.BigInteger(), nullable=False),
        sa.Column("incarnation", sa.BigInteger(), nullable=False),
        sa.Column("changed_seq", sa.BigInteger(), nullable=False),
        sa.Column("snapshot_key", sa.Text()),
        sa.Column("snapshot_seq", sa.BigInteger(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("last_request_at", sa.Double(), nullable=False),
        sa.Column("create_request_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name="fk_models_session_id"),
        sa.PrimaryKeyConstraint("model_id", name="pk_models"),
    )
    op.create_index("ix_models_pool", "models", ["pool", "state"])
    op.create_index("ix_models_session", "models", ["session_id"])
    op.create_index("ix_models_tenant", "models", ["tenant_id", "created_at"])
    op.create_table(
        "sampling_sessions",
        sa.Column("sampling_session_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("model_path", sa.Text()),
        sa.Column("blob_key", sa.Text()),
        sa.Column("model_id", sa.Text()),
        sa.Column("client_counter", sa.BigInteger(), nullable=False),
        sa.Column("finished_counter", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name="fk_sampling_sessions_model_id"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name="fk_sampling_sessions_session_id"),
        sa.PrimaryKeyConstraint("sampling_session_id", name="pk_sampling_sessions"),
    )
    op.create_index("ix_sampling_sessions_session", "sampling_sessions", ["session_id"])
    op.create_table(
        "checkpoints",
        sa.Column("tinker_path", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("blob_key", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("seq_id", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("lora", sa.JSON(), nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("expires_at", sa.Double()),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name="fk_checkpoints_model_id"),
        sa.PrimaryKeyConstraint("tinker_path", name="pk_checkpoints"),
    )
    op.create_index("ix_checkpoints_model", "checkpoints", ["model_id", "kind", "created_at"])
    op.create_index("ix_checkpoints_tenant", "checkpoints", ["tenant_id", "created_at"])


def _create_requests() -> None:
    op.create_table(
        "requests",
        sa.Column("row_id", _ROW_ID, autoincrement=True, nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("seq_id", sa.BigInteger(), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("quantum_tokens", sa.JSON(), nullable=False),
        sa.Column("model_id", sa.Text()),
        sa.Column("sampling_session_id", sa.Text()),
        sa.Column("payload_key", sa.Text()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("in_line", sa.Boolean(), nullable=False),
        sa.Column("finished_at", sa.Double()),
        sa.Column("finished_order", sa.BigInteger()),
        sa.Column("result_bytes", sa.BigInteger()),
        sa.Column("error", sa.Text()),
        sa.Column("category", sa.Text()),
        sa.Column("is_transient", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name="fk_requests_model_id"),
        sa.ForeignKeyConstraint(
            ["sampling_session_id"], ["sampling_sessions.sampling_session_id"], name="fk_requests_sampling_session_id"
        ),
        sa.PrimaryKeyConstraint("row_id", name="pk_requests"),
        sa.UniqueConstraint("request_id", name="uq_requests_request_id"),
    )
    op.create_index(
        "ix_requests_finished_samples",
        "requests",
        ["sampling_session_id", "finished_order"],
        unique=True,
        **_where(sa.column("finished_order").is_not(None)),
    )
    op.create_index(
        "ix_requests_line",
        "requests",
        ["pool", "model_id", "seq_id", "in_line"],
        **_where(sa.column("in_line").is_(sa.true())),
    )
    op.create_index(
        "ix_requests_model_seq",
        "requests",
        ["model_id", "seq_id"],
        unique=True,
        **_where(sa.column("model_id").is_not(None)),
    )
    op.create_index(
        "ix_requests_queued_of_tenant", "requests", ["tenant_id", "num_tokens"], **_where(sa.text("state = 'queued'"))
    )
    op.create_index(
        "ix_requests_queued_samples",
        "requests",
        ["pool", "tenant_id", "row_id"],
        **_where(sa.text("state = 'queued' AND kind = 'sample'")),
    )


def _create_side_tables() -> None:
    op.create_table(
        "payloads",
        sa.Column("row_id", _ROW_ID, autoincrement=False, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["row_id"], ["requests.row_id"], name="fk_payloads_row_id"),
        sa.PrimaryKeyConstraint("row_id", name="pk_payloads"),
    )
    op.create_table(
        "results",
        sa.Column("row_id", _ROW_ID, autoincrement=False, nullable=False),
        sa.Column("content_type", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=False),
        sa.Column("delivered_at", sa.Double()),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["row_id"], ["requests.row_id"], name="fk_results_row_id"),
        sa.PrimaryKeyConstraint("row_id", name="pk_results"),
    )
    op.create_index("ix_results_finished_at", "results", ["finished_at"])
    op.create_table(
        "leases",
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("cycle", sa.BigInteger(), nullable=False),
        sa.Column("in_flight", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("pool", name="pk_leases"),
    )
    op.create_table(
        "run_log",
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("seq_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name="fk_run_log_model_id"),
        sa.PrimaryKeyConstraint("model_id", "seq_id", name="pk_run_log"),
    )
    op.create_table(
        "usage",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_usage"),
    )
