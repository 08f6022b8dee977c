"""Ids and tinker:// paths: how they are formed, parsed and checked.

Ids that the SDK computes itself (model ids, sampling session ids) are formed exactly as it does.
This module knows no ownership; it only refuses what is malformed.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from treadle.errors import InvalidRequest

TenantId = NewType("TenantId", str)
SessionId = NewType("SessionId", str)
ModelId = NewType("ModelId", str)
RequestId = NewType("RequestId", str)
SamplingSessionId = NewType("SamplingSessionId", str)
PoolName = NewType("PoolName", str)
BlobKey = NewType("BlobKey", str)
LossId = NewType("LossId", str)

# The project of sessions that were put into none: answers of the API must name one.
DEFAULT_PROJECT = "default"
# How ids of shared projects begin, and nothing that a tenant may name its own projects.
PROJECT_PREFIX = "prj-"

# What paths may begin with; ours begin with the first.
PATH_SCHEMES = ("tinker", "twinkle")
# A kind and a name, as every tenant's id that this server makes.
TENANT_ID = re.compile(r"[a-z][a-z0-9_-]*:[^\s/\x00-\x1f]+")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]{0,127}")


class CheckpointKind(StrEnum):
    """What a checkpoint holds; the value is its segment in a tinker:// path."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"
    EXTERNAL = "external_weights"


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """`tinker://{model_id}/{kind}/{name}`: exactly three segments after the scheme."""

    model_id: ModelId
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.model_id}/{self.kind.value}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """The id the REST API uses: "weights/0001"."""
        return f"{self.kind.value}/{self.name}"


def new_session_id() -> SessionId:
    """A fresh unguessable session id (128 bits), free of "/" and ":"."""
    return SessionId(secrets.token_hex(16))


def new_project_id() -> str:
    """The id of a new shared project."""
    return PROJECT_PREFIX + secrets.token_hex(10)


def training_model_id(session_id: SessionId, model_seq_id: int) -> ModelId:
    """`{session}:train:{n}`; the SDK computes the same id on its side for create-via-load."""
    return ModelId(f"{session_id}:train:{model_seq_id}")


def session_of_run(model_id: ModelId) -> SessionId:
    """The session that a run's id begins with."""
    return SessionId(model_id.partition(":")[0])


def sampler_id(session_id: SessionId, sampling_session_seq_id: int) -> SamplingSessionId:
    """`{session}:sample:{n}`."""
    return SamplingSessionId(f"{session_id}:sample:{sampling_session_seq_id}")


def op_request_id(model_id: ModelId, seq_id: int) -> RequestId:
    """The request id of a sequenced op. Deterministic, so a retried POST finds the first row."""
    return RequestId(f"{model_id}:{seq_id}")


def sample_request_id(sampling_session_id: SamplingSessionId, seq_id: int) -> RequestId:
    """The request id of a sample. Deterministic, as for ops."""
    return RequestId(f"{sampling_session_id}:{seq_id}")


def sample_sequence_ids(request_id: RequestId, num_samples: int) -> tuple[str, ...]:
    """One id per sampled sequence; the SDK asserts that their number is `num_samples`."""
    return tuple(f"{request_id}:{index}" for index in range(num_samples))


def custom_loss_id(session_id: SessionId, custom_loss_seq_id: int) -> LossId:
    """`{session}:loss:{n}`."""
    return LossId(f"{session_id}:loss:{custom_loss_seq_id}")


def custom_loss_request_id(session_id: SessionId, custom_loss_seq_id: int) -> RequestId:
    """The request that registers a loss. Deterministic, as for ops."""
    return RequestId(f"{session_id}:create_loss:{custom_loss_seq_id}")


def blob_folder(owner: ModelId | SamplingSessionId) -> str:
    """The second segment of a blob's key, which says whose it is. Colons are kept out of file names."""
    return owner.replace(":", "_")


def session_of_blob(key: BlobKey) -> SessionId | None:
    """The session that a blob belongs to by its key; None for one whose key does not say it."""
    _kind, _, rest = key.partition("/")
    folder, slash, _name = rest.partition("/")
    session_id, underscore, _number = folder.partition("_")
    return SessionId(session_id) if slash and underscore and session_id else None


def checked_name(name: str, *, what: str = "checkpoint name") -> str:
    """`name` itself when it is one safe path segment.

    Raises InvalidRequest for anything else ("..", "/", control characters, over 128 characters).
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"{what} {name[:140]!r} is not allowed: use 1 to 128 of letters, digits, '.', '_', '-', "
            "starting with a letter, digit or '_', without '..'"
        )
    return name


def parse_tinker_path(path: str) -> TinkerPath:
    """The parts of a tinker:// path, or of the same path under twinkle://. Raises InvalidRequest when malformed."""
    shown = repr(path[:200])
    scheme, separator, rest = path.partition("://")
    if not separator or scheme not in PATH_SCHEMES:
        raise InvalidRequest(f"path {shown} does not start with tinker://")
    parts = rest.split("/")
    kinds = [kind.value for kind in CheckpointKind]
    if len(parts) != 3 or not all(parts):
        raise InvalidRequest(f"path {shown} is not of the form tinker://RUN_ID/KIND/NAME with KIND one of {kinds}")
    model_id, kind, name = parts
    if kind not in kinds:
        raise InvalidRequest(f"path {shown} has the unknown kind {kind!r}; known: {kinds}")
    return TinkerPath(ModelId(model_id), CheckpointKind(kind), checked_name(name))
