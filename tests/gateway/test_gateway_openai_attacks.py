"""What an attacker sends to the forms of OpenAI and Anthropic: refused, never an internal error, and soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gateway_support import KEY, POOL, Harness, facts

import treadle
from treadle.domain.outcome import PoolFacts
from treadle.errors import InvalidRequest
from treadle.gateway.chat.templates import ChatTemplate
from treadle.gateway.deps import GatewaySettings, PoolView

BUNDLED = Path(treadle.__file__).parent / "bundled" / "tiny"


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.1, max_num_samples=8)


@pytest.fixture
def gateway(gateway: Harness) -> Harness:
    base = facts()
    fields: dict[str, Any] = {name: getattr(base, name) for name in base.__dataclass_fields__}
    real = PoolFacts(**{**fields, "vocab_size": 1280, "max_context_length": 128, "tokenizer_dir": str(BUNDLED)})
    gateway.pools = [PoolView(POOL, facts=real, is_ready=True)]
    return gateway


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def call(arguments: object, **more: object) -> dict[str, object]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "x", "function": function, **more}]}


@pytest.mark.parametrize(
    "prompt",
    [[2**31], [2**32], [2**63 - 1], [2**64], [-1], [1279, 1280], [5] * 200, [10**30]],
    ids=lambda prompt: str(prompt)[:20],
)
@pytest.mark.parametrize("echo", [False, True])
async def test_tokens_that_are_none(gateway: Harness, prompt: list[int], echo: bool) -> None:
    body = {"model": POOL, "prompt": prompt, "echo": echo, "max_tokens": 1, "logprobs": 1}
    await refused(gateway, "/v1/completions", body)


@pytest.mark.parametrize(
    "message",
    [
        call(nested(300)),
        call("[" * 100_000),
        call('{"a":' + "1" * 5_000 + "}"),
        call("{}", more=nested(300)),
        call(json.dumps(nested(900))),
    ],
    ids=["deep", "open", "long", "more", "text"],
)
async def test_messages_without_end(gateway: Harness, message: dict[str, object]) -> None:
    body = {"model": POOL, "messages": [message] * 3, "max_tokens": 1_000}
    await refused(gateway, "/v1/chat/completions", body)
    body["chat_template_kwargs"] = {"x": nested(300)}
    await refused(gateway, "/v1/chat/completions", body)
    tools = [{"type": "function", "function": {"name": "f", "parameters": nested(400)}}]
    await refused(gateway, "/v1/chat/completions", {**body, "tools": tools, "tool_choice": "none"})


@pytest.mark.parametrize("value", [nested(300), {"a": nested(300)}, 10**30, -1, "x", True])
@pytest.mark.parametrize(
    "name", ["n", "stop", "logit_bias", "seed", "prompt", "top_p", "stream_options", "echo", "user"]
)
async def test_values_that_are_none(gateway: Harness, name: str, value: object) -> None:
    body = {"model": POOL, "prompt": "x" * 5_000, "max_tokens": 1_000, name: value}
    await refused(gateway, "/v1/completions", body)


async def refused(gateway: Harness, path: str, body: object) -> None:
    answer = await gateway.client.post(path, json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("filter_", ["dictsort", "xmlattr", "items", "batch(0)|list", "indent(x)"])
@pytest.mark.parametrize("value", ["abc", [1], 5, "%q"])
def test_variables_that_a_template_cannot_use(filter_: str, value: object) -> None:
    template = ChatTemplate({"default": "{{ x|" + filter_ + " }}{{ x|dictsort }}"}, {})
    with pytest.raises(InvalidRequest, match="chat template"):
        template.render([{"role": "user", "content": "x"}], variables={"x": value})
