"""What operators govern: tenants and organisations, shared projects, quotas, rules about losses, pools, commands."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _add_columns()
    _count_by_run()
    _create_tenant_tables()
    _create_policy_tables()
    _create_loss_tables()
    _create_pool_tables()
    _create_ended_checkpoints()


def _add_columns() -> None:
    op.add_column("keys", sa.Column("name", sa.Text()))
    op.add_column("keys", sa.Column("expires_at", sa.Double()))
    op.add_column("keys", sa.Column("created_by", sa.Text()))
    op.create_index("ix_keys_tenant", "keys", ["tenant_id"])
    has_project = sa.text("project_id IS NOT NULL")
    op.create_index(
        "ix_sessions_project", "sessions", ["project_id"], sqlite_where=has_project, postgresql_where=has_project
    )
    op.add_column("tenants", sa.Column("organization", sa.Text()))
    op.add_column("tenants", sa.Column("source", sa.Text()))
    op.add_column("tenants", sa.Column("is_suspended", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("tenants", sa.Column("suspended_reason", sa.Text()))
    op.add_column("tenants", sa.Column("created_at", sa.Double()))
    op.create_index("ix_tenants_organization", "tenants", ["organization"])
    is_set_apart = sa.text("weight_class != 'standard'")
    op.create_index(
        "ix_tenants_set_apart", "tenants", ["tenant_id"], sqlite_where=is_set_apart, postgresql_where=is_set_apart
    )
    op.create_index("ix_checkpoints_created_at", "checkpoints", ["created_at", "tinker_path"])
    # SQLite has no TRUE of its own.
    of_sqlite, of_postgresql = sa.text("public IS 1"), sa.text("public IS true")
    op.create_index(
        "ix_checkpoints_public",
        "checkpoints",
        ["created_at", "tinker_path"],
        sqlite_where=of_sqlite,
        postgresql_where=of_postgresql,
    )
    op.add_column("audit_log", sa.Column("actor", sa.Text()))
    op.add_column("audit_log", sa.Column("subject", sa.Text()))
    op.create_index("ix_audit_log_created_at", "audit_log", ["created_at"])
    op.create_index("ix_audit_log_subject", "audit_log", ["subject", "created_at"])
    op.create_index("ix_audit_log_event", "audit_log", ["event", "created_at"])
    op.execute(
        "INSERT INTO tenants (tenant_id, weight_class, updated_at, source, created_at) "
        "SELECT tenant_id, 'standard', MIN(created_at), 'keys', MIN(created_at) FROM keys "
        "WHERE tenant_id NOT IN (SELECT tenant_id FROM tenants) GROUP BY tenant_id"
    )


def _count_by_run() -> None:
    """A primary key cannot grow in place everywhere, so the table is made anew."""
    columns = "tenant_id, bucket_start, session_id, base_model, kind, amount"
    op.execute(f"CREATE TABLE usage_events_0003 AS SELECT {columns} FROM usage_events")
    op.drop_table("usage_events")
    op.create_table(
        "usage_events",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("bucket_start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False, server_default=sa.text("''")),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("amount", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint(
            "tenant_id", "bucket_start", "session_id", "model_id", "base_model", "kind", name="pk_usage_events"
        ),
    )
    op.execute(f"INSERT INTO usage_events ({columns}) SELECT {columns} FROM usage_events_0003")
    op.drop_table("usage_events_0003")
    op.create_index("ix_usage_events_bucket_start", "usage_events", ["bucket_start"])


def _create_tenant_tables() -> None:
    op.create_table(
        "token_verdicts",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("is_member", sa.Boolean(), nullable=False),
        sa.Column("checked_at", sa.Double(), nullable=False),
        sa.Column("good_until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_token_verdicts"),
    )
    op.create_index("ix_token_verdicts_checked_at", "token_verdicts", ["checked_at"])
    op.create_table(
        "organizations",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_organizations"),
    )
    op.create_table(
        "projects",
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("project_id", name="pk_projects"),
    )
    op.create_index("ix_projects_tenant_id", "projects", ["tenant_id"])
    op.create_table(
        "project_members",
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("added_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.project_id"], name="fk_project_members_project_id"),
        sa.PrimaryKeyConstraint("project_id", "tenant_id", name="pk_project_members"),
    )
    op.create_index("ix_project_members_tenant_id", "project_members", ["tenant_id"])


def _create_policy_tables() -> None:
    op.create_table(
        "quotas",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("quota", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "quota", name="pk_quotas"),
    )
    op.create_table(
        "loss_rules",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("loss", sa.Text(), nullable=False),
        sa.Column("is_enabled", sa.Boolean()),
        sa.Column("bounds", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "loss", name="pk_loss_rules"),
    )
    op.create_table(
        "control",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.JSON()),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_control"),
    )
    op.create_table(
        "rate_windows",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("slot_start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("amount", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "kind", "slot_start", name="pk_rate_windows"),
    )
    op.create_index("ix_rate_windows_slot_start", "rate_windows", ["slot_start"])
    is_alive = sa.text("state = 'creating' OR state = 'ready'")
    op.create_index("ix_models_alive", "models", ["tenant_id"], sqlite_where=is_alive, postgresql_where=is_alive)


def _create_loss_tables() -> None:
    op.create_table(
        "loss_definitions",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("definition", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_loss_definitions"),
    )
    op.create_table(
        "named_losses",
        sa.Column("named_loss_id", _ROW_ID, autoincrement=True, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text()),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("form", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary()),
        sa.Column("definition_sha256", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("tenants", sa.JSON()),
        sa.Column("review", sa.JSON()),
        sa.Column("reason", sa.Text()),
        sa.Column("submitted_at", sa.Double(), nullable=False),
        sa.Column("decided_at", sa.Double()),
        sa.Column("decided_by", sa.Text()),
        sa.ForeignKeyConstraint(
            ["definition_sha256"], ["loss_definitions.sha256"], name="fk_named_losses_definition_sha256"
        ),
        sa.PrimaryKeyConstraint("named_loss_id", name="pk_named_losses"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_named_losses_tenant_id", "named_losses", ["tenant_id"])
    is_approved = sa.text("status = 'approved'")
    op.create_index(
        "uq_named_losses_approved",
        "named_losses",
        ["name"],
        unique=True,
        sqlite_where=is_approved,
        postgresql_where=is_approved,
    )


def _create_ended_checkpoints() -> None:
    op.create_table(
        "ended_checkpoints",
        sa.Column("ended_checkpoint_id", _ROW_ID, autoincrement=True, nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name="fk_ended_checkpoints_model_id"),
        sa.PrimaryKeyConstraint("ended_checkpoint_id", name="pk_ended_checkpoints"),
        sqlite_autoincrement=True,
    )


def _create_pool_tables() -> None:
    op.create_table(
        "pool_settings",
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("source", sa.Text()),
        sa.Column("revision", sa.Text()),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("pool", name="pk_pool_settings"),
    )
    op.create_table(
        "operator_commands",
        sa.Column("command_id", _ROW_ID, autoincrement=True, nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("done_at", sa.Double()),
        sa.Column("outcome", sa.Text()),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name="fk_operator_commands_model_id"),
        sa.PrimaryKeyConstraint("command_id", name="pk_operator_commands"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_models_created_at", "models", ["created_at", "model_id"])
    op.create_index("ix_models_pool_created_at", "models", ["pool", "created_at", "model_id"])
    op.create_index("ix_models_state_created_at", "models", ["state", "created_at", "model_id"])
    is_open = sa.text("done_at IS NULL")
    op.create_index(
        "ix_operator_commands_open", "operator_commands", ["pool"], sqlite_where=is_open, postgresql_where=is_open
    )
