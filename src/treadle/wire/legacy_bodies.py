"""How passes look as JSON, for the OpenAPI document; legacy_passes.py reads them without making objects of them.

Nothing is validated with these classes. Null means absent everywhere.
Source of the fields: tinker SDK 0.16.1, its request types; sparse tensors: 0.24.1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Shown(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class JsonTensor(_Shown):
    """Numbers of one dtype, row by row; or compressed sparse rows of two dimensions."""

    data: list[int] | list[float]
    dtype: Literal["float32", "int64"]
    shape: list[int] | None = None
    """One dimension when absent; needed for a sparse tensor."""
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class JsonChunk(_Shown):
    """A piece of the input. Older SDKs send no type."""

    type: Literal["encoded_text"] | None = None
    tokens: list[int]


class JsonModelInput(_Shown):
    chunks: list[JsonChunk]


class JsonDatum(_Shown):
    """One sequence, and what its loss is computed from."""

    model_input: JsonModelInput
    loss_fn_inputs: dict[str, JsonTensor]


class JsonPassInput(_Shown):
    """What to compute: the datums and the loss."""

    data: list[JsonDatum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackwardBody(_Shown):
    """forward_backward of SDKs before 0.25; newer ones send protobuf."""

    model_id: str
    seq_id: int
    forward_backward_input: JsonPassInput


class ForwardBody(_Shown):
    """forward, of SDKs before 0.25."""

    model_id: str
    seq_id: int
    forward_input: JsonPassInput
