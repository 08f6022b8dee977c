"""Stop ids, stop strings over token borders, EOS and the tokenizer's bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampler_support import BUNDLED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from treadle.domain.ops import SamplingParams
from treadle.domain.states import StopReason
from treadle.errors import ConfigError, InvalidRequest
from treadle.sampler.stops import StopRule, StopWatch, stop_rule, tokenizer_eos_id
from treadle.sampler.tokenizer import TokenBytes, load_token_bytes

EOS = frozenset({2, 0})


@pytest.fixture(scope="module")
def token_bytes() -> TokenBytes:
    loaded = load_token_bytes(BUNDLED)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def byte_tokens(token_bytes: TokenBytes) -> dict[bytes, int]:
    """The token of each single byte."""
    return {token_bytes.token_bytes(index): index for index in range(5, 261)}


def rule_of(token_bytes: TokenBytes | None, *, num_free_places: int = 100, **params: Any) -> StopRule:
    return stop_rule(
        SamplingParams(seed=1, **params), eos_ids=EOS, token_bytes=token_bytes, num_free_places=num_free_places
    )


def first_stop(watch: StopWatch, tokens: list[int]) -> tuple[int, StopReason] | None:
    for index, token in enumerate(tokens):
        reason = watch.push(token)
        if reason is not None:
            return index, reason
    return None


def test_eos_stops_and_an_empty_stop_list_ignores_it() -> None:
    assert first_stop(rule_of(None).start(), [9, 2]) == (1, StopReason.STOP)
    assert first_stop(rule_of(None, use_eos=False).start(), [9, 2, 0]) is None


def test_explicit_stops_leave_eos_in_force() -> None:
    rule = rule_of(None, stop_token_ids=(50,))
    assert first_stop(rule.start(), [9, 50]) == (1, StopReason.STOP)
    assert first_stop(rule.start(), [9, 2]) == (1, StopReason.STOP)


@pytest.mark.parametrize(("max_tokens", "num_free_places", "expected"), [(3, 100, 3), (None, 4, 4), (50, 2, 2)])
def test_length_ends_at_max_tokens_or_at_the_context(
    max_tokens: int | None, num_free_places: int, expected: int
) -> None:
    rule = rule_of(None, max_tokens=max_tokens, num_free_places=num_free_places)
    assert first_stop(rule.start(), [9] * 10) == (expected - 1, StopReason.LENGTH)


def test_a_stop_at_the_last_place_is_a_stop() -> None:
    assert first_stop(rule_of(None, max_tokens=2).start(), [9, 2]) == (1, StopReason.STOP)


@pytest.mark.parametrize("text", ["end", "\u00e9", "\U0001f600!", "a\n\nb"])
def test_a_stop_string_is_found_across_tokens_and_inside_characters(
    text: str, token_bytes: TokenBytes, byte_tokens: dict[bytes, int]
) -> None:
    tokens = [byte_tokens[bytes([byte])] for byte in ("en " + text + " more").encode()]
    last_byte = len(("en " + text).encode()) - 1
    assert first_stop(rule_of(token_bytes, stop_strings=(text,)).start(), tokens) == (last_byte, StopReason.STOP)


def test_the_completing_token_may_hold_more_than_the_stop_string(token_bytes: TokenBytes) -> None:
    longest = max(range(261, 1280), key=lambda index: len(token_bytes.token_bytes(index)))
    inner = token_bytes.token_bytes(longest).decode()[1:3]
    assert first_stop(rule_of(token_bytes, stop_strings=(inner,)).start(), [longest]) == (0, StopReason.STOP)


def test_special_tokens_count_with_their_text(token_bytes: TokenBytes) -> None:
    rule = rule_of(token_bytes, stop_strings=("<|im_start|>",))
    assert first_stop(rule.start(), [300, 1]) == (1, StopReason.STOP)


@given(
    text=st.text(alphabet="ab", max_size=40),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_the_first_stop_is_where_a_plain_search_finds_it(text: str, stops: list[str]) -> None:
    class Letters:
        def token_bytes(self, token_id: int) -> bytes:
            return bytes([token_id])

    rule = StopRule(frozenset(), tuple(stop.encode() for stop in stops), 1_000, Letters())  # type: ignore[arg-type]
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = (ends[0] - 1, StopReason.STOP) if ends else None
    assert first_stop(rule.start(), list(text.encode())) == expected


def test_a_string_stop_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"'end'.*no tokenizer"):
        rule_of(None, stop_strings=("end",))


def test_an_empty_stop_string_is_refused(token_bytes: TokenBytes) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        rule_of(token_bytes, stop_strings=("",))


def test_bytes_of_tokens_join_to_the_text(token_bytes: TokenBytes) -> None:
    text = "7 + 15 = 22, na\u00efve \u65e5\u672c \U0001f600\n"
    ids = Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert b"".join(token_bytes.token_bytes(index) for index in ids) == text.encode()


def test_an_id_outside_the_tokenizer_has_no_bytes(token_bytes: TokenBytes) -> None:
    assert token_bytes.token_bytes(10**6) == b""


def test_sentencepiece_style_vocabularies_have_bytes_too() -> None:
    vocab = {"<unk>": 0, "\u2581the": 1, "re": 2, "<0xC3>": 3, "<0xA9>": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = TokenBytes(tokenizer)
    assert b"".join(wrapped.token_bytes(index) for index in (1, 2, 3, 4)).decode() == " there\u00e9"


def test_word_piece_vocabularies_have_bytes_too() -> None:
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    wrapped = TokenBytes(tokenizer)
    assert (wrapped.token_bytes(1), wrapped.token_bytes(2)) == (b" play", b"ing")


def test_the_tokenizer_names_its_own_eos(tmp_path: Path, token_bytes: TokenBytes) -> None:
    assert tokenizer_eos_id(BUNDLED, token_bytes) == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<think>"}}))
    assert tokenizer_eos_id(tmp_path, token_bytes) == 3
    assert tokenizer_eos_id(None, None) is None
    assert tokenizer_eos_id(tmp_path / "nowhere", token_bytes) is None


def test_a_missing_tokenizer_is_none_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    assert load_token_bytes(None) is None
    assert load_token_bytes(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_token_bytes(tmp_path)
