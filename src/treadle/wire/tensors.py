"""Tensors of pass requests: raw bytes, dense or compressed sparse rows, to flat values of one dtype.

Knows shapes and dtypes, not what a tensor means. Every size is compared with the datum's length before anything
is allocated, so no declared shape can make the server allocate more than the caller's budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.domain.limits import MAX_TARGETS_PER_POSITION
from treadle.errors import InvalidRequest
from treadle.wire import treadle_pb2 as pb

INT32 = np.dtype("<i4")
INT64 = np.dtype("<i8")
FLOAT32 = np.dtype("<f4")

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.ELEMENT_TYPE_FLOAT32: FLOAT32,
    pb.ELEMENT_TYPE_INT64: INT64,
    pb.ELEMENT_TYPE_INT32: INT32,
}


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """Row-major little-endian values of one tensor, and its shape: (T,) or (T, K)."""

    raw: bytes
    shape: tuple[int, ...]


def flat_tensor(tensor: pb.TensorMessage, *, num_rows: int, dtype: np.dtype[Any], budget: int) -> FlatTensor:
    """The values of `tensor` as `dtype`, one row for each of the datum's `num_rows` tokens.

    Integers are taken for floats when every value is exact in float32 (masks and weights are often built from
    integers); floats are never taken for integers. Raises InvalidRequest for any other dtype, a shape other than
    [T] or [T, K] with T = num_rows, bytes that do not fill the shape, or more than `budget` bytes.
    """
    sent = _DTYPES.get(tensor.dtype)
    if sent is None:
        raise InvalidRequest(f"has dtype {_dtype_name(tensor.dtype)}; send float32 or int64")
    shape = tuple(tensor.shape)
    raw = tensor.dense
    # Nearly every tensor is this one: a match implies all that is checked below.
    if sent is dtype and shape == (num_rows,) and len(raw) == num_rows * dtype.itemsize:
        return FlatTensor(raw, shape)
    is_sparse = tensor.WhichOneof("encoding") == "sparse"
    if not shape and not is_sparse:
        shape = (len(raw) // sent.itemsize,)
    _check_shape(shape, num_rows)
    num_values = num_rows if len(shape) == 1 else num_rows * shape[1]
    if num_values * dtype.itemsize > budget:
        raise InvalidRequest(f"of shape {list(shape)} takes this request's inputs over {budget} bytes")
    if is_sparse:
        values = _densified(tensor.sparse, sent, shape)
        return FlatTensor(_converted(values, dtype).tobytes(), shape)
    if len(raw) != num_values * sent.itemsize:
        raise InvalidRequest(
            f"of shape {list(shape)} and dtype {sent.name} needs {num_values * sent.itemsize} bytes, got {len(raw)}"
        )
    if sent != dtype:
        raw = _converted(np.frombuffer(raw, dtype=sent), dtype).tobytes()
    return FlatTensor(raw, shape)


def scalar_tensor(tensor: pb.TensorMessage, *, dtype: np.dtype[Any]) -> FlatTensor:
    """The one value of `tensor`, of shape (). Raises InvalidRequest for another number of values or another dtype."""
    sent = sent_dtype(tensor)
    if tuple(tensor.shape) not in ((), (1,)) or tensor.WhichOneof("encoding") == "sparse":
        raise InvalidRequest(f"has shape {list(tensor.shape[:8])}; a scalar is due")
    values_dtype = _DTYPES[tensor.dtype]
    if len(tensor.dense) != values_dtype.itemsize:
        raise InvalidRequest(f"has {len(tensor.dense)} bytes; one {sent.name} is due")
    return FlatTensor(_converted(np.frombuffer(tensor.dense, dtype=values_dtype), dtype).tobytes(), ())


def sent_dtype(tensor: pb.TensorMessage) -> np.dtype[Any]:
    """float32 or int64, as the tensor was sent. Raises InvalidRequest for any other dtype."""
    sent = _DTYPES.get(tensor.dtype)
    if sent is None:
        raise InvalidRequest(f"has dtype {_dtype_name(tensor.dtype)}; send float32 or int64")
    return FLOAT32 if sent == FLOAT32 else INT64


def _check_shape(shape: tuple[int, ...], num_rows: int) -> None:
    if len(shape) not in (1, 2) or shape[0] != num_rows:
        raise InvalidRequest(f"has shape {list(shape[:8])}, but model_input has {num_rows} tokens")
    if len(shape) == 2 and not 1 <= shape[1] <= MAX_TARGETS_PER_POSITION:
        raise InvalidRequest(f"has {shape[1]} columns; allowed are 1 to {MAX_TARGETS_PER_POSITION}")


def _densified(sparse: pb.SparseRows, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The dense [T, K] array, zeros where no entry is listed. `shape` was checked before."""
    if len(shape) != 2:
        raise InvalidRequest(f"is sparse with shape {list(shape)}; sparse tensors have two dimensions")
    num_rows, num_columns = shape
    values = _whole(sparse.values, dtype, "values")
    row_starts = _whole(sparse.row_starts, INT64, "row starts").astype(np.int64)
    columns = _whole(sparse.columns, INT64, "columns").astype(np.int64)
    cells = check_sparse_cells(row_starts, columns, num_values=len(values), num_rows=num_rows, num_columns=num_columns)
    dense = np.zeros(num_rows * num_columns, dtype=dtype)
    dense[cells] = values
    return dense


def check_sparse_cells(
    row_starts: NDArray[np.int64], columns: NDArray[np.int64], *, num_values: int, num_rows: int, num_columns: int
) -> NDArray[np.int64]:
    """Where the listed values of a sparse tensor lie in the dense one, row by row: ascending, int64 [values].

    Raises InvalidRequest, in words that follow the tensor's name, for indexes that do not fit the shape.
    """
    if len(columns) != num_values:
        raise InvalidRequest(f"is sparse with {num_values} values for {len(columns)} column indices")
    if len(row_starts) != num_rows + 1:
        raise InvalidRequest(
            f"is sparse with {len(row_starts)} row starts for {num_rows} rows; one more than rows is due"
        )
    # Compared as they are: differences of hostile values wrap around.
    if row_starts[0] != 0 or row_starts[-1] != num_values or (row_starts[1:] < row_starts[:-1]).any():
        raise InvalidRequest(f"is sparse with row starts that do not rise from 0 to its {num_values} values")
    if len(columns) and (columns.min() < 0 or columns.max() >= num_columns):
        raise InvalidRequest(f"is sparse with a column index outside [0, {num_columns})")
    rows = np.repeat(np.arange(num_rows), np.diff(row_starts))
    cells = rows * num_columns + columns
    if (np.diff(cells) <= 0).any():
        raise InvalidRequest("is sparse with columns that are repeated or out of order within a row")
    return cells


def _whole(raw: bytes, dtype: np.dtype[Any], what: str) -> NDArray[Any]:
    if len(raw) % dtype.itemsize:
        raise InvalidRequest(f"is sparse with {len(raw)} bytes of {what}, not a multiple of {dtype.itemsize}")
    return np.frombuffer(raw, dtype=dtype)


def _converted(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`values` as `dtype`, unchanged in value. Raises InvalidRequest when that cannot be."""
    if values.dtype == dtype:
        return values
    if values.dtype.kind != "i":
        raise InvalidRequest(f"has dtype {values.dtype.name}; {dtype.name} is due")
    converted = values.astype(dtype)
    if (converted.astype(values.dtype) != values).any():
        raise InvalidRequest(f"has {values.dtype.name} values that {dtype.name} cannot hold exactly")
    return converted


def _dtype_name(code: int) -> str:
    known = pb.ElementType.items()
    return next((name.removeprefix("ELEMENT_TYPE_").lower() for name, value in known if value == code), str(code))
