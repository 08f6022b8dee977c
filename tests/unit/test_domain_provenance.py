"""What a datum's spans claim, held against what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.provenance import Provenance, Span, sampling_inputs
from treadle.domain.stability import RecordedSequence, recorded
from treadle.errors import InvalidRequest

PROMPT = 4
TOKENS = {"a": [11, 12, 13, 14, 15], "b": [21, 22, 23]}


def records() -> dict[str, RecordedSequence]:
    made = recorded(
        [(np.array(ids, np.int32), -np.array(ids, np.float32) / 10) for ids in TOKENS.values()],
        num_prompt_tokens=PROMPT,
    )
    return dict(zip(TOKENS, made, strict=True))


def prompt(name: str, offset: int, length: int) -> Span:
    return Span(name, offset, length, False)


def sampled(name: str, offset: int, length: int) -> Span:
    return Span(name, offset, length, True)


def ids_of(spans: Sequence[Span]) -> list[int]:
    """The tokens that the spans claim; 0 for those of prompts."""
    ids: list[int] = []
    for span in spans:
        ids += (
            TOKENS[span.sequence_id][span.offset : span.offset + span.length] if span.is_sampled else [0] * span.length
        )
    return ids


def resolve(
    model_input: Sequence[Span],
    targets: Sequence[Span],
    *,
    tokens: list[int] | None = None,
    target_tokens: list[int] | None = None,
    advantages: list[float] | None = None,
    logprobs: list[float] | None = None,
) -> tuple[list[float], list[float]]:
    """sampling_logprobs and sampled_runs of datum 3, whose ids agree with the records unless they are given."""
    tokens = ids_of(model_input) if tokens is None else tokens
    target_tokens = ids_of(targets) if target_tokens is None else target_tokens
    inputs: dict[str, np.ndarray] = {
        "target_tokens": np.array(target_tokens),
        "advantages": np.array(advantages or [0.0] * len(tokens), np.float32),
    }
    if logprobs is not None:
        inputs["logprobs"] = np.array(logprobs, np.float32)
    given_spans = Provenance(tuple(model_input), tuple(targets))
    added = sampling_inputs(3, given_spans, np.array(tokens, np.int32), inputs, records())
    assert added.keys() == {"sampling_logprobs", "sampled_runs"}
    assert all(array.dtype == np.float32 for array in added.values())
    return added["sampling_logprobs"].tolist(), added["sampled_runs"].tolist()


def recorded_logprobs(*ids: int) -> list[float]:
    return (-np.array(ids, np.float32) / 10).tolist()


# A prompt of four and the sampled tokens of "a", shifted by one, as the public recipe writes it.
RECIPE = ([prompt("a", 0, 4), sampled("a", 0, 4)], [prompt("a", 1, 3), sampled("a", 0, 5)])


def test_sampled_targets_get_what_was_recorded() -> None:
    logprobs, runs = resolve(*RECIPE)
    assert logprobs == [0, 0, 0, *recorded_logprobs(*TOKENS["a"])]
    assert runs == [0, 0, 0, 1, 1, 1, 1, 1]


def test_turns_of_a_conversation_are_runs_of_their_own() -> None:
    spans = [prompt("a", 0, 2), sampled("a", 0, 5), prompt("b", 1, 2), sampled("b", 0, 3)]
    assert resolve(spans, spans)[1] == [0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2]


def test_spans_that_go_on_in_their_sequence_are_one_run() -> None:
    spans = [sampled("a", 0, 2), sampled("a", 2, 1), sampled("a", 4, 1), sampled("b", 0, 1), sampled("b", 0, 2)]
    assert resolve(spans, spans)[1] == [1, 1, 1, 2, 3, 4, 4]


def test_an_empty_span_between_them_changes_nothing_and_another_token_does() -> None:
    empty = [sampled("a", 0, 2), prompt("b", 0, 0), sampled("a", 2, 1)]
    assert resolve(empty, empty)[1] == [1, 1, 1]
    apart = [sampled("a", 0, 2), prompt("b", 0, 1), sampled("a", 2, 1)]
    assert resolve(apart, apart)[1] == [1, 1, 0, 2]


def test_a_datum_without_provenance_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="datum 3: stable_reinforce needs its provenance"):
        sampling_inputs(3, None, np.zeros(1, np.int32), {}, {})


def test_an_unknown_sequence_is_named_whichever_field_and_length_its_span_has() -> None:
    good = [sampled("a", 0, 2)]
    for spans in ([prompt("c", 0, 2)], [*good, prompt("c", 0, 0)]):
        for fields in ((spans, good), (good, spans)):
            with pytest.raises(InvalidRequest, match="datum 3: sequence 'c' is not on record"):
                resolve(*fields, tokens=[11, 12], target_tokens=[11, 12])


@pytest.mark.parametrize(
    ("span", "what"),
    [
        (sampled("a", 4, 2), r"positions \[4, 6\) of sequence 'a', which has sampled tokens of length 5"),
        (sampled("a", 9, 2), r"positions \[9, 11\) of sequence 'a'"),
        (prompt("a", 3, 2), r"positions \[3, 5\) of sequence 'a', which has a prompt of length 4"),
    ],
)
def test_a_span_outside_its_sequence_is_refused(span: Span, what: str) -> None:
    good = [sampled("b", 0, 2)]
    for fields, name in (((good, [span]), "loss_fn_inputs"), (([span], good), "model_input")):
        with pytest.raises(InvalidRequest, match=f"datum 3: a span of {name} names {what}"):
            resolve(*fields, tokens=[21, 22], target_tokens=[21, 22])


def test_other_tokens_than_the_recorded_ones_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"datum 3: target_tokens\[4\] is 99, but token 1 of sequence 'a' is 12"):
        resolve(*RECIPE, target_tokens=[0, 0, 0, 11, 99, 13, 14, 15])
    with pytest.raises(InvalidRequest, match=r"datum 3: model_input\[7\] is 15, but token 3 of sequence 'a' is 14"):
        resolve(*RECIPE, tokens=[0, 0, 0, 0, 11, 12, 13, 15])


def test_prompt_tokens_are_the_clients_own() -> None:
    assert resolve(*RECIPE, tokens=[7, 7, 7, 7, 11, 12, 13, 14], target_tokens=[0, 0, 0, *TOKENS["a"]])


def test_an_advantage_on_a_token_that_was_not_sampled_is_refused() -> None:
    assert resolve(*RECIPE, advantages=[0, 0, 0, 1, -1, 0, 1, 1])
    with pytest.raises(InvalidRequest, match=r"datum 3: advantages\[2\] is 0.5, but the target there is not in a samp"):
        resolve(*RECIPE, advantages=[0, 0, 0.5, 1, 1, 1, 1, 1])


def test_logprobs_of_the_clients_own_must_be_the_recorded_ones() -> None:
    own = recorded_logprobs(*TOKENS["a"])
    # Whatever stands beside a prompt is a placeholder.
    assert resolve(*RECIPE, logprobs=[9, 9, 9, *own]) == resolve(*RECIPE)
    assert resolve(*RECIPE, logprobs=[0, 0, 0, *(value * 1.00001 for value in own)]) == resolve(*RECIPE)
    own[2] -= 0.01
    with pytest.raises(InvalidRequest, match=r"datum 3: logprobs\[5\] is -1.3\d+, but -1.29\d* was recorded .*; leave"):
        resolve(*RECIPE, logprobs=[0, 0, 0, *own])


@st.composite
def tilings(draw: st.DrawFn) -> list[Span]:
    spans = []
    for _ in range(draw(st.integers(1, 6))):
        name, is_sampled = draw(st.sampled_from("ab")), draw(st.booleans())
        size = len(TOKENS[name]) if is_sampled else PROMPT
        offset = draw(st.integers(0, size))
        spans.append(Span(name, offset, draw(st.integers(0, size - offset)), is_sampled))
    return [*spans, sampled("a", 0, 1)]


@given(tilings())
def test_any_tiling_gives_each_sampled_token_its_own_record(spans: list[Span]) -> None:
    logprobs, runs = resolve(spans, spans)
    expected = [
        (name, offset) if span.is_sampled else None
        for span in spans
        for name, offset in ((span.sequence_id, span.offset + place) for place in range(span.length))
    ]
    assert [bool(run) for run in runs] == [place is not None for place in expected]
    for row, place in enumerate(expected):
        if place is None:
            assert logprobs[row] == 0
            continue
        name, offset = place
        assert logprobs[row] == recorded_logprobs(TOKENS[name][offset])[0]
        goes_on = row > 0 and expected[row - 1] == (name, offset - 1)
        assert row == 0 or (runs[row] == runs[row - 1]) == goes_on
    assert sorted({run for run in runs if run}) == list(range(1, int(max(runs)) + 1))
