"""Bodies in OpenAI's and Anthropic's form: whatever is sent is read or refused, and never anything else."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import BadParameter
from treadle.wire.anthropic_bodies import CountTokensBody, MessagesBody
from treadle.wire.bodies import Body
from treadle.wire.openai_bodies import NEUTRAL, ChatBody, CompletionBody, parse_form

FORMS: dict[type[Body], dict[str, Any]] = {
    ChatBody: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    CompletionBody: {"model": "m", "prompt": "x"},
    MessagesBody: {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    CountTokensBody: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
}
NAMES = sorted({name for form in FORMS for name in form.model_fields} | NEUTRAL.keys() | {"thinking", "unknown"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "function", "name"]), inner, max_size=4)
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(form=st.sampled_from(list(FORMS)), changes=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_a_body_is_read_or_refused_with_the_field_named(form: type[Body], changes: dict[str, Any]) -> None:
    if not _fits(changes):
        return
    refusal, body = None, None
    try:
        body = parse_form(form, orjson.dumps(FORMS[form] | changes))
    except BadParameter as error:
        refusal = error
    if refusal is not None:
        assert refusal.message
        assert refusal.param is None or refusal.param.split(".")[0] in NAMES
    if isinstance(body, ChatBody):
        assert all(isinstance(message.for_template(), dict) for message in body.messages)


def _fits(value: Any) -> bool:
    """Whether it can be written as JSON by the library: 64-bit integers, text without lone surrogates."""
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], [2, 3]], ([1], [2, 3]))],
)
def test_prompts_are_texts_or_tokens_one_or_many(prompt: Any, expected: Any) -> None:
    assert parse_form(CompletionBody, orjson.dumps({"model": "m", "prompt": prompt})).prompts == expected


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1.5], {"a": 1}, [[1], "a"], [True]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(BadParameter) as refusal:
        parse_form(CompletionBody, orjson.dumps({"model": "m", "prompt": prompt}))
    assert refusal.value.param is not None
    assert refusal.value.param.startswith("prompt")


def test_arguments_of_calls_become_objects_for_templates() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "y", "tool_call_id": "1"},
    ]
    body = parse_form(ChatBody, orjson.dumps({"model": "m", "messages": messages}))
    shown = body.messages[1].for_template()
    assert shown["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": [1, "x"]}}
    assert "content" not in shown
