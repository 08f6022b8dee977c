"""Sampled tokens as text: against a plain reference, whatever the tokens and however they are cut into calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import treadle
from treadle.domain.states import StopReason
from treadle.gateway.chat.text import Piece, Sampled, SequenceText
from treadle.gateway.chat.tokenizers import read_tokenizer

BUNDLED = Path(treadle.__file__).parent / "bundled" / "tiny"
# Tokens cut characters in every way; 90 is special and 91 unknown to the tokenizer.
WORDS = {
    **{index: bytes([byte]) for index, byte in enumerate("aé€😀".encode())},
    20: b"ab",
    21: b"ba",
    22: "é".encode(),
    23: b"b\xe2\x82",
    24: "€a".encode(),
    25: b"\xff",
    90: b"<end>",
    91: b"",
}


class Words:
    def token_bytes(self, token_id: int) -> bytes:
        return WORDS[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id == 90


def shown(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def sampled(ids: Sequence[int]) -> list[Sampled]:
    return [Sampled(id_, -float(place)) for place, id_ in enumerate(ids)]


def run(ids: Sequence[int], stops: Sequence[str], reason: StopReason, cuts: Sequence[int] = ()) -> list[Piece]:
    """A sequence whose tokens come in the calls that `cuts` makes of them."""
    text, tokens, start, pieces = SequenceText(Words(), stops), sampled(ids), 0, []
    for cut in sorted(cuts):
        pieces.append(text.push(tokens[start : max(start, cut)]))
        start = max(start, cut)
    return [*pieces, text.end(tokens[start:], reason)]


def reference(ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int, bool]:
    """The text, how many bytes of all tokens it is made of, and whether a stop string ended it."""
    whole = b"".join(WORDS[id_] for id_ in ids)
    ends = [(place, stop) for stop in stops if (place := whole.find(stop.encode())) >= 0]
    # The sampler ends at the first stop that is complete; of several in one token the one that begins first.
    cut, is_stopped = len(whole), False
    length = 0
    for id_ in ids:
        length += len(WORDS[id_])
        found = [place for place, stop in ends if place + len(stop.encode()) <= length]
        if found:
            cut, is_stopped = min(found), True
            break
    seen = b""
    place = 0
    for id_ in ids:
        if id_ != 90:
            seen += WORDS[id_][: max(0, cut - place)]
        place += len(WORDS[id_])
    return seen.decode("utf-8", "replace"), cut, is_stopped


@given(
    ids=st.lists(st.sampled_from(sorted(WORDS)), max_size=12),
    stops=st.lists(st.sampled_from(["ab", "ba", "é", "a€", "<end>", "aba", "€"]), max_size=3, unique=True),
    cuts=st.lists(st.integers(0, 12), max_size=5),
)
def test_text_is_what_stands_before_the_stop_however_it_is_cut(
    ids: list[int], stops: list[str], cuts: list[int]
) -> None:
    text, cut, _is_stopped = reference(ids, stops)
    pieces = run(ids, stops, StopReason.LENGTH, [min(place, len(ids)) for place in cuts])
    assert shown(pieces) == text
    starts = [sum(len(WORDS[id_]) for id_ in ids[:place]) for place in range(len(ids))]
    tokens = [token.sampled for piece in pieces for token in piece.tokens]
    # Tokens that begin before the cut, and those without bytes there when nothing was cut.
    num_shown = sum(start < cut or not _is_stopped for start in starts)
    assert tokens == sampled(ids)[:num_shown]
    # No later piece takes back or repeats what an earlier one has shown.
    assert all(text.startswith(shown(pieces[:count])) for count in range(len(pieces)))


def test_nothing_that_may_become_a_stop_is_shown_early() -> None:
    text = SequenceText(Words(), ["aba"])
    # "ab" could go on to be the stop, and the token behind it is the newest.
    assert text.push(sampled([20, 0])).text == ""
    assert text.end([], StopReason.STOP).text == ""
    assert text.stopped_by == "aba"


def test_what_did_not_become_a_stop_is_shown() -> None:
    text = SequenceText(Words(), ["aba"])
    text.push(sampled([20]))
    assert text.push(sampled([22])).text == ""
    assert text.push(sampled([22])).text == "abé"
    assert text.end([], StopReason.LENGTH).text == "é"


def test_the_token_that_ends_a_sequence_is_no_text_even_when_it_is_not_special() -> None:
    (piece,) = run([20, 21], [], StopReason.STOP)
    assert piece.text == "ab"
    assert [token.sampled.token_id for token in piece.tokens] == [20]


def test_a_character_is_shown_whole() -> None:
    text = SequenceText(Words(), [])
    euro = [id_ for id_, raw in WORDS.items() if raw in (b"\xe2", b"\x82", b"\xac") and id_ < 20]
    parts = [text.push(sampled([id_])).text for id_ in (*euro[:3], 20)]
    assert parts == ["", "", "", "€"]


def test_a_text_that_is_cut_inside_a_character_ends_as_the_tokenizer_decodes_it() -> None:
    (piece,) = run([20, 23], [], StopReason.LENGTH)
    assert piece.text == b"abb\xe2\x82".decode("utf-8", "replace")


def test_offsets_count_characters() -> None:
    (piece,) = run([22, 22, 20], [], StopReason.LENGTH)
    assert [token.text_offset for token in piece.tokens] == [0, 1, 2]


@pytest.mark.parametrize("text", ["Plain words, 12 times.\n", "naïve 😀 €uro", "<|im_start|>user\nhi<|im_end|>\n"])
def test_real_tokens_decode_as_the_tokenizer_does(text: str) -> None:
    tokenizer = read_tokenizer(BUNDLED, 2048)
    ids = tokenizer.encode(text, add_special_tokens=False)
    piece = SequenceText(tokenizer, []).end(sampled(ids), StopReason.LENGTH)
    assert piece.text == tokenizer._tokenizer.decode(ids, skip_special_tokens=True)
