"""Tokenizers of the served base models, in the gateway: text to tokens, tokens to bytes.

Read once per pool with the `tokenizers` library, in a thread, when text is first sent; a server that only ever sees
tokens reads none. Special and added tokens are those of transformers: tokenizer.json, and what tokenizer_config.json
adds. It refuses to know requests. Invariant: a text has the tokens that the SDK's tokenizer gives it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Tokenizer

from treadle.domain.outcome import PoolFacts
from treadle.errors import ConfigError, InvalidRequest, NotSupported, Overloaded, TreadleError
from treadle.gateway.chat.templates import ChatTemplate, read_sources
from treadle.sampler.tokenizer import TokenBytes

# Text that is longer than this for each token of the context cannot be a prompt in any language, and is refused before
# it is tokenized, which takes a second for some megabytes.
MAX_CHARS_PER_TOKEN = 32
# Tokenizing takes this many times as long as reading a pass of as many bytes.
TEXT_COST = 32
# The named special tokens that templates may use (transformers, SPECIAL_TOKENS_ATTRIBUTES).
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTokenizer:
    """One base model's tokenizer and chat template. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, max_context_length: int) -> None:
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)
        self._special = frozenset(
            index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._max_chars = MAX_CHARS_PER_TOKEN * max_context_length
        self._max_context_length = max_context_length
        self.template = template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of `text`. Special tokens that stand in it are found; `add_special_tokens` puts a BOS before it
        where the model has one. Raises InvalidRequest for a text that is far over the context."""
        if len(text) > self._max_chars:
            raise InvalidRequest(
                f"Prompt length exceeds the model's context window: {len(text)} characters are more than "
                f"{MAX_CHARS_PER_TOKEN} for each of its {self._max_context_length} tokens"
            )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of the prompt for the next message of the assistant. Raises as `encode` and the template do."""
        return self.encode(self.template.render(messages, tools=tools, variables=variables), add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; a special one counts with its name."""
        return self._bytes.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is not part of the text that people see."""
        return token_id in self._special


class Tokenizers:
    """The tokenizers of one gateway, each read when it is first asked for."""

    def __init__(self) -> None:
        # By base model, with the revision and the place that it was read from.
        self._loading: dict[str, tuple[tuple[str, str], asyncio.Task[ChatTokenizer]]] = {}

    async def of(self, facts: PoolFacts) -> ChatTokenizer:
        """The tokenizer of a loaded base model. Raises NotSupported for a model without one, Overloaded (503) where its
        files lie on another machine."""
        if facts.tokenizer_dir is None:
            raise NotSupported(f"base model {facts.base_model} has no tokenizer; sample it by tokens, through the SDK")
        source = (facts.revision, facts.tokenizer_dir)
        known = self._loading.get(facts.base_model)
        if known is None or known[0] != source or _has_failed(known[1]):
            reading = asyncio.to_thread(read_tokenizer, Path(facts.tokenizer_dir), facts.max_context_length)
            known = source, asyncio.create_task(reading, name="gateway-read-tokenizer")
            self._loading[facts.base_model] = known
        # Shielded: the request that happened to be first may go away, and others wait for the same tokenizer.
        return await asyncio.shield(known[1])


def read_tokenizer(directory: Path, max_context_length: int) -> ChatTokenizer:
    """The tokenizer in a model's directory. Raises Overloaded when it is not on this machine, ConfigError when it
    cannot be read, NotSupported when it has no tokenizer.json."""
    if not directory.is_dir():
        raise Overloaded(
            "the tokenizer of this base model lies on the server that leads it, and this one cannot read it; ask that "
            "one, or put the model's files in the same place on both"
        )
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise NotSupported("this base model has no tokenizer.json; sample it by tokens, through the SDK")
    config = _read_json(directory / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_tokens(tokenizer, config)
        named = _named_tokens(directory, config)
        return ChatTokenizer(
            tokenizer, ChatTemplate(read_sources(directory, config), named), max_context_length=max_context_length
        )
    except TreadleError:
        raise
    except (TemplateError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the tokenizer of this base model cannot be read: {error}") from error
    except Exception as error:  # The library raises bare Exception for an unreadable file.
        raise ConfigError(f"the model's tokenizer.json cannot be read: {error}") from error


def _has_failed(task: asyncio.Task[ChatTokenizer]) -> bool:
    """Whether to read it again: its files may be there by now."""
    return task.done() and (task.cancelled() or task.exception() is not None)


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json has, by their ids; the library gives out ids in order."""
    known = tokenizer.get_added_tokens_decoder()
    for index, fields in sorted(
        (int(index), fields) for index, fields in config.get("added_tokens_decoder", {}).items()
    ):
        if index in known:
            continue
        flags = {name: fields[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in fields}
        token = AddedToken(fields["content"], special=bool(fields.get("special")), **flags)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _named_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    older = _read_json(directory / "special_tokens_map.json")
    found = {name: config.get(name) or older.get(name) for name in _NAMED}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model's {path.name} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
