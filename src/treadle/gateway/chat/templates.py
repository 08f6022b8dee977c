"""Chat templates: messages become the text that the model was trained on.

Templates come with a model's files and are run in jinja's immutable sandbox, with the names that they expect from
transformers (utils/chat_template_utils.py, 5.23): raise_exception, strftime_now, tojson, generation blocks, loop
controls. It refuses to know tokens. Invariant: the text is that of transformers' apply_chat_template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from treadle.errors import InvalidRequest, NotSupported

# What a template is given by name, and a caller's own variables must not replace.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
# The names under which clients send what a model thought before it answered; templates read the first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# A refusal quotes what a template said, not pages of it.
_MAX_SHOWN_CHARS = 500


class ChatTemplate:
    """The templates of one model: the default one, and others by name ("tool_use" when there are tools)."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Raises TemplateError for a template that cannot be compiled."""
        environment = _environment()
        self._sources = dict(sources)
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for the next message of the assistant.

        variables: the caller's own, such as enable_thinking. Raises InvalidRequest when the template refuses the
        messages, NotSupported for tools that it would not show to the model.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise NotSupported("this base model has no chat template; send the prompt itself to completions")
        if tools and "tools" not in self._sources[name]:
            raise NotSupported("tools are not supported by this base model: its chat template does not show them")
        values = {**self._special_tokens, **(variables or {})}
        try:
            return self._templates[name].render(
                values,
                messages=[_normal(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=True,
            )
        except (
            TemplateError,
            AttributeError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            shown = str(error)[:_MAX_SHOWN_CHARS]
            raise InvalidRequest(f"the chat template of this base model refuses the messages: {shown}") from error


def read_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates in a model's directory by name. Files win over what its tokenizer_config.json has."""
    configured = config.get("chat_template")
    if isinstance(configured, str):
        configured = [{"name": "default", "template": configured}]
    sources = {entry["name"]: entry["template"] for entry in configured or ()}
    found = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        found["default"] = directory / "chat_template.jinja"
    files = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    older = directory / "chat_template.json"
    if not files and not sources and older.is_file():
        return {"default": str(json.loads(older.read_text(encoding="utf-8"))["chat_template"])}
    return files or sources


def _normal(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without fields that are null, which templates would show as None, and with its reasoning's names."""
    fields = {key: value for key, value in message.items() if value is not None}
    reasoning = next((fields[key] for key in _REASONING if key in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for those who train on it; the text stays."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return str(caller())


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now_as
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _now_as(pattern: str) -> str:
    # The local time, as models were trained with.
    return datetime.now().strftime(pattern)
