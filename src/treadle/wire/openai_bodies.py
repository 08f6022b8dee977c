"""Request bodies in OpenAI's form: completions and chat completions.

Honour or refuse: a field that could change what is sampled is honoured, or refused by name unless its value changes
nothing; a field that cannot change it (who the user is, what to bill) is ignored. Unknown fields are refused. null
means absent. Every refusal names the field (BadParameter). Knows no pools, no tokens and no limits of a model.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from treadle.domain.limits import MAX_ID_CHARS, MAX_NUM_SAMPLES, MAX_STOP_CHARS, MAX_STOP_SEQUENCES
from treadle.errors import BadParameter
from treadle.wire.bodies import Body, Seed, json_object

# OpenAI's own limit on alternatives per position.
MAX_TOP_LOGPROBS = 20
# More than any model has tokens, or any answer.
MAX_COUNT = 2**31 - 1
# Prompts of one completions request; each is a sample of its own.
MAX_PROMPTS = 128
# What OpenAI samples when a completions request does not say.
DEFAULT_COMPLETION_TOKENS = 16
# They say who asks, and what for, but nothing about the sample.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
    }
)
# Features that this server lacks, and the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "tools": ([],),
}

B = TypeVar("B", bound=Body)
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=2 * MAX_ID_CHARS)]


def without_neutral(
    fields: object, *, ignored: frozenset[str] = IGNORED, neutral: Mapping[str, tuple[object, ...]]
) -> object:
    """The fields that matter. Raises BadParameter for a feature that is not there and that these fields ask for."""
    if not isinstance(fields, dict):
        return fields
    kept = {}
    for name, value in fields.items():
        if value is None or name in ignored:
            continue
        if name in neutral:
            if value not in neutral[name]:
                raise BadParameter(f"{name}={reprlib.repr(value)} is not supported by this server", param=name)
            continue
        kept[name] = value
    return kept


class StreamOptions(Body):
    """include_obfuscation pads chunks against eavesdroppers; this server pads nothing."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class _Sampling(Body):
    """What both forms have in common. top_k is an extension; -1 is off."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL

    model: Name
    n: Annotated[int, Field(ge=1, le=MAX_NUM_SAMPLES)] = 1
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] = -1
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_SEQUENCES)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_matters(cls, fields: object) -> object:
        return without_neutral(fields, neutral=cls.neutral)

    @model_validator(mode="after")
    def _fits_together(self) -> _Sampling:
        if self.top_k == 0:
            raise BadParameter("top_k is 0; use -1 for no limit, or 1 and more", param="top_k")
        if self.stream_options is not None and not self.stream:
            raise BadParameter("stream_options is only allowed when stream is true", param="stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; none for an empty list, which is no stop of the caller's own."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


TokenIds = Annotated[list[int], Field(min_length=1)]


class CompletionBody(_Sampling):
    """completions. prompt: text, several texts, tokens, or several lists of tokens. max_tokens 0 only with echo."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _is_completable(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise BadParameter(f"best_of={self.best_of} is not supported by this server; use n", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise BadParameter("max_tokens is 0; it must be at least 1, or echo true", param="max_tokens")
        if self.echo and self.stream:
            raise BadParameter("echo is not supported together with stream", param="echo")
        return self

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """One entry per prompt, each of them text or tokens."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (self.prompt,)
        return tuple(cast(list[str | list[int]], self.prompt))


class TextPart(Body):
    """A part of a message's content. cache_control and the like say nothing about the text."""

    type: str
    text: str | None = None


def joined_text(content: object) -> object:
    """Content as one text. Raises BadParameter for parts that are not text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if part.type not in ("text", "output_text", "refusal") or part.text is None:
            raise BadParameter(
                f"messages: content of type {part.type[:80]!r} is not supported, only text", param="messages"
            )
    return "".join(part.text for part in content)


class ToolFunction(Body):
    model_config = ConfigDict(extra="allow")

    name: str
    arguments: Any = None


class ToolCall(Body):
    model_config = ConfigDict(extra="allow")

    type: str = "function"
    function: ToolFunction


class Message(Body):
    """One message, as a template sees it; its fields are those that templates know."""

    model_config = ConfigDict(extra="forbid")

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: Annotated[str | list[TextPart] | None, AfterValidator(joined_text)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_answered(cls, fields: object) -> object:
        """Clients send back what they were answered, empty lists included."""
        return {key: value for key, value in fields.items() if value != []} if isinstance(fields, dict) else fields

    def for_template(self) -> dict[str, Any]:
        """The message as templates expect it: the arguments of calls as objects, "developer" by its older name."""
        fields = self.model_dump(exclude_none=True)
        if self.role == "developer":
            fields["role"] = "system"
        for call in fields.get("tool_calls", ()):
            call["function"]["arguments"] = _parsed(call["function"].get("arguments"))
        return fields


class ChatBody(_Sampling):
    """chat/completions. chat_template_kwargs is an extension: variables of the model's own template.

    tools are shown to the model by its template; since calls are not parsed, only with tool_choice "none".
    """

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        name: values for name, values in NEUTRAL.items() if name != "tools"
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_answerable(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadParameter("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_tokens == 0:
            raise BadParameter("max_tokens is 0; it must be at least 1", param="max_tokens")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise BadParameter("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        if self.tools and self.tool_choice != "none":
            raise BadParameter(
                "calls of tools are not parsed by this server; with tool_choice 'none' the tools are shown to the "
                "model, and its answer comes as the text that it is",
                param="tools",
            )
        return self

    @property
    def most_tokens(self) -> int | None:
        """How many tokens may be sampled; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse_form(model: type[B], raw: bytes) -> B:
    """The body as `model`. Raises UnreadableBody for anything but a JSON object, BadParameter for everything else."""
    fields = json_object(raw)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        finding = error.errors(include_url=False, include_context=False)[0]
        param = _place(fields, finding["loc"], is_missing=finding["type"] == "missing")
        raise BadParameter(_words(finding, param), param=param) from None


def _place(fields: object, loc: Sequence[str | int], *, is_missing: bool) -> str | None:
    """Where in the body a finding is, without the names that pydantic gives to the branches of a union."""
    place: list[str] = []
    for part in loc:
        is_there = part in fields if isinstance(fields, dict) else isinstance(fields, list) and isinstance(part, int)
        if not (is_there or is_missing):
            break
        place.append(str(part)[:80])
        fields = fields[part] if is_there and isinstance(fields, dict | list) else None  # type: ignore[index]  # it is there
    return ".".join(place) or None


def _words(finding: ErrorDetails, param: str | None) -> str:
    if finding["type"] == "missing":
        return f"{param} is missing"
    # A plain repr of a client's value could be megabytes.
    shown = f"{param or 'the body'}={reprlib.repr(finding['input'])}"
    if finding["type"] == "extra_forbidden":
        return f"{shown} is not a parameter that this server knows"
    return f"{shown}: {finding['msg'].removeprefix('Value error, ')}"


def _parsed(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
