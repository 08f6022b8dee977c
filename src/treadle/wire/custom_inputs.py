"""What the datums of a custom loss carry: the targets, and the inputs that the loss declares, each in its own dtype.

It knows ranks and dtypes and no graphs. An input that the loss does not declare is not read: the SDK sends datums
unchanged, and a custom loss says itself what it is computed from.
Invariant: what leaves here has the declared rank, one row per token unless it is a scalar, and the dtype that was sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treadle.domain.custom_loss import CustomLoss
from treadle.domain.limits import MAX_DECOMPRESSED_BYTES
from treadle.errors import InvalidRequest
from treadle.wire import treadle_pb2 as pb
from treadle.wire.tensors import INT64, FlatTensor, flat_tensor, scalar_tensor, sent_dtype

# By name and dtype, since datums may differ in it: which datums have it, and its values.
CustomParts = Mapping[tuple[str, "np.dtype[Any]"], Sequence[tuple[int, FlatTensor]]]


def read_custom_inputs(
    datums: Sequence[pb.DatumMessage], loss: CustomLoss, num_rows: Sequence[int], *, target_name: str
) -> CustomParts:
    """The targets and the declared inputs of every datum. Raises InvalidRequest, naming the datum and the input."""
    parts: dict[tuple[str, np.dtype[Any]], list[tuple[int, FlatTensor]]] = {}
    wanted = {target_name: loss.logprobs_rank} | {given.name: given.rank for given in loss.datum_inputs}
    budget = MAX_DECOMPRESSED_BYTES
    for index, (datum, rows) in enumerate(zip(datums, num_rows, strict=True)):
        for name, rank in wanted.items():
            if name not in datum.loss_fn_inputs:
                raise InvalidRequest(
                    f"datum {index}: loss_fn_inputs lacks {name}, which custom loss {loss.name[:80]!r} needs"
                )
            tensor = datum.loss_fn_inputs[name]
            try:
                dtype = INT64 if name == target_name else sent_dtype(tensor)
                part = (
                    scalar_tensor(tensor, dtype=dtype)
                    if rank == 0
                    else flat_tensor(tensor, num_rows=rows, dtype=dtype, budget=budget)
                )
            except InvalidRequest as error:
                raise InvalidRequest(f"datum {index}: loss_fn_inputs {name!r} {error}") from None
            if len(part.shape) != rank:
                raise InvalidRequest(
                    f"datum {index}: loss_fn_inputs {name!r} has rank {len(part.shape)}; "
                    f"custom loss {loss.name[:80]!r} declares {rank}"
                )
            budget -= len(part.raw)
            parts.setdefault((name, dtype), []).append((index, part))
    return parts
