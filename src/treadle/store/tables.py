"""The schema, as SQLAlchemy sees it. Migrations build the same one; a test compares them.

It refuses to know queries. Times are seconds since the epoch. Ids that the API forms are text; `row_id` numbers rows
in arrival order and is what side tables refer to, so that their inserts append. Wide values (payloads, results) live
in side tables: the queue is scanned without touching them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import sqlalchemy as sa

AnyRow: TypeAlias = "sa.Row[*tuple[Any, ...]]"
"""A fetched row; the columns of the statement say what is in it."""

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

# SQLite numbers rows by itself only in a column of exactly this type.
_RowId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _partial_index(name: str, *columns: sa.Column[object], where: sa.ColumnElement[bool], unique: bool = False) -> None:
    """Used only for queries that repeat the condition word for word, which is why conditions hold literals."""
    sa.Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


keys = sa.Table(
    "keys",
    metadata,
    sa.Column("key_id", _RowId, primary_key=True, autoincrement=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("user", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("is_admin", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
    # What its holder calls it.
    sa.Column("name", sa.Text),
    sa.Column("expires_at", sa.Double),
    # Who created it, as the audit log names people; NULL for the command line.
    sa.Column("created_by", sa.Text),
)
sa.Index("ix_keys_tenant", keys.c.tenant_id)

# What an outside service said about tokens, by their SHA-256.
token_verdicts = sa.Table(
    "token_verdicts",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    # The authenticator that asked.
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("user", sa.Text, nullable=False),
    sa.Column("is_member", sa.Boolean, nullable=False),
    sa.Column("checked_at", sa.Double, nullable=False, index=True),
    # Believed so long: moved on while the service does not answer.
    sa.Column("good_until", sa.Double, nullable=False),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("last_heartbeat_at", sa.Double, nullable=False),
    sa.Column("sdk_version", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text),
    sa.Column("display_name", sa.Text),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("finished_at", sa.Double),
    sa.Column("finish_reason", sa.Text),
    sa.Column("finish_detail", sa.Text),
    # TINKER_TAGS of the client; NULL in rows of the first releases.
    sa.Column("tags", sa.JSON),
    # A session without a key conflicts with none: NULLs are distinct.
    sa.UniqueConstraint("tenant_id", "idempotency_key"),
)
sa.Index("ix_sessions_tenant", sessions.c.tenant_id, sessions.c.created_at)
_partial_index("ix_sessions_project", sessions.c.project_id, where=sessions.c.project_id.is_not(None))
# For the search for silent clients. Not on the heartbeat itself: each one would have to move its entry.
IS_ACTIVE = sessions.c.state == sa.literal_column("'active'")
_partial_index("ix_sessions_active", sessions.c.session_id, where=IS_ACTIVE)

models = sa.Table(
    "models",
    metadata,
    sa.Column("model_id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, sa.ForeignKey(sessions.c.session_id), nullable=False),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("pool", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("revision", sa.Text, nullable=False),
    sa.Column("lora", sa.JSON, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("state_message", sa.Text, nullable=False),
    sa.Column("next_seq_id", sa.BigInteger, nullable=False),
    sa.Column("incarnation", sa.BigInteger, nullable=False),
    sa.Column("changed_seq", sa.BigInteger, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("last_request_at", sa.Double, nullable=False),
    # The request that creates it, which a replay is answered with.
    sa.Column("create_request_id", sa.Text, nullable=False),
    # Of its ops up to this one no payload is left: where the next retirement begins.
    sa.Column("retired_seq", sa.BigInteger, nullable=False, server_default=sa.text("0")),
)
sa.Index("ix_models_session", models.c.session_id)
sa.Index("ix_models_tenant", models.c.tenant_id, models.c.created_at)
sa.Index("ix_models_pool", models.c.pool, models.c.state)
# Runs that count against a quota: the others, which are over, outnumber them by far.
IS_ALIVE = sa.or_(
    models.c.state == sa.literal_column("'creating'"),
    models.c.state == sa.literal_column("'ready'"),
)
_partial_index("ix_models_alive", models.c.tenant_id, where=IS_ALIVE)
# For operators' listings, newest first.
sa.Index("ix_models_created_at", models.c.created_at, models.c.model_id)
sa.Index("ix_models_pool_created_at", models.c.pool, models.c.created_at, models.c.model_id)
sa.Index("ix_models_state_created_at", models.c.state, models.c.created_at, models.c.model_id)

# What a run's state can be restored from: its two newest (see snapshots.py).
snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("model_id", sa.Text, sa.ForeignKey(models.c.model_id), primary_key=True),
    sa.Column("seq_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("blob_key", sa.Text),
    sa.Column("with_optimizer", sa.Boolean, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("numerics_profile", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)
_partial_index("ix_snapshots_blob_key", snapshots.c.blob_key, where=snapshots.c.blob_key.is_not(None))

sampling_sessions = sa.Table(
    "sampling_sessions",
    metadata,
    sa.Column("sampling_session_id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, sa.ForeignKey(sessions.c.session_id), nullable=False),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("pool", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("model_path", sa.Text),
    sa.Column("blob_key", sa.Text),
    sa.Column("model_id", sa.Text, sa.ForeignKey(models.c.model_id)),
    # Clients that joined it, and samples of it that are finished; each numbers the next one.
    sa.Column("client_counter", sa.BigInteger, nullable=False),
    sa.Column("finished_counter", sa.BigInteger, nullable=False),
    # When it was made, or the newest of its samples was finished.
    sa.Column("last_used_at", sa.Double, nullable=False, server_default=sa.text("0")),
    # Its weights were swept: it can be named, and not sampled.
    sa.Column("is_dropped", sa.Boolean, nullable=False, server_default=sa.false()),
    # Of the save that made it.
    sa.Column("seq_id", sa.BigInteger),
    # "inflight": its clients take newer weights of the same run as they come.
    sa.Column("kind", sa.Text, nullable=False, server_default=sa.text("'snapshot'")),
)
sa.Index("ix_sampling_sessions_session", sampling_sessions.c.session_id)
_s = sampling_sessions.c
_partial_index("ix_sampling_sessions_blob_key", _s.blob_key, where=_s.blob_key.is_not(None))
# Versions that a training run saved for itself and that can still be sampled.
IS_KEPT_VERSION = sa.and_(_s.model_id.is_not(None), _s.is_dropped.is_(sa.false()))
_partial_index("ix_sampling_sessions_kept_versions", _s.model_id, _s.created_at, where=IS_KEPT_VERSION)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("row_id", _RowId, primary_key=True, autoincrement=True),
    sa.Column("request_id", sa.Text, nullable=False, unique=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("pool", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("seq_id", sa.BigInteger, nullable=False),
    sa.Column("num_tokens", sa.BigInteger, nullable=False),
    sa.Column("quantum_tokens", sa.JSON, nullable=False),
    sa.Column("model_id", sa.Text, sa.ForeignKey(models.c.model_id)),
    sa.Column("sampling_session_id", sa.Text, sa.ForeignKey(sampling_sessions.c.sampling_session_id)),
    sa.Column("payload_key", sa.Text),
    sa.Column("created_at", sa.Double, nullable=False),
    # A sequenced op that its model has not passed yet: queued, or refused at admission and still to be stepped over.
    sa.Column("in_line", sa.Boolean, nullable=False),
    sa.Column("finished_at", sa.Double),
    # Position among the finished samples of its sampling session, from 1 on, in commit order.
    sa.Column("finished_order", sa.BigInteger),
    sa.Column("result_bytes", sa.BigInteger),
    sa.Column("error", sa.Text),
    sa.Column("category", sa.Text),
    sa.Column("is_transient", sa.Boolean, nullable=False),
    # Of the payload as it came in, wherever it is kept.
    sa.Column("payload_bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    # The sampling session whose version a sample takes, when that is not its own.
    sa.Column("weights_id", sa.Text),
)

IS_QUEUED = requests.c.state == sa.literal_column("'queued'")
IS_SAMPLE = requests.c.kind == sa.literal_column("'sample'")
IS_IN_LINE = requests.c.in_line.is_(sa.true())

_r = requests.c
# in_line is constant here, but SQLite before 3.41 fetches the row to check the condition unless the index has it.
_partial_index("ix_requests_line", _r.pool, _r.model_id, _r.seq_id, _r.in_line, where=IS_IN_LINE)
_partial_index("ix_requests_queued_samples", _r.pool, _r.tenant_id, _r.row_id, where=sa.and_(IS_QUEUED, IS_SAMPLE))
_partial_index("ix_requests_queued_of_tenant", _r.tenant_id, where=IS_QUEUED)
_partial_index("ix_requests_model_seq", _r.model_id, _r.seq_id, where=_r.model_id.is_not(None), unique=True)
_partial_index(
    "ix_requests_finished_samples",
    _r.sampling_session_id,
    _r.finished_order,
    where=_r.finished_order.is_not(None),
    unique=True,
)
# Only large payloads have a key, so few rows pay for this.
_partial_index("ix_requests_payload_key", _r.payload_key, where=_r.payload_key.is_not(None))
_partial_index("ix_requests_weights_id", _r.weights_id, where=_r.weights_id.is_not(None))

payloads = sa.Table(
    "payloads",
    metadata,
    sa.Column("row_id", _RowId, sa.ForeignKey(requests.c.row_id), primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

results = sa.Table(
    "results",
    metadata,
    sa.Column("row_id", _RowId, sa.ForeignKey(requests.c.row_id), primary_key=True, autoincrement=False),
    sa.Column("content_type", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Double, nullable=False, index=True),
    sa.Column("delivered_at", sa.Double),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("tinker_path", sa.Text, primary_key=True),
    sa.Column("model_id", sa.Text, sa.ForeignKey(models.c.model_id), nullable=False),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("blob_key", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("seq_id", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("lora", sa.JSON, nullable=False),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    # External weights whose files only the holders of an age key can read.
    sa.Column("is_encrypted", sa.Boolean, nullable=False, server_default=sa.false()),
    # The path that it is a copy of; the two share their blob.
    sa.Column("copied_from", sa.Text),
)
sa.Index("ix_checkpoints_model", checkpoints.c.model_id, checkpoints.c.kind, checkpoints.c.created_at)
sa.Index("ix_checkpoints_tenant", checkpoints.c.tenant_id, checkpoints.c.created_at)
sa.Index("ix_checkpoints_blob_key", checkpoints.c.blob_key)
sa.Index("ix_checkpoints_created_at", checkpoints.c.created_at, checkpoints.c.tinker_path)
IS_PUBLIC = checkpoints.c.public.is_(sa.true())
_partial_index("ix_checkpoints_public", checkpoints.c.created_at, checkpoints.c.tinker_path, where=IS_PUBLIC)
_partial_index("ix_checkpoints_expires_at", checkpoints.c.expires_at, where=checkpoints.c.expires_at.is_not(None))

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("pool", sa.Text, primary_key=True),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Column("cycle", sa.BigInteger, nullable=False),
    # Requests handed to a worker and not committed: what a next leader has to suspect.
    sa.Column("in_flight", sa.JSON, nullable=False),
)

run_log = sa.Table(
    "run_log",
    metadata,
    sa.Column("model_id", sa.Text, sa.ForeignKey(models.c.model_id), primary_key=True),
    sa.Column("seq_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("queued_s", sa.Double, nullable=False, server_default=sa.text("0")),
    sa.Column("run_s", sa.Double, nullable=False, server_default=sa.text("0")),
    sa.Column("cycle", sa.BigInteger, nullable=False, server_default=sa.text("0")),
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("trained_tokens", sa.BigInteger, nullable=False),
)

# Tenants that have a key, came through an outside service, or that an operator set something for. One without a row
# has the defaults.
tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("weight_class", sa.Text, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("organization", sa.Text),
    # How it came here: keys, modelscope, open or admin.
    sa.Column("source", sa.Text),
    sa.Column("is_suspended", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("suspended_reason", sa.Text),
    sa.Column("created_at", sa.Double),
)
sa.Index("ix_tenants_organization", tenants.c.organization)
# The scheduler reads these again and again.
IS_SET_APART = tenants.c.weight_class != sa.literal_column("'standard'")
_partial_index("ix_tenants_set_apart", tenants.c.tenant_id, where=IS_SET_APART)

organizations = sa.Table(
    "organizations",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

# Shared projects. A project_id that is in no row is a name of one tenant's own, and shared with nobody.
projects = sa.Table(
    "projects",
    metadata,
    sa.Column("project_id", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

project_members = sa.Table(
    "project_members",
    metadata,
    sa.Column("project_id", sa.Text, sa.ForeignKey(projects.c.project_id), primary_key=True),
    sa.Column("tenant_id", sa.Text, primary_key=True, index=True),
    sa.Column("added_at", sa.Double, nullable=False),
)

# Limits that operators set. scope: "default", "organization:NAME" or "tenant:ID".
quotas = sa.Table(
    "quotas",
    metadata,
    sa.Column("scope", sa.Text, primary_key=True),
    sa.Column("quota", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)

# What operators decided about losses; "custom" stands for all traced ones. scope: as in quotas.
loss_rules = sa.Table(
    "loss_rules",
    metadata,
    sa.Column("scope", sa.Text, primary_key=True),
    sa.Column("loss", sa.Text, primary_key=True),
    # NULL: as the next wider scope says.
    sa.Column("is_enabled", sa.Boolean),
    # {key: [lowest, highest]} of its settings.
    sa.Column("bounds", sa.JSON, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)

# Small things that all servers of a database follow. The row "policies" has the version of everything that
# PolicyWatch reads.
control = sa.Table(
    "control",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("value", sa.JSON),
    sa.Column("updated_at", sa.Double, nullable=False),
)

# Graphs of approved losses, by the SHA-256 of their canonical JSON.
loss_definitions = sa.Table(
    "loss_definitions",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("definition", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

# Losses that users submitted under a name.
named_losses = sa.Table(
    "named_losses",
    metadata,
    sa.Column("named_loss_id", _RowId, primary_key=True, autoincrement=True),
    sa.Column("name", sa.Text, nullable=False),
    # Who submitted it.
    sa.Column("tenant_id", sa.Text, nullable=False, index=True),
    # "upload", "ms://org/repo/FILE" or "hf://org/repo/FILE".
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("revision", sa.Text),
    # Of `content`.
    sa.Column("sha256", sa.Text, nullable=False),
    # graph or python.
    sa.Column("form", sa.Text, nullable=False),
    # NULL until the file of a hub was fetched.
    sa.Column("content", sa.LargeBinary),
    sa.Column("definition_sha256", sa.Text, sa.ForeignKey(loss_definitions.c.sha256)),
    # pending, approved, rejected or revoked.
    sa.Column("status", sa.Text, nullable=False),
    # Tenants that may use it; NULL: all.
    sa.Column("tenants", sa.JSON),
    # What its review found.
    sa.Column("review", sa.JSON),
    sa.Column("reason", sa.Text),
    sa.Column("submitted_at", sa.Double, nullable=False),
    sa.Column("decided_at", sa.Double),
    sa.Column("decided_by", sa.Text),
    # An id never comes back: operators decide by it.
    sqlite_autoincrement=True,
)
IS_APPROVED = named_losses.c.status == sa.literal_column("'approved'")
_partial_index("uq_named_losses_approved", named_losses.c.name, where=IS_APPROVED, unique=True)

# What operators decided about pools, over what servers were started with.
pool_settings = sa.Table(
    "pool_settings",
    metadata,
    sa.Column("pool", sa.Text, primary_key=True),
    # Of a pool that was added at run time; NULL: from the servers' settings.
    sa.Column("source", sa.Text),
    sa.Column("revision", sa.Text),
    # serving, paused, draining or removed.
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("updated_at", sa.Double, nullable=False),
    # How many an operator wants; NULL: as the servers' settings say.
    sa.Column("num_workers", sa.Integer),
    sa.Column("num_samplers", sa.Integer),
)

# What operators asked the leader of a pool to do with a run.
operator_commands = sa.Table(
    "operator_commands",
    metadata,
    sa.Column("command_id", _RowId, primary_key=True, autoincrement=True),
    sa.Column("pool", sa.Text, nullable=False),
    # snapshot or evict.
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("model_id", sa.Text, sa.ForeignKey(models.c.model_id), nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("done_at", sa.Double),
    # "done: ..." or "failed: ...".
    sa.Column("outcome", sa.Text),
    # An id never comes back: operators ask by it.
    sqlite_autoincrement=True,
)
IS_OPEN_COMMAND = operator_commands.c.done_at.is_(None)
_partial_index("ix_operator_commands_open", operator_commands.c.pool, where=IS_OPEN_COMMAND)

# Tokens of finished work, summed over slots of a few seconds; only as long as rates look back.
rate_windows = sa.Table(
    "rate_windows",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    # training or sampling.
    sa.Column("kind", sa.Text, primary_key=True),
    # The slot's first second.
    sa.Column("slot_start", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("amount", sa.Double, nullable=False),
)
sa.Index("ix_rate_windows_slot_start", rate_windows.c.slot_start)

# What the leader's worker reported of its base model, for servers that have no worker of that pool.
pools = sa.Table(
    "pools",
    metadata,
    sa.Column("pool", sa.Text, primary_key=True),
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)

# Losses that clients traced, under the id that passes name.
custom_losses = sa.Table(
    "custom_losses",
    metadata,
    sa.Column("loss_id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, sa.ForeignKey(sessions.c.session_id), nullable=False),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("custom_loss_seq_id", sa.BigInteger, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    # Inputs and graph as checked, canonical JSON.
    sa.Column("definition", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.UniqueConstraint("session_id", "custom_loss_seq_id"),
)

# What was sampled with record_stability_info, by the id of the sequence: the policy's own tokens and logprobs.
stability_records = sa.Table(
    "stability_records",
    metadata,
    sa.Column("sequence_id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, sa.ForeignKey(sessions.c.session_id), nullable=False),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("last_used_at", sa.Double, nullable=False, index=True),
    # Of the request that sampled it.
    sa.Column("num_prompt_tokens", sa.BigInteger, nullable=False),
    # int32 and float32, little-endian, one entry per sampled token.
    sa.Column("tokens", sa.LargeBinary, nullable=False),
    sa.Column("logprobs", sa.LargeBinary, nullable=False),
)

# Who did what to things that outlive a request.
audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("audit_id", _RowId, primary_key=True, autoincrement=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    # checkpoints, projects, teams or organizations.
    sa.Column("event_type", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Column("model_id", sa.Text),
    sa.Column("tinker_path", sa.Text),
    sa.Column("purpose", sa.Text),
    # Of an operator's doing: who, and what it was done to ("tenant:user:alice", "key:3").
    sa.Column("actor", sa.Text),
    sa.Column("subject", sa.Text),
)
sa.Index("ix_audit_log_created_at", audit_log.c.created_at)
sa.Index("ix_audit_log_tenant", audit_log.c.tenant_id, audit_log.c.created_at)
sa.Index("ix_audit_log_subject", audit_log.c.subject, audit_log.c.created_at)
sa.Index("ix_audit_log_event", audit_log.c.event, audit_log.c.created_at)

# Checkpoints that were deleted, expired or replaced, until the storage of their last hour is counted.
ended_checkpoints = sa.Table(
    "ended_checkpoints",
    metadata,
    sa.Column("ended_checkpoint_id", _RowId, primary_key=True, autoincrement=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("model_id", sa.Text, sa.ForeignKey(models.c.model_id), nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double, nullable=False),
    sqlite_autoincrement=True,
)

# What was used, summed per hour.
usage_events = sa.Table(
    "usage_events",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    # The hour's first second.
    sa.Column("bucket_start", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("session_id", sa.Text, primary_key=True),
    # The run; "" for what samples weights of none of its tenant's runs.
    sa.Column("model_id", sa.Text, primary_key=True, server_default=sa.text("''")),
    sa.Column("base_model", sa.Text, primary_key=True),
    # training, sampling_prefill, sampling_prefill_cached, sampling_sample (tokens), checkpoint (number), storage
    # (byte-seconds).
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("amount", sa.Double, nullable=False),
)
sa.Index("ix_usage_events_bucket_start", usage_events.c.bucket_start)

# What all gateways of a database must agree on: the key that signs tokens and URLs.
secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)
