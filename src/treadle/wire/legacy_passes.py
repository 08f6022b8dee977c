"""forward_backward and forward bodies of SDKs before 0.25, which are JSON, to the protobuf of the newer ones.

It translates and judges nothing: what comes out is read by passes.py like any other body, which refuses it in the same
words. Only what protobuf cannot hold is refused here, as InvalidRequest naming the datum and the field: a number where
a list is due, a text among numbers, a key that would be lost. Null means absent, and chunks are told apart by their
fields, because SDKs up to 0.16.1 write nulls and no type tags.

Invariant: equal numbers give equal bytes. A pass sent as JSON computes what the same pass sent as protobuf does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.domain.limits import MAX_ID_CHARS
from treadle.errors import BodyTooLarge, InvalidRequest, NotSupported, UnreadableBody, UserError
from treadle.wire import treadle_pb2 as pb
from treadle.wire.bodies import OpHead, checked_fields
from treadle.wire.number_text import NumberText
from treadle.wire.passes import PassHead
from treadle.wire.tensors import FLOAT32, INT32, INT64

# The SDKs that send JSON cut their requests at 5 MB, counting 10 bytes for a number; one datum may be larger.
# Numbers are never all Python objects at once, but the rest of the body is.
MAX_JSON_PASS_BYTES = 32 * 2**20

# dtype in JSON: its code in protobuf, and its element type.
_DTYPES: Mapping[str, tuple[pb.ElementType, np.dtype[Any]]] = {
    "float32": (pb.ELEMENT_TYPE_FLOAT32, FLOAT32),
    "int64": (pb.ELEMENT_TYPE_INT64, INT64),
}
# What Python makes of JSON's numbers. bool is not among them, though Python counts with it.
_INTEGERS = frozenset({int})
_NUMBERS = frozenset({int, float})
_JSON_NAMES: Mapping[type, str] = {
    bool: "true or false",
    dict: "an object",
    float: "a number that is no integer of 64 bits",
    list: "a list",
    str: "a text",
    type(None): "null",
}
_CHUNK_FIELDS = {"tokens": "encoded_text", "data": "image", "location": "image_asset_pointer", "dmel": "dmel"}
_DATUM_KEYS = frozenset({"model_input", "loss_fn_inputs", "type"})
_TENSOR_KEYS = frozenset({"data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices", "type"})
_PASS_KEYS = frozenset({"data", "loss_fn", "loss_fn_config", "type"})


@dataclass(frozen=True, slots=True)
class SentPass:
    """A pass whose owner could be read: its protobuf form, or why it has none."""

    head: PassHead
    body: bytes | UserError


def read_json_pass(raw: bytes, *, input_field: str, forward_only: bool) -> SentPass:
    """The pass in a JSON body, ready for `decode_pass`.

    input_field: where it lies in the body, "forward_backward_input" or "forward_input". Raises UnreadableBody for
    anything but a JSON object with a model_id and a seq_id >= 1, BodyTooLarge for more than MAX_JSON_PASS_BYTES. What
    is wrong behind the head is returned, for the row: InvalidRequest, or NotSupported for chunks other than text.
    """
    if len(raw) > MAX_JSON_PASS_BYTES:
        raise BodyTooLarge(
            f"a JSON body of {len(raw)} bytes is over the limit of {MAX_JSON_PASS_BYTES} for passes; send fewer datums "
            "at once, or use tinker 0.25 or newer, which sends protobuf"
        )
    text = NumberText(raw)
    fields = text.fields
    ids = checked_fields(OpHead, {key: fields.get(key) for key in ("model_id", "seq_id")})
    if ids.model_id is None or ids.seq_id is None:
        raise UnreadableBody(f"{'model_id' if ids.model_id is None else 'seq_id'} is missing")
    given = fields.get(input_field)
    loss_fn = given.get("loss_fn") if isinstance(given, dict) else None
    head = PassHead(ids.model_id, ids.seq_id, loss_fn if isinstance(loss_fn, str) else "")
    try:
        return SentPass(head, _Translation(text).protobuf(head, input_field=input_field, forward_only=forward_only))
    except UserError as refusal:
        return SentPass(head, refusal)


class _Translation:
    """The way of one body from JSON to protobuf."""

    def __init__(self, text: NumberText) -> None:
        self._text = text

    def protobuf(self, head: PassHead, *, input_field: str, forward_only: bool) -> bytes:
        given = self._text.fields.get(input_field)
        if not isinstance(given, dict):
            raise InvalidRequest(f"{input_field} must be an object")
        _refuse_unknown(given, _PASS_KEYS, input_field)
        loss_fn, datums = given.get("loss_fn"), given.get("data")
        if not isinstance(loss_fn, str):
            raise InvalidRequest(f"{input_field}.loss_fn must be the name of a loss")
        if not isinstance(datums, list):
            raise InvalidRequest(f"{input_field}.data must be a list of datums")
        message = pb.PassRequest(
            model_id=head.model_id,
            seq_id=head.seq_id,
            loss_fn=_short(loss_fn, "loss_fn"),
            forward_only=forward_only,
        )
        _write_settings(message, given.get("loss_fn_config"))
        for index, datum in enumerate(datums):
            try:
                self._write_datum(message.datums.add(), datum)
            except (InvalidRequest, NotSupported) as refusal:
                raise type(refusal)(f"datum {index}: {refusal.message}") from None
        return message.SerializeToString()

    def _write_datum(self, message: pb.DatumMessage, datum: object) -> None:
        if not isinstance(datum, dict):
            raise InvalidRequest("must be an object")
        _refuse_unknown(datum, _DATUM_KEYS, "a datum")
        model_input = datum.get("model_input")
        chunks = model_input.get("chunks") if isinstance(model_input, dict) else None
        if not isinstance(chunks, list):
            raise InvalidRequest("model_input must be an object with a list of chunks")
        for chunk in chunks:
            message.model_input.add().text.tokens = self._chunk_tokens(chunk)
        inputs = datum.get("loss_fn_inputs")
        if inputs is None:
            return
        if not isinstance(inputs, dict):
            raise InvalidRequest("loss_fn_inputs must be an object")
        for name, tensor in inputs.items():
            if tensor is None:
                continue
            _short(name, "the name of a loss input")
            try:
                self._write_tensor(message.loss_fn_inputs[name], tensor)
            except InvalidRequest as refusal:
                raise InvalidRequest(f"loss_fn_inputs {name[:80]!r} {refusal.message}") from None

    def _chunk_tokens(self, chunk: object) -> bytes:
        if not isinstance(chunk, dict):
            raise InvalidRequest("a chunk of model_input must be an object")
        kind = chunk.get("type")
        if kind is None:
            kind = next((kind for field, kind in _CHUNK_FIELDS.items() if chunk.get(field) is not None), None)
        if kind != "encoded_text":
            raise NotSupported(f"model_input has a chunk of kind {str(kind)[:80]}; only text is supported")
        _refuse_unknown(chunk, frozenset({"tokens", "type"}), "a text chunk")
        return self._numbers(chunk.get("tokens"), INT32, "model_input has tokens that")

    def _write_tensor(self, message: pb.TensorMessage, tensor: object) -> None:
        if not isinstance(tensor, dict):
            raise InvalidRequest("must be an object with data and dtype")
        _refuse_unknown(tensor, _TENSOR_KEYS, "a tensor")
        dtype = tensor.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise InvalidRequest(f"has dtype {str(dtype)[:80]}; send float32 or int64")
        message.dtype, element = _DTYPES[dtype]
        if tensor.get("shape") is not None:
            shape = self._numbers(tensor["shape"], INT64, "has a shape that")
            message.shape.extend(np.frombuffer(shape, dtype=INT64).tolist())
        values = self._numbers(tensor.get("data"), element, "has data that")
        row_starts, columns = tensor.get("sparse_crow_indices"), tensor.get("sparse_col_indices")
        if row_starts is None and columns is None:
            message.dense = values
            return
        if row_starts is None or columns is None:
            raise InvalidRequest("is sparse with only one of sparse_crow_indices and sparse_col_indices")
        message.sparse.values = values
        message.sparse.row_starts = self._numbers(row_starts, INT64, "has sparse_crow_indices that")
        message.sparse.columns = self._numbers(columns, INT64, "has sparse_col_indices that")

    def _numbers(self, values: object, dtype: np.dtype[Any], what: str) -> bytes:
        """A flat list as little-endian bytes.

        Floats are rounded to the nearest float32; a NaN stays one, for passes.py to refuse by its place.
        """
        pieces = self._text.pieces(values)
        if pieces is None:
            raise InvalidRequest(f"{what} must be a list of numbers")
        return b"".join([_bytes_of(piece, dtype, what) for piece in pieces])


def _bytes_of(values: list[Any], dtype: np.dtype[Any], what: str) -> bytes:
    kinds = _INTEGERS if dtype.kind == "i" else _NUMBERS
    found = set(map(type, values))
    if not found <= kinds:
        wrong = ", ".join(sorted(_JSON_NAMES[kind] for kind in found - kinds))
        due = "integers" if kinds is _INTEGERS else "numbers"
        raise InvalidRequest(f"{what} must be a list of {due}, and has {wrong} in it")
    try:
        if kinds is _INTEGERS:
            return np.array(values, dtype=dtype).tobytes()
        # 1e39 becomes an infinity, which passes.py refuses by its place.
        with np.errstate(over="ignore"):
            return np.array(values, dtype=np.float64).astype(dtype).tobytes()
    except OverflowError:
        raise InvalidRequest(f"{what} must fit into {dtype.name}, and does not") from None


def _write_settings(message: pb.PassRequest, config: object) -> None:
    if config is None:
        return
    if not isinstance(config, dict):
        raise InvalidRequest("loss_fn_config must be an object")
    for key, value in config.items():
        setting = message.loss_fn_settings[_short(key, "a key of loss_fn_config")]
        if isinstance(value, str):
            setting.text = _short(value, f"loss_fn_config {key[:80]!r}")
        elif isinstance(value, bool | int | float):
            # A switch is written as 1 or 0, as the SDK's own types do it (dict of str to float).
            setting.number = _as_double(value, key)
        else:
            raise InvalidRequest(f"loss_fn_config {key[:80]!r} must be a number or a text")


def _as_double(value: float, key: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise InvalidRequest(f"loss_fn_config {key[:80]!r} is too large a number") from None


def _refuse_unknown(fields: Mapping[str, object], known: frozenset[str], where: str) -> None:
    """Refuses keys with a value that nobody here reads: one that is lost could change what is computed."""
    for key, value in fields.items():
        if key not in known and value is not None:
            raise InvalidRequest(f"{key[:80]!r} is not a field of {where} that this server knows")


def _short(text: str, what: str) -> str:
    if len(text) > MAX_ID_CHARS:
        raise InvalidRequest(f"{what} is longer than {MAX_ID_CHARS} characters")
    return text
