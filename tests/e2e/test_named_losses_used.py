"""A named loss with the official SDKs: approved, used by its name and under another's, revoked, and replayed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from e2e_support import MODEL, ServerProcess, batch, failure_of, logprobs_of, new_key, new_run
from tinker import types
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from treadle.domain.ids import TenantId
from treadle.domain.named_losses import LossStatus, NewSubmission, ReviewResult
from treadle.store import Store
from treadle.store.audit import Author
from treadle.wire.graphs import CreateCustomLossBody, custom_loss_of, write_custom_loss

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = Author(TenantId("user:root"), "user:root")
TIMEOUT_S = 60
# The SDK in which a run's metadata say what a loss is: this one refuses every name but five.
OLD_SDK = "0.16.1"
PASSED_BY_OLD_SDK = """
import sys
import tinker
from tinker import types
url, model, loss = sys.argv[1:]
tokens = [(5 * i) % 200 + 20 for i in range(17)]
tensors = {
    "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[16]),
    "weights": types.TensorData(data=[i / 16 for i in range(16)], dtype="float32", shape=[16]),
}
datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=tensors)
service = tinker.ServiceClient(base_url=url)
metadata = {"treadle.loss.cross_entropy": loss}
training = service.create_lora_training_client(model, rank=8, seed=3, user_metadata=metadata)
try:
    types.ForwardBackwardInput(data=[datum], loss_fn=loss)
except Exception as error:
    assert "loss_fn" in str(error), error
else:
    raise AssertionError("this SDK takes any name: the metadata are not needed")
print(training.forward_backward([datum], "cross_entropy").result(timeout=60).metrics["loss:sum"])
"""


def softened(logprobs: torch.Tensor, weights: torch.Tensor) -> Any:
    return -(torch.exp(logprobs / 4) * weights).sum(), {}


def definition() -> bytes:
    handle = trace_loss(softened, {"logprobs": 1, "weights": 1}, "session")
    fields = {
        "session_id": "session",
        "custom_loss_seq_id": 0,
        "name": handle.name,
        "inputs": [given.model_dump() for given in handle.inputs],
        "graph": encode_graph(handle).model_dump(),
    }
    return write_custom_loss(custom_loss_of(CreateCustomLossBody.model_validate(fields)))


async def approve(server: ServerProcess) -> int:
    """As another server with the same database would."""
    store = await Store.open(f"sqlite:///{server.data_dir / 'treadle.db'}")
    try:
        graph = definition()
        new = NewSubmission("softened", OPERATOR.tenant_id, "upload", None, "0" * 64, "graph", graph, graph)
        submission = await store.named_losses.submit(new, OPERATOR)
        await store.named_losses.begin_review(submission.named_loss_id, OPERATOR)
        await store.named_losses.finish_review(submission.named_loss_id, ReviewResult({"state": "passed"}), OPERATOR)
        await store.named_losses.approve(submission.named_loss_id, None, OPERATOR)
        return submission.named_loss_id
    finally:
        await store.close()


async def revoke(server: ServerProcess, named_loss_id: int) -> None:
    store = await Store.open(f"sqlite:///{server.data_dir / 'treadle.db'}")
    try:
        await store.named_losses.decide(named_loss_id, LossStatus.REVOKED, "it is too soft", OPERATOR)
    finally:
        await store.close()


def same_datum() -> types.Datum:
    tokens = [(5 * i) % 200 + 20 for i in range(17)]
    tensors = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[16]),
        "weights": types.TensorData(data=[i / 16 for i in range(16)], dtype="float32", shape=[16]),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=tensors)


def by_old_sdk(server: ServerProcess) -> float:
    sys.path.insert(0, str(ROOT / "scripts" / "sdks"))
    try:
        from environments import python_of
    finally:
        sys.path.remove(str(ROOT / "scripts" / "sdks"))
    try:
        python = python_of(OLD_SDK)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no environment with tinker {OLD_SDK}: {error}")
    done = subprocess.run(
        [str(python), "-c", PASSED_BY_OLD_SDK, server.url, MODEL, "softened"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "TINKER_API_KEY": new_key()},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout)


def refusal_soon(client: tinker.TrainingClient) -> str:
    """Why a pass with the loss is refused, as soon as the server knows that it is revoked."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if (failure := failure_of(client.forward(batch(1), "softened"))) is not None:  # type: ignore[arg-type]
            return str(failure)
    raise AssertionError("it still runs")


def test_it_is_used_by_name_and_through_metadata_and_is_replayed_when_it_is_revoked(own_server: ServerProcess) -> None:
    loss: Any = "softened"
    client = new_run(own_server.service(), seed=3)
    failure = failure_of(client.forward_backward([same_datum()], loss))
    assert "loss_fn 'softened' is not enabled for you; enabled: cross_entropy" in str(failure)
    named_loss_id = asyncio.run(approve(own_server))

    client = new_run(own_server.service(), seed=3)
    passed = client.forward_backward([same_datum()], loss).result(timeout=TIMEOUT_S)
    (logprobs,) = logprobs_of(passed)
    expected, _ = softened(torch.tensor(logprobs), torch.arange(16) / 16)
    assert passed.metrics["loss:sum"] == pytest.approx(expected.item(), abs=1e-5)
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=TIMEOUT_S)
    client.forward_backward([same_datum()], loss).result(timeout=TIMEOUT_S)
    trained = logprobs_of(client.forward(batch(2), "cross_entropy").result(timeout=TIMEOUT_S))
    assert by_old_sdk(own_server) == passed.metrics["loss:sum"]

    asyncio.run(revoke(own_server, named_loss_id))
    # At admission, or in the cycle for which it was admitted a moment ago.
    assert "softened" in refusal_soon(client)
    assert "is not enabled for you" in refusal_soon(client)
    # Its open gradient and its step are made again, with the loss that is revoked.
    own_server.kill()
    own_server.start()
    assert logprobs_of(client.forward(batch(2), "cross_entropy").result(timeout=TIMEOUT_S)) == trained
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=TIMEOUT_S)
