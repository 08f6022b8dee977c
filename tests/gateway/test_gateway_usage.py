"""What is counted of samples that their clients gave up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from gateway_support import KEY, Harness, open_tenant
from gateway_surface import serve_text
from test_gateway_openai import chat, queued

from treadle.domain.outcome import SampledPart
from treadle.domain.usage import UsageKind


async def left_after(gateway: Harness, *, num_shown: int) -> None:
    """A stream whose reader has got so many tokens, and goes away."""
    leave, shown = asyncio.Event(), asyncio.Event()
    messages = iter([{"type": "http.request", "body": json.dumps(chat(stream=True)).encode()}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await leave.wait()
        return {"type": "http.disconnect"}

    num_chunks = 0

    async def send(message: Any) -> None:
        nonlocal num_chunks
        num_chunks += message.get("body", b"").count(b"data: ")
        if num_chunks > 1:  # the first one says whose turn it is
            shown.set()

    path = "/v1/chat/completions"
    headers = [(b"x-api-key", KEY.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    call: Callable[..., Awaitable[None]] = gateway.app
    serving = asyncio.ensure_future(call(scope, receive, send))
    (request_id,) = await queued(gateway)
    if num_shown:
        tokens = (300, 301, 302)[:num_shown]
        gateway.app.state.gateway.deps.live.publish([SampledPart(request_id, 0, 0, tokens, (-1.0,) * num_shown)])
        await asyncio.wait_for(shown.wait(), timeout=20)
    leave.set()
    await serving


@pytest.mark.parametrize("num_shown", [0, 3])
async def test_a_stream_that_its_reader_left_counts_what_was_shown(gateway: Harness, num_shown: int) -> None:
    serve_text(gateway)
    await left_after(gateway, num_shown=num_shown)
    records = await gateway.store.usage.events(open_tenant(), since=0, before=2**40) or []
    amounts = {record.kind: record.amount for record in records}
    assert amounts.get(UsageKind.SAMPLED, 0) == num_shown
    assert (UsageKind.PREFILL in amounts) == bool(num_shown)
    assert UsageKind.PREFILL_CACHED not in amounts
