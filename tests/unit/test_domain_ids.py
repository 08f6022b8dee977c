"""Names and paths: what is accepted comes back unchanged, everything else is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.ids import (
    CheckpointKind,
    ModelId,
    SessionId,
    TinkerPath,
    checked_name,
    new_session_id,
    op_request_id,
    parse_tinker_path,
    sample_sequence_ids,
    sampler_id,
    training_model_id,
)
from treadle.errors import InvalidRequest

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._\-]{0,127}", fullmatch=True).filter(lambda name: ".." not in name)
MODEL_IDS = st.builds(
    lambda head, n: ModelId(f"{head}:train:{n}"), st.from_regex(r"[0-9a-f]{32}", fullmatch=True), st.integers(0)
)


@given(MODEL_IDS, st.sampled_from(CheckpointKind), NAMES)
def test_a_path_survives_being_written_and_read(model_id: ModelId, kind: CheckpointKind, name: str) -> None:
    path = TinkerPath(model_id, kind, name)
    assert parse_tinker_path(str(path)) == path
    assert path.checkpoint_id == f"{kind.value}/{name}"


@given(st.text(max_size=300))
def test_any_text_is_a_path_or_refused(text: str) -> None:
    for candidate in (text, f"tinker://{text}", f"tinker://run/weights/{text}"):
        try:
            path = parse_tinker_path(candidate)
        except InvalidRequest:
            continue
        assert str(path) == candidate
        assert ".." not in path.name
        assert "/" not in path.name


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://run/weights/a", "does not start with tinker://"),
        ("tinker://run/weights", "not of the form"),
        ("tinker://run/weights/", "not of the form"),
        ("tinker:///weights/a", "not of the form"),
        ("tinker://run/weights/a/b", "not of the form"),
        ("tinker://run/heights/a", "unknown kind 'heights'"),
        ("tinker://run/weights/..", "checkpoint name"),
    ],
)
def test_a_malformed_path_is_refused_with_the_reason(path: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_tinker_path(path)


@pytest.mark.parametrize("name", ["", ".hidden", "-flag", "a/b", "a..b", "a b", "a\n", "a\0", "\u00e9", "x" * 129])
def test_an_unsafe_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not allowed"):
        checked_name(name)


def test_a_huge_name_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked_name("/" * 10_000)
    assert len(caught.value.message) < 500


def test_ids_are_formed_as_the_sdk_forms_them() -> None:
    session = SessionId("s")
    assert training_model_id(session, 2) == "s:train:2"
    assert sampler_id(session, 3) == "s:sample:3"
    request_id = op_request_id(training_model_id(session, 2), 7)
    assert request_id == "s:train:2:7"
    assert sample_sequence_ids(request_id, 2) == ("s:train:2:7:0", "s:train:2:7:1")


def test_session_ids_are_unguessable_and_plain() -> None:
    ids = {new_session_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(session_id) == 32 and session_id.isalnum() for session_id in ids)


def test_paths_of_twinkle_are_ours_under_another_scheme() -> None:
    parsed = parse_tinker_path("twinkle://s1:train:0/weights/a")
    assert parsed == parse_tinker_path("tinker://s1:train:0/weights/a")
    assert str(parsed).startswith("tinker://")
    for path in (
        "twinkle:/s1/weights/a",
        "TINKER://s1/weights/a",
        "file://s1/weights/a",
        "://s1/weights/a",
        "tinker://",
    ):
        with pytest.raises(InvalidRequest):
            parse_tinker_path(path)
