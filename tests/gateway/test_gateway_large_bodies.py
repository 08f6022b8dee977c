"""Full bodies of the SDK beside everybody else, and the bounds of JSON bodies, which older SDKs send."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import zstandard
from gateway_support import POOL, Harness, facts, failed, ok, refused

from treadle.domain.ids import ModelId
from treadle.domain.ops import PassOp
from treadle.gateway import GatewaySettings, PoolView
from treadle.testing.builders import datum, pass_op
from treadle.wire.passes import encode_pass

# The SDK ends a chunk here.
FULL_BYTES = 5_000_000
FULL_TOKENS, FULL_DATUMS = 1_024, 300
ZSTD = {"Content-Type": "application/x-protobuf", "Content-Encoding": "zstd"}
OLD = {"X-Stainless-Package-Version": "0.16.1"}


def json_body(op: PassOp, field: str) -> dict[str, object]:
    """What SDKs before 0.25 send of a pass."""
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": datum.tokens.tolist()}]},
            "loss_fn_inputs": {
                name: {
                    "data": values.tolist(),
                    "dtype": "int64" if values.dtype.kind == "i" else "float32",
                    "shape": list(values.shape),
                }
                for name, values in datum.inputs.items()
            },
        }
        for datum in op.datums
    ]
    return {field: {"data": data, "loss_fn": op.loss.name}, "model_id": op.model_id, "seq_id": op.seq_id}


async def test_a_full_body_leaves_the_event_loop_to_others(gateway: Harness) -> None:
    """CPU time, which other processes do not change: 60 ms in all, 20 ms of it on the event loop's thread.

    The least of some tries, because what the test's own client does is in it too.
    """
    gateway.pools[0] = PoolView(POOL, facts=replace(facts(), max_context_length=2_048), is_ready=True)
    model_id = ModelId(await gateway.new_model(await gateway.new_session()))
    datums = [datum(FULL_TOKENS, seed=seed) for seed in range(FULL_DATUMS)]
    on_loop, in_all = [], []
    for seq_id in range(1, 6):
        plain = encode_pass(pass_op(seq_id, model_id=model_id, datums=datums))
        assert 0.95 * FULL_BYTES < len(plain) < 1.05 * FULL_BYTES
        body = zstandard.ZstdCompressor().compress(plain)
        loop_before, before = time.thread_time(), time.process_time()
        answer = ok(await gateway.post("forward_backward", content=body, headers=ZSTD))
        on_loop.append(time.thread_time() - loop_before)
        in_all.append(time.process_time() - before)
        assert (await gateway.row(answer["request_id"])).num_tokens == FULL_TOKENS * FULL_DATUMS
    print(f"on the event loop {min(on_loop) * 1e3:.1f} ms, in all {min(in_all) * 1e3:.1f} ms")
    assert min(on_loop) < min(0.020, min(in_all) / 2)
    assert min(in_all) < 0.060


class TestJsonBodies:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(
            is_loopback=True,
            hold_s=0.05,
            max_body_bytes=100_000,
            max_decompressed_bytes=300_000,
            max_datums_per_request=3,
        )

    @pytest.mark.parametrize("path", ["forward", "forward_backward"])
    async def test_obey_the_limits_of_newer_ones(self, gateway: Harness, path: str) -> None:
        model_id = ModelId(await gateway.new_model(await gateway.new_session()))
        field = f"{path}_input"
        many = json_body(pass_op(1, model_id=model_id, datums=[datum(3)] * 4), field)
        answer = ok(await gateway.post(path, many, headers=OLD))
        assert "takes 3" in failed(await gateway.future(answer["request_id"]))

        large = json_body(pass_op(2, model_id=model_id, datums=[datum(20_000)]), field)
        assert len(json.dumps(large, separators=(",", ":"))) > 100_000
        refused(await gateway.post(path, large, headers=OLD), 413)

        bomb = zstandard.ZstdCompressor().compress(json.dumps(many).encode() + b" " * 10_000_000)
        headers = {**OLD, "Content-Type": "application/json", "Content-Encoding": "zstd"}
        refused(await gateway.post(path, content=bomb, headers=headers), 413)

    async def test_an_endless_body_is_cut_off(self, gateway: Harness) -> None:
        num_sent = 0

        async def endless() -> object:
            nonlocal num_sent
            while True:
                num_sent += 1
                yield b" " * 10_000

        headers = {**OLD, "Content-Type": "application/json"}
        refused(await gateway.post("forward", content=endless(), headers=headers), 413)
        assert num_sent <= 12
