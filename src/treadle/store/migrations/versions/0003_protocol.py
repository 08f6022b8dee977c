"""What the rest of the protocol keeps: custom losses, records of samples, the audit log, usage per hour, secrets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _add_columns()
    _create_loss_tables()
    _create_account_tables()


def _add_columns() -> None:
    op.add_column("sessions", sa.Column("tags", sa.JSON()))
    op.add_column(
        "sampling_sessions", sa.Column("kind", sa.Text(), nullable=False, server_default=sa.text("'snapshot'"))
    )
    op.add_column("checkpoints", sa.Column("is_encrypted", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("checkpoints", sa.Column("copied_from", sa.Text()))
    op.add_column("requests", sa.Column("weights_id", sa.Text()))
    is_set = sa.text("weights_id IS NOT NULL")
    op.create_index("ix_requests_weights_id", "requests", ["weights_id"], sqlite_where=is_set, postgresql_where=is_set)


def _create_loss_tables() -> None:
    op.create_table(
        "custom_losses",
        sa.Column("loss_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("custom_loss_seq_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("definition", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name="fk_custom_losses_session_id"),
        sa.PrimaryKeyConstraint("loss_id", name="pk_custom_losses"),
        sa.UniqueConstraint("session_id", "custom_loss_seq_id", name="uq_custom_losses_session_id"),
    )
    op.create_table(
        "stability_records",
        sa.Column("sequence_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("last_used_at", sa.Double(), nullable=False),
        sa.Column("num_prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.LargeBinary(), nullable=False),
        sa.Column("logprobs", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name="fk_stability_records_session_id"),
        sa.PrimaryKeyConstraint("sequence_id", name="pk_stability_records"),
    )
    op.create_index("ix_stability_records_last_used_at", "stability_records", ["last_used_at"])


def _create_account_tables() -> None:
    op.create_table(
        "audit_log",
        sa.Column("audit_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("model_id", sa.Text()),
        sa.Column("tinker_path", sa.Text()),
        sa.Column("purpose", sa.Text()),
        sa.PrimaryKeyConstraint("audit_id", name="pk_audit_log"),
    )
    op.create_index("ix_audit_log_tenant", "audit_log", ["tenant_id", "created_at"])
    op.create_table(
        "usage_events",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("bucket_start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("amount", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint(
            "tenant_id", "bucket_start", "session_id", "base_model", "kind", name="pk_usage_events"
        ),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_secrets"),
    )
