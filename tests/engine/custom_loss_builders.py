"""Custom losses for tests: traced as the SDK traces them, or written out by hand as a hostile client would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tinker.lib.public_interfaces.custom_loss import LossHandle, encode_graph, trace_loss

from treadle.domain.custom_loss import CustomLoss
from treadle.domain.ops import Datum
from treadle.engine.custom_loss import QuantumLoss
from treadle.engine.losses import LossTerms
from treadle.wire.graphs import CreateCustomLossBody, custom_loss_of


def traced(function: Callable[..., Any], ranks: Mapping[str, int]) -> tuple[LossHandle, CustomLoss]:
    """The loss as the SDK keeps it, and as it arrives here."""
    handle = trace_loss(function, ranks, "session")  # type: ignore[arg-type]
    fields = {
        "session_id": "session",
        "custom_loss_seq_id": 0,
        "name": handle.name,
        "inputs": [given.model_dump() for given in handle.inputs],
        "graph": encode_graph(handle).model_dump(),
    }
    return handle, custom_loss_of(CreateCustomLossBody.model_validate(fields))


def node(op: str, name: str, target: str, *args: object, **kwargs: object) -> dict[str, object]:
    """One node as JSON."""
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def body(
    *nodes: Mapping[str, object], metrics: Mapping[str, object] | None = None, last: str = "loss"
) -> dict[str, Any]:
    """A registration: `logprobs`, these nodes, and an output of the node "loss"."""
    return {
        "session_id": "session",
        "custom_loss_seq_id": 0,
        "name": "written",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {
            "format": 1,
            "nodes": [
                node("placeholder", "logprobs", "logprobs"),
                *nodes,
                node("output", "output", "output", {"tuple": [{"ref": "loss"}, {"dict": dict(metrics or {})}]}),
            ],
        },
    }


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


def total(of: str) -> dict[str, object]:
    """The node that makes a loss of another node's value."""
    return node("call_method", "loss", "sum", ref(of))


def checked(fields: Mapping[str, Any]) -> CustomLoss:
    """The loss of a registration. Raises InvalidRequest as the gateway would."""
    return custom_loss_of(CreateCustomLossBody.model_validate(dict(fields)))


def custom_datum(length: int, *, seed: int = 0, columns: int | None = None, **inputs: np.ndarray) -> Datum:
    """Tokens and targets below 160, and these inputs."""
    rng = np.random.default_rng(seed)
    shape = (length,) if columns is None else (length, columns)
    return Datum(
        tokens=rng.integers(0, 160, length).astype(np.int32),
        inputs={"target_tokens": rng.integers(0, 160, shape), **inputs},
    )


def terms_of(
    loss: CustomLoss, datums: Sequence[Datum], logprobs: torch.Tensor, *, wants_grad: bool = True
) -> LossTerms:
    """The terms of a quantum whose log-probabilities are [T] or [T, K]."""
    columns = logprobs if logprobs.ndim == 2 else logprobs[:, None]
    return QuantumLoss(loss, datums, first_datum_index=0).terms(columns, wants_grad=wants_grad)
