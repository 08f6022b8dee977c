"""Answers about pools, runs and commands to operators, as models. See answers.py."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from treadle.wire.answers import Answer


class PoolFactsAnswer(Answer):
    """What the base model is, by the worker that loaded it."""

    revision: str
    architecture: str
    vocab_size: int
    max_context_length: int
    num_parameters: int
    dtype: str
    device: str


class PoolWorkerAnswer(Answer):
    """One place for a worker; a worker that dies is replaced there."""

    name: str
    """Its number; behind an s when it only samples."""
    role: Literal["both", "training", "sampling"]
    """training: of samples only those that no other sampler of the pool can do."""
    state: Literal["loading", "up", "leaving", "down"]
    """leaving: its tenants move and its samples end."""
    reason: str
    """Why it is not up; empty when it is."""
    num_tenants: int
    """Tenants whose runs live there."""
    num_runs: int
    """Runs that it holds."""
    num_samples: int
    """Samples that it has."""
    num_deaths: int
    """Of workers there, since the pool's leader leads."""


class PoolAnswer(Answer):
    name: str
    source: str | None
    """Where its base model comes from; null for a pool of other servers' settings."""
    revision: str | None
    """As it was asked for; `facts` has the one that was loaded."""
    is_added: bool
    """Added at run time, and in no server's settings."""
    state: Literal["serving", "paused", "draining", "removed"]
    """What operators decided."""
    reason: str
    """Why, as they said."""
    decided_at: datetime | None
    """When; null when nothing was decided."""
    is_ready: bool
    """Whether its leader can run work."""
    not_ready_reason: str
    """Why not; empty when it is ready."""
    leader: str | None
    """The server process that leads it."""
    cycle: int | None
    """The newest cycle of its leader."""
    num_workers: int
    """Workers that have loaded the model."""
    num_deaths: int
    """Of workers, since its leader leads."""
    wanted_workers: int | None
    """How many that train operators want; null: as the servers' settings say."""
    wanted_samplers: int | None
    """The same of workers that only sample."""
    workers: list[PoolWorkerAnswer]
    """Each of them, by its leader's newest report."""
    facts: PoolFactsAnswer | None
    """Null until a worker has loaded it once."""


class PoolsAnswer(Answer):
    pools: list[PoolAnswer]
    """This server's pools, then those that operators decided about and that it does not serve."""


class AdminRunAnswer(Answer):
    """One run."""

    training_run_id: str
    tenant_id: str
    session_id: str
    pool: str
    base_model: str
    lora_rank: int
    state: Literal["creating", "ready", "failed", "lost", "unloaded"]
    state_message: str
    next_seq_id: int
    """Of its next request: all before it are done or refused."""
    created_at: datetime
    last_request_at: datetime


class AdminRunsAnswer(Answer):
    runs: list[AdminRunAnswer]
    """Newest first."""
    next: str | None
    """What `after` is for the next page; null at the end."""


class RunSnapshotAnswer(Answer):
    """What the run can be restored from."""

    seq_id: int
    """It holds the state right behind this request."""
    num_bytes: int
    created_at: datetime
    numerics_profile: str
    is_seed: bool
    """No file: the run as its seed makes it."""


class RunReplayAnswer(Answer):
    """What the loss of its worker would cost the run."""

    num_ops: int
    """Requests behind its newest snapshot, which are run again."""
    run_s: float
    """How long they took the worker."""
    num_payloads: int
    """Requests whose content is kept for that, older snapshots included."""
    payload_bytes: int


class RunQueueAnswer(Answer):
    """What it has waiting or running."""

    num_ops: int
    num_tokens: int
    num_bytes: int
    oldest_s: float | None
    """Age of the oldest; null when nothing waits."""


class RunOpAnswer(Answer):
    """A pass or a step that was committed."""

    seq_id: int
    kind: str
    finished_at: datetime
    queued_s: float
    run_s: float
    cycle: int
    metrics: dict[str, float]


class AdminRunDetailAnswer(AdminRunAnswer):
    lora_seed: int | None
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    incarnation: int
    """How often its state was built on a worker."""
    changed_seq: int
    """The newest request that changed its state."""
    user_metadata: dict[str, str]
    is_resident: bool | None
    """Whether the pool's worker holds it, by its leader's newest report; null when nobody leads the pool."""
    leader: str | None
    snapshots: list[RunSnapshotAnswer]
    """Newest first, at most two."""
    replay: RunReplayAnswer
    queued: RunQueueAnswer
    recent: list[RunOpAnswer]
    """The newest first."""


class CommandGivenAnswer(Answer):
    command_id: int
    """Ask GET /admin/v1/commands/{command_id} what became of it."""


class CommandAnswer(Answer):
    """A command about one run."""

    command_id: int
    kind: Literal["snapshot", "evict"]
    training_run_id: str
    pool: str
    created_by: str
    created_at: datetime
    state: Literal["open", "done", "failed"]
    """Open until the leader of its pool has carried it out."""
    done_at: datetime | None
    message: str
    """How it ended; empty while it is open."""
