"""Sampled tokens as text, piece by piece: no character is ever cut, and no stop string is ever shown.

Works on bytes, as the sampler's own matching does (sampler/stops.py), so the two agree on where a text ends. What could
still become a stop string is held back, and so is the newest token: it may be the one that ends the sequence, which is
not part of the text. It refuses to know JSON and who reads the text.
Invariant: the pieces of a sequence, put together, do not depend on how its tokens were cut into calls.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from treadle.domain.states import StopReason


class Vocabulary(Protocol):
    """What a token is as text."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token. alternatives: (token id, logprob), best first, where they were asked for."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token of the text. text_offset: characters of the sequence before it."""

    sampled: Sampled
    text_offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What may be shown now."""

    text: str
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A token that is not shown yet. start, stop: its bytes, counted from the start of the sequence."""

    sampled: Sampled
    start: int
    stop: int
    is_special: bool


class SequenceText:
    """One sequence while it grows. stopped_by: the stop string that ended it."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._stops = [(stop, stop.encode("utf-8", errors="surrogatepass")) for stop in stops]
        self._longest_stop = max((len(raw) for _, raw in self._stops), default=1)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._newest: Sampled | None = None
        # Bytes that were matched and not yet shown, the first of which is byte number `_shown` of the sequence.
        self._window = bytearray()
        self._shown = 0
        self._pending: deque[_Pending] = deque()
        self._num_chars = 0
        self.num_tokens = 0
        self.stopped_by: str | None = None

    def push(self, tokens: Iterable[Sampled]) -> Piece:
        """Take the next tokens; what can be shown of the sequence by now."""
        self._take(tokens)
        return self._show(len(self._window) - self._num_held_back())

    def end(self, tokens: Iterable[Sampled], reason: StopReason) -> Piece:
        """Take the last tokens, if any are left; the rest of the text."""
        self._take(tokens)
        last, self._newest = self._newest, None
        if last is not None:
            self._append(last)
            is_end_token = reason is StopReason.STOP and self.stopped_by is None
            if is_end_token:
                # Whatever the tokenizer thinks of an end-of-sequence token, it ends the text and is not in it.
                self._pending.pop()
        piece = self._show(len(self._window))
        rest = self._decoder.decode(b"", final=True)
        self._num_chars += len(rest)
        return Piece(piece.text + rest, piece.tokens)

    def _take(self, tokens: Iterable[Sampled]) -> None:
        for token in tokens:
            if self._newest is not None:
                self._append(self._newest)
            self._newest = token
            self.num_tokens += 1

    def _append(self, token: Sampled) -> None:
        """A token joins the window, unless a stop string is complete; then the window ends where that begins."""
        if self.stopped_by is not None:
            return
        num_before = len(self._window)
        self._window += self._vocabulary.token_bytes(token.token_id)
        is_special = self._vocabulary.is_special(token.token_id)
        start, stop = self._shown + num_before, self._shown + len(self._window)
        self._pending.append(_Pending(token, start, stop, is_special))
        # Whatever ended before this token was looked for then.
        since = max(0, num_before - self._longest_stop + 1)
        found = [(place, text) for text, raw in self._stops if (place := self._window.find(raw, since)) >= 0]
        if found:
            place, self.stopped_by = min(found)
            del self._window[place:]
            while self._pending and self._pending[-1].start >= self._shown + place:
                self._pending.pop()

    def _num_held_back(self) -> int:
        """The longest end of the window that a stop string may begin with."""
        if self.stopped_by is not None:
            return 0
        for size in range(min(self._longest_stop - 1, len(self._window)), 0, -1):
            if any(raw.startswith(self._window[-size:]) for _, raw in self._stops):
                return size
        return 0

    def _show(self, num_bytes: int) -> Piece:
        """Show the window's first bytes, and the tokens that begin in them. Special tokens are shown as tokens only."""
        end = self._shown + num_bytes
        texts, tokens = [], []
        while self._pending and (self._pending[0].stop <= end or self._pending[0].start < end):
            token = self._pending[0]
            if token.stop > end and self.stopped_by is None:
                # Its other bytes may yet turn out to be a stop string's: a token is shown with its text, or not.
                end = token.start
                break
            self._pending.popleft()
            tokens.append(ShownToken(token.sampled, self._num_chars))
            if not token.is_special:
                raw = self._window[token.start - self._shown : min(token.stop, end) - self._shown]
                text = self._decoder.decode(raw)
                self._num_chars += len(text)
                texts.append(text)
        del self._window[: end - self._shown]
        self._shown = end
        return Piece("".join(texts), tuple(tokens))
