"""Operators' quotas as a body. See bodies.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from treadle.domain.policy import Quota
from treadle.domain.quotas import MAX_QUOTA
from treadle.errors import InvalidRequest
from treadle.wire.bodies import Body

_Value = Annotated[int, Field(ge=0, le=MAX_QUOTA)]


class QuotasBody(Body):
    """What changes of one scope's quotas: null unsets one, what is absent stays."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    max_lora_rank: _Value | None = None
    """Largest LoRA rank of a new run."""
    max_context_length: _Value | None = None
    """Longest sequence in tokens: of a datum, or of a prompt with what is drawn behind it."""
    max_models: _Value | None = None
    """Runs that are alive."""
    max_queued_tokens: _Value | None = None
    """Tokens that wait, samples and training apart."""
    max_queued_bytes: _Value | None = None
    """Bytes of requests that wait, samples and training apart."""
    trained_tokens_per_minute: _Value | None = None
    """Tokens of passes per minute."""
    trained_tokens_per_day: _Value | None = None
    """Tokens of passes per day of UTC."""
    sampled_tokens_per_minute: _Value | None = None
    """Tokens drawn per minute."""
    sampled_tokens_per_day: _Value | None = None
    """Tokens drawn per day of UTC."""
    max_checkpoints: _Value | None = None
    """Named checkpoints that are kept."""
    max_checkpoint_bytes: _Value | None = None
    """Their bytes."""
    max_concurrent_samples: _Value | None = None
    """Sample requests that wait or run."""

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, fields: object) -> object:
        # Not here: null is a decision. A name that is not known is told with those that are.
        if isinstance(fields, dict):
            for name in fields:
                if name not in cls.model_fields:
                    raise InvalidRequest(f"{str(name)[:80]!r} is not a quota; known: {', '.join(cls.model_fields)}")
        return fields

    @property
    def changes(self) -> dict[str, int | None]:
        """What was sent, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}


assert set(QuotasBody.model_fields) == {quota.value for quota in Quota}
