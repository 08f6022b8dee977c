"""Request bodies in Anthropic's form: messages, and their tokens counted. Text only.

Honour or refuse, as in openai_bodies.py: what could change the sample is honoured or refused by name, what cannot is
ignored. Knows no pools, no tokens and no limits of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from treadle.domain.limits import MAX_STOP_CHARS, MAX_STOP_SEQUENCES
from treadle.errors import BadParameter
from treadle.wire.bodies import Body
from treadle.wire.openai_bodies import MAX_COUNT, Name, TextPart, joined_text, without_neutral

# They say who asks, and what to keep or to bill, but nothing about the sample.
_IGNORED = frozenset(
    {"metadata", "service_tier", "speed", "cache_control", "inference_geo", "betas", "user_profile_id", "workspace_id"}
)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"},),
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "output_config": ({},),
    "output_format": (),
}

Content = Annotated[str | list[TextPart], AfterValidator(joined_text)]


class Turn(Body):
    """One message."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant"]
    content: Content


class _Conversation(Body):
    """What is said so far, and to whom."""

    model_config = ConfigDict(extra="forbid")

    model: Name
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Content | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_matters(cls, fields: object) -> object:
        return without_neutral(fields, ignored=_IGNORED, neutral=_NEUTRAL)

    @model_validator(mode="after")
    def _asks_for_an_answer(self) -> _Conversation:
        if self.messages[-1].role == "assistant":
            raise BadParameter(
                "the last message is the assistant's; continuing it is not supported by this server", param="messages"
            )
        return self

    def for_template(self) -> list[dict[str, Any]]:
        """The messages as templates expect them, the system's first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *({"role": turn.role, "content": turn.content} for turn in self.messages)]


class CountTokensBody(_Conversation):
    """messages/count_tokens"""


class MessagesBody(_Conversation):
    """messages"""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    stop_sequences: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]],
        Field(max_length=MAX_STOP_SEQUENCES),
    ] = Field(default_factory=list)
    stream: bool = False
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
