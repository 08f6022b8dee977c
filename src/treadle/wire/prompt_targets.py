"""target_prompt_logprobs of asample: a JSON tensor of token ids, dense or sparse, to the cells that are to be scored.

Knows the prompt's length and the vocabulary, not what is done with the cells. Invariant: what leaves here has one row
for each token of the prompt but the first, names at least one token, and only tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.domain.limits import MAX_TARGETS_PER_POSITION
from treadle.domain.ops import TargetTokens
from treadle.errors import InvalidRequest
from treadle.wire.tensors import check_sparse_cells

_NAME = "target_prompt_logprobs"
_FIELDS = frozenset({"data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices"})
_MAX_INT64 = 2**63 - 1


def prompt_targets(tensor: Any, *, num_prompt_tokens: int, vocab_size: int) -> TargetTokens:
    """The cells that `tensor` (TensorData as JSON) names. -1 names nothing.

    Raises InvalidRequest unless it is int64 of shape [num_prompt_tokens - 1, K], K at most MAX_TARGETS_PER_POSITION,
    with at least one token id and none outside the vocabulary.
    """
    if not isinstance(tensor, dict):
        raise InvalidRequest(f"{_NAME} must be a tensor: an object with data, dtype and shape")
    if unknown := sorted(key for key, value in tensor.items() if key not in _FIELDS and value is not None):
        raise InvalidRequest(f"{_NAME}.{unknown[0][:80]} is not a field of a tensor")
    if tensor.get("dtype") != "int64":
        raise InvalidRequest(f"{_NAME} has dtype {str(tensor.get('dtype'))[:80]!r}; token ids are int64")
    num_rows, num_columns = _shape(tensor.get("shape"), num_prompt_tokens)
    token_ids = _integers(tensor.get("data"), "data", lowest=-1, highest=vocab_size - 1).astype(np.int32)
    if not (token_ids >= 0).any():
        raise InvalidRequest(f"{_NAME} names no token: every cell is -1")
    row_starts, columns = tensor.get("sparse_crow_indices"), tensor.get("sparse_col_indices")
    if row_starts is None and columns is None:
        if len(token_ids) != num_rows * num_columns:
            raise InvalidRequest(
                f"{_NAME} of shape [{num_rows}, {num_columns}] has {len(token_ids)} values; "
                f"due are {num_rows * num_columns}"
            )
        return TargetTokens(token_ids, num_columns)
    starts = _integers(row_starts, "sparse_crow_indices", lowest=0, highest=_MAX_INT64)
    places = _integers(columns, "sparse_col_indices", lowest=0, highest=_MAX_INT64)
    try:
        check_sparse_cells(starts, places, num_values=len(token_ids), num_rows=num_rows, num_columns=num_columns)
    except InvalidRequest as refusal:
        raise InvalidRequest(f"{_NAME} {refusal.message}") from None
    return TargetTokens(token_ids, num_columns, starts, places)


def _shape(shape: Any, num_prompt_tokens: int) -> tuple[int, int]:
    num_rows = num_prompt_tokens - 1
    if not isinstance(shape, list) or len(shape) != 2 or set(map(type, shape)) != {int} or shape[0] != num_rows:
        raise InvalidRequest(
            f"{_NAME} has shape {str(shape)[:80]}; with a prompt of {num_prompt_tokens} tokens [{num_rows}, K] is due"
        )
    if not 1 <= shape[1] <= MAX_TARGETS_PER_POSITION:
        raise InvalidRequest(f"{_NAME} has {shape[1]} columns; allowed are 1 to {MAX_TARGETS_PER_POSITION}")
    return num_rows, shape[1]


def _integers(values: Any, field: str, *, lowest: int, highest: int) -> NDArray[np.int64]:
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise InvalidRequest(f"{_NAME}.{field} must be a list of integers")
    # Compared as they are: an integer of JSON has no bounds.
    bad = next(
        (
            value
            for value in (min(values, default=lowest), max(values, default=lowest))
            if not lowest <= value <= highest
        ),
        None,
    )
    if bad is not None:
        raise InvalidRequest(f"{_NAME}.{field} has {str(bad)[:80]}; allowed are {lowest} to {highest}")
    return np.array(values, dtype=np.int64)
