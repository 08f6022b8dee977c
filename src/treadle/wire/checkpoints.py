"""Bodies about checkpoints that are there or are saved for use elsewhere; the other saves are in bodies.py.

It follows the rules of bodies.py. Invariant: a time to live is within the API's bounds, or deliberately none.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from treadle.domain.ids import checked_name
from treadle.domain.limits import MAX_AGE_RECIPIENTS, MAX_TEXT_CHARS
from treadle.domain.ops import SaveExternalOp
from treadle.errors import InvalidRequest
from treadle.wire.bodies import Body, Counter, Id, ModelIdField, OpSeqId, SessionIdField, Ttl

# Keys of our own have 47 characters, tokens some 400; what is longer is no credential of this server.
Credential = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]
Recipient = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]


class SaveExternalBody(Body):
    """save_weights_external; `path` is the checkpoint's name. Recipients: age1... keys or SSH public keys."""

    head_fields = frozenset({"model_id", "seq_id"})

    model_id: ModelIdField
    seq_id: OpSeqId
    path: Id
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: list[Recipient] | None = Field(default=None, min_length=1, max_length=MAX_AGE_RECIPIENTS)


class TtlBody(Body):
    """PUT ttl: null takes the end of a checkpoint's life away, which leaving the field out does not."""

    ttl_seconds: Ttl | None = None

    @model_validator(mode="before")
    @classmethod
    def _says_which(cls, fields: object) -> object:
        if isinstance(fields, dict) and "ttl_seconds" not in fields:
            raise InvalidRequest("ttl_seconds is missing; send null for a checkpoint that stays")
        return fields


class CopyWeightsBody(Body):
    """copy_weights: into a project, or, as SDKs before 0.35 ask, as the run `model_seq_id` of a session."""

    source_path: Id
    destination_project_id: Id | None = None
    session_id: SessionIdField | None = None
    model_seq_id: Counter | None = None
    ttl_seconds: Ttl | None = None
    weights_access_token: Credential | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        into_session = (self.session_id is not None, self.model_seq_id is not None)
        into_project = self.destination_project_id is not None
        if into_session != ((not into_project,) * 2):
            raise InvalidRequest(
                "copy_weights needs either destination_project_id, or both session_id and model_seq_id"
            )
        return self


def save_external_op(body: SaveExternalBody) -> SaveExternalOp:
    """The weights of a run for use elsewhere. Raises InvalidRequest for a name that is none."""
    return SaveExternalOp(
        model_id=body.model_id,
        seq_id=body.seq_id,
        name=checked_name(body.path),
        ttl_s=body.ttl_seconds,
        recipients=tuple(body.age_encryption_recipients or ()),
    )
