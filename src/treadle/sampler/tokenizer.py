"""The bytes behind token ids, for matching stop strings.

The sampler needs only this much of a tokenizer; gateway/chat builds on it. It encodes nothing and knows no chat
template. Invariant: the bytes of a sequence are the concatenated bytes of its tokens, so a text can be watched
token by token without decoding it again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from treadle.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


class TokenBytes:
    """Token ids to bytes, each looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoders = _decoder_types(tokenizer)
        self._added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
        self._known: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to a text; b"" for an id the tokenizer does not know.

        Special tokens count with their text, so that "<|im_end|>" can be a stop string.
        """
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def token_id(self, text: str) -> int | None:
        """The id of a token given by its exact text, or None."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if "ByteLevel" in self._decoders:
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        if "ByteFallback" in self._decoders or "Metaspace" in self._decoders:
            match = _BYTE_TOKEN.fullmatch(piece)
            return bytes([int(match[1], 16)]) if match else piece.replace(_METASPACE, " ").encode()
        return self._look_up_behind_itself(token_id)

    def _look_up_behind_itself(self, token_id: int) -> bytes:
        """For decoders that join words (WordPiece): what a second copy of the token adds to the first."""
        once = self._tokenizer.decode([token_id], skip_special_tokens=False)
        twice = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(once) :].encode()


def load_token_bytes(directory: Path | str | None) -> TokenBytes | None:
    """The tokenizer of a model directory, or None when it has none that can be read token by token.

    Raises ConfigError when there is a tokenizer.json that cannot be read.
    """
    if directory is None:
        return None
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception for an unreadable file.
        raise ConfigError(f"the model's tokenizer.json cannot be read: {error}") from error
    return TokenBytes(tokenizer)


def _decoder_types(tokenizer: Tokenizer) -> frozenset[str]:
    if tokenizer.decoder is None:
        return frozenset()
    decoder: dict[str, Any] = json.loads(tokenizer.to_str())["decoder"]
    parts: list[dict[str, Any]] = [decoder, *decoder.get("decoders", [])]
    return frozenset(part["type"] for part in parts)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies (source: GPT-2's encoder)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    assert len(alphabet) == 256
    return alphabet


_BYTE_OF_CHAR = _byte_level_alphabet()
