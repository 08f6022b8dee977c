"""The states of requests, models and sessions, and the error categories. Branch on them fully."""

from __future__ import annotations

from enum import StrEnum


class RequestState(StrEnum):
    """A row's life. There is no RUNNING: rows keep QUEUED until their outcome is committed."""

    QUEUED = "queued"
    DONE = "done"
    FAILED = "failed"


class ModelState(StrEnum):
    """A training run's life. LOST: neither its snapshots nor its log give its state back, and it says so."""

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    LOST = "lost"
    UNLOADED = "unloaded"


class SessionState(StrEnum):
    """EXPIRED: no heartbeat for long. Its runs rest in cold storage; the next sign of life makes it active again."""

    ACTIVE = "active"
    FINISHED = "finished"
    EXPIRED = "expired"


class Category(StrEnum):
    """Who must act on a failed future; the SDK reads the lower-case value."""

    USER = "user"
    SERVER = "server"
    UNKNOWN = "unknown"


class QueueState(StrEnum):
    """What a 408 answer tells a waiting client."""

    ACTIVE = "active"
    PAUSED_CAPACITY = "paused_capacity"
    PAUSED_RATE_LIMIT = "paused_rate_limit"


class StopReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
