"""What a review's child does with its request, as bytes in and bytes out. See child.py.

Invariant: a `ready_to_...` has imported and run everything once, so that its job opens nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import orjson
import torch

from treadle.review.dry_run import report_on
from treadle.review.tracing import UntraceableError, trace_file
from treadle.wire.graphs import read_custom_loss, write_custom_loss

_SAMPLE = """
import torch
import torch.nn.functional as F
INPUTS = {"logprobs": 1, "advantages": 1}
def loss(logprobs, advantages):
    kept = torch.where(advantages > 0, torch.exp(logprobs), logprobs.detach())[:, None].sum(dim=1)
    return -(kept * advantages).sum() + F.relu(logprobs).mean(), {"custom/kept:mean": kept.mean()}
"""


def ready_to_trace() -> Callable[[bytes], bytes]:
    """The job that traces: {"name", "source"} in; {"definition": {...}} or {"error": "..."} out."""

    def trace(request: bytes) -> bytes:
        fields = orjson.loads(request)
        try:
            loss = trace_file(fields["source"], fields["name"])
            answer = b'{"definition":' + write_custom_loss(loss) + b"}"
        except UntraceableError as refusal:
            answer = json.dumps({"error": str(refusal)}).encode()
        return answer

    assert b"definition" in trace(json.dumps({"name": "sample", "source": _SAMPLE}).encode())
    assert b"error" in trace(json.dumps({"name": "sample", "source": "def f(:"}).encode())
    return trace


def ready_to_run() -> Callable[[bytes], bytes]:
    """The job that runs a graph on made-up tensors: a definition in, the report of dry_run.py out."""
    torch.set_num_threads(1)

    def run(request: bytes) -> bytes:
        return json.dumps(report_on(read_custom_loss(request)), allow_nan=False).encode()

    run(write_custom_loss(trace_file(_SAMPLE, "sample")))
    return run
