"""When a sequence ends: end-of-sequence ids, stop ids, stop strings, length.

Stop strings are matched on the bytes of the generated text, so they are found across token boundaries and inside
multi-byte characters; the prompt is not searched. It knows no model and draws nothing.
Invariant: the token that stops a sequence is its last one, once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.domain.ops import SamplingParams
from treadle.domain.states import StopReason
from treadle.errors import ConfigError, InvalidRequest
from treadle.sampler.tokenizer import TokenBytes


@dataclass(frozen=True, slots=True)
class StopRule:
    """What ends the sequences of one request. max_tokens counts sampled tokens, the stop token included."""

    token_ids: frozenset[int]
    strings: tuple[bytes, ...]
    max_tokens: int
    token_bytes: TokenBytes | None = None

    def start(self) -> StopWatch:
        """A watch for one sequence, which has sampled nothing yet."""
        return StopWatch(self)


class StopWatch:
    """Follows one sequence. The cost of a token is bounded by the longest stop string, not by the text so far."""

    __slots__ = ("_num_tokens", "_rule", "_tail", "_tail_bytes")

    def __init__(self, rule: StopRule) -> None:
        self._rule = rule
        self._num_tokens = 0
        self._tail = b""
        # A match that ends in new bytes starts at most this many bytes before them.
        self._tail_bytes = max((len(text) for text in rule.strings), default=1) - 1

    def push(self, token_id: int) -> StopReason | None:
        """Why the sequence ends with this token, or None when it goes on. STOP wins over LENGTH."""
        self._num_tokens += 1
        if token_id in self._rule.token_ids or (self._rule.strings and self._completes_string(token_id)):
            return StopReason.STOP
        return StopReason.LENGTH if self._num_tokens >= self._rule.max_tokens else None

    def _completes_string(self, token_id: int) -> bool:
        assert self._rule.token_bytes is not None, "string stops without a tokenizer are refused before"
        window = self._tail + self._rule.token_bytes.token_bytes(token_id)
        self._tail = window[len(window) - self._tail_bytes :] if len(window) > self._tail_bytes else window
        return any(text in window for text in self._rule.strings)


def stop_rule(
    params: SamplingParams, *, eos_ids: frozenset[int], token_bytes: TokenBytes | None, num_free_places: int
) -> StopRule:
    """The rule of one request. `num_free_places` is how many tokens the context still takes, at least 1.

    Raises InvalidRequest for string stops on a model without a tokenizer, and for an empty stop string.
    """
    assert num_free_places >= 1
    if params.stop_strings and token_bytes is None:
        raise InvalidRequest(
            f"stop string {params.stop_strings[0]!r} cannot be matched: this model has no tokenizer; send token ids"
        )
    if "" in params.stop_strings:
        raise InvalidRequest("a stop string is empty; send [] to switch stops off")
    wanted = num_free_places if params.max_tokens is None else params.max_tokens
    return StopRule(
        token_ids=frozenset(params.stop_token_ids) | (eos_ids if params.use_eos else frozenset()),
        strings=tuple(text.encode("utf-8", errors="surrogatepass") for text in params.stop_strings),
        max_tokens=min(wanted, num_free_places),
        token_bytes=token_bytes,
    )


def tokenizer_eos_id(directory: Path | str | None, token_bytes: TokenBytes | None) -> int | None:
    """The end-of-sequence id that the tokenizer itself names, for models whose configuration names none."""
    if directory is None or token_bytes is None:
        return None
    eos_token = _read_json(Path(directory) / "tokenizer_config.json").get("eos_token")
    text = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    return token_bytes.token_id(text) if isinstance(text, str) else None


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model's {path.name} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
