"""forward_backward bodies: protobuf bytes to PassOp and back.

Reading has two stages. The head (model and sequence number) decides whose request it is; when it cannot be read there
is no row to fail, so that is UnreadableBody. Everything behind the head that cannot be honoured is InvalidRequest or
NotSupported, and names the datum and the field. Knows no weights: a vocabulary size and a context length are enough.

Invariant: a PassOp that leaves here with limits is safe to launch. Its ids index the vocabulary, its shapes agree,
its floats are finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from treadle.domain.custom_loss import CUSTOM, CustomLoss
from treadle.domain.ids import ModelId
from treadle.domain.limits import MAX_DATUMS_PER_REQUEST, MAX_DECOMPRESSED_BYTES, MAX_ID_CHARS
from treadle.domain.losses import CLIP_HIGH, CLIP_LOW, LOSSES, Loss, LossMeaning, LossSpec, resolve_loss
from treadle.domain.ops import Datum, PassOp
from treadle.domain.provenance import Provenance
from treadle.errors import InvalidRequest, NotSupported, UnreadableBody
from treadle.wire import treadle_pb2 as pb
from treadle.wire.custom_inputs import read_custom_inputs
from treadle.wire.graphs import read_custom_loss, write_custom_loss
from treadle.wire.provenance import read_provenance, write_provenance
from treadle.wire.tensors import FLOAT32, INT32, INT64, FlatTensor, flat_tensor

MODEL_INPUT = "model_input"
TARGET_TOKENS = "target_tokens"
# A setting of every loss: a forward through the bare base model. It is Twinkle's, not the SDK's.
DISABLE_LORA = "disable_lora"
# Settings of a custom loss: the client names it, and the server puts beside that what it is.
LOSS_ID = "loss_id"
DEFINITION = "definition"
# What the server puts behind a pass with a named loss: the SHA-256 of the definition, as hex.
NAMED_LOSS = "named_loss_sha256"


@dataclass(frozen=True, slots=True)
class PassLimits:
    """What a model can take: token ids in [0, vocab_size), sequences up to max_context_length tokens.

    context_note: what a refusal of a longer one adds, where it is not the model that sets the limit.
    """

    vocab_size: int
    max_context_length: int
    context_note: str = ""


@dataclass(frozen=True, slots=True)
class PassHead:
    """Whose pass it is: enough to make a row for it, whatever the rest holds.

    loss_fn: as the client wrote it, of any length. custom_loss_id: what a pass with a custom loss names, "" when it
    names none; None for other passes.
    """

    model_id: ModelId
    seq_id: int
    loss_fn: str = ""
    custom_loss_id: str | None = None


def read_pass_head(body: bytes) -> PassHead:
    """The owner and place of a pass. Raises UnreadableBody for anything but protobuf with a model and a seq_id >= 1."""
    return _head(_parsed(body))


def decode_pass(body: bytes, *, limits: PassLimits, meaning: LossMeaning | None = None) -> PassOp:
    """The whole pass, checked against `limits`. meaning: what its loss_fn stands for; None: the built-in loss of that
    name.

    Arrays are writable copies of `body`, laid end to end per input, so that they can be handed to torch as they are.
    Raises UnreadableBody as `read_pass_head` does, InvalidRequest naming datum and field, NotSupported for chunks
    other than text.
    """
    return _decode(_parsed(body), limits, meaning)


def decode_pass_trusted(body: bytes) -> PassOp:
    """The pass of a stored payload, which `decode_pass` accepted before: model limits are not checked again.

    It has the inputs that the server added, and no provenance, which has served its purpose.
    """
    return _decode(_parsed(body), None, None)


def with_meaning(body: bytes, meaning: LossMeaning) -> bytes:
    """The body of a pass with what its loss_fn stands for, so that whoever reads the payload needs no table.

    The body was accepted by `decode_pass` with this meaning, so it has no definition of its own.
    """
    # One message behind the other is both of them merged, by protobuf's own rules: the last loss_fn counts.
    added = pb.PassRequest(loss_fn=meaning.name)
    if meaning.definition is None:
        return body + added.SerializeToString()
    added.loss_fn = CUSTOM
    added.loss_fn_settings[DEFINITION].text = meaning.definition.decode()
    tail = b"" if meaning.sha256 is None else _NAMED_LOSS_TAIL + meaning.sha256.encode()
    return body + added.SerializeToString() + tail


def named_loss_sha256(payload: bytes) -> str | None:
    """Of the definition of the named loss that a stored pass is computed with, if it is computed with one.

    It reads the payload's end alone, so that asking costs nothing. Of other passes these are bytes of the client's,
    which can say anything: `has_named_loss` tells.
    """
    if payload[-len(_NAMED_LOSS_TAIL) - _SHA256_CHARS : -_SHA256_CHARS] != _NAMED_LOSS_TAIL:
        return None
    return payload[-_SHA256_CHARS:].decode("ascii", "replace")


def has_named_loss(payload: bytes) -> bool:
    """Whether a stored pass is computed with a named loss; a client's own setting of that key is never stored."""
    return NAMED_LOSS in _parsed(payload).loss_fn_settings


def with_inputs(body: bytes, inputs: Sequence[Mapping[str, NDArray[np.generic]]]) -> bytes:
    """The body with more loss inputs, those of each datum in order; everything else stays as the client sent it."""
    message = _parsed(body)
    for datum, added in zip(message.datums, inputs, strict=True):
        for name, values in added.items():
            _write_tensor(datum.loss_fn_inputs[name], values)
    return message.SerializeToString()


def encode_pass(op: PassOp) -> bytes:
    """The pass as `decode_pass` reads it. The gateway stores the client's own bytes; this is for every other maker."""
    message = pb.PassRequest(model_id=op.model_id, seq_id=op.seq_id, loss_fn=op.loss.name, forward_only=op.forward_only)
    for key, number in op.loss.config.items():
        message.loss_fn_settings[key].number = number
    if not op.uses_adapter:
        message.loss_fn_settings[DISABLE_LORA].number = 1
    if op.loss.custom is not None:
        message.loss_fn_settings[DEFINITION].text = write_custom_loss(op.loss.custom).decode()
    for datum in op.datums:
        written = message.datums.add()
        written.model_input.add().text.tokens = datum.tokens.astype(INT32, copy=False).tobytes()
        for name, values in datum.inputs.items():
            _write_tensor(written.loss_fn_inputs[name], values)
        if datum.provenance is not None:
            write_provenance(written, datum.provenance)
    return message.SerializeToString()


def _tail_without_value() -> bytes:
    """A message with one setting, NAMED_LOSS, up to its text of _SHA256_CHARS characters."""
    message = pb.PassRequest()
    message.loss_fn_settings[NAMED_LOSS].text = "0" * _SHA256_CHARS
    return message.SerializeToString()[:-_SHA256_CHARS]


_SHA256_CHARS = 64
_NAMED_LOSS_TAIL = _tail_without_value()


def _write_tensor(tensor: pb.TensorMessage, values: NDArray[np.generic]) -> None:
    is_integer = values.dtype.kind == "i"
    tensor.dtype = pb.ELEMENT_TYPE_INT64 if is_integer else pb.ELEMENT_TYPE_FLOAT32
    tensor.shape.extend(values.shape)
    tensor.dense = values.astype(INT64 if is_integer else FLOAT32, copy=False).tobytes()


def _parsed(body: bytes) -> pb.PassRequest:
    message = pb.PassRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise UnreadableBody(f"the body of {len(body)} bytes is not a forward_backward protobuf message") from None
    return message


def _head(message: pb.PassRequest) -> PassHead:
    model_id = message.model_id
    if not model_id:
        raise UnreadableBody("the body is not a forward_backward message with a model_id")
    if len(model_id) > MAX_ID_CHARS or "\0" in model_id:
        raise UnreadableBody(f"model_id {model_id[:80]!r} is not an id")
    if message.seq_id < 1:
        raise UnreadableBody(f"seq_id {message.seq_id} is not a sequence number; they start at 1")
    custom_loss_id = None
    if message.loss_fn == CUSTOM:
        named = message.loss_fn_settings[LOSS_ID].text if LOSS_ID in message.loss_fn_settings else ""
        custom_loss_id = named if len(named) <= MAX_ID_CHARS and "\0" not in named else ""
    return PassHead(ModelId(model_id), message.seq_id, message.loss_fn, custom_loss_id)


def _decode(message: pb.PassRequest, limits: PassLimits | None, meaning: LossMeaning | None) -> PassOp:
    head = _head(message)
    name = message.loss_fn if meaning is None else meaning.name
    custom_loss = None
    if limits is None and name == CUSTOM:
        custom_loss = _stored_custom_loss(message)
    elif meaning is not None and meaning.definition is not None:
        custom_loss = read_custom_loss(meaning.definition)
    settings = dict(_loss_settings(message))
    uses_adapter = not _disables_lora(settings, forward_only=message.forward_only)
    loss = resolve_loss(name, settings) if custom_loss is None else _custom(custom_loss, settings, name)
    if not 1 <= len(message.datums) <= MAX_DATUMS_PER_REQUEST:
        raise InvalidRequest(f"data has {len(message.datums)} datums; allowed are 1 to {MAX_DATUMS_PER_REQUEST}")
    tokens = _read_tokens(message.datums, limits)
    if loss.custom is None:
        inputs = _read_inputs(message.datums, LOSSES[loss.name], tokens, is_trusted=limits is None)
    else:
        if meaning is not None and meaning.is_named:
            _refuse_undeclared(message.datums, loss.custom, name)
        num_rows = [rows for (rows,) in tokens.shapes]
        parts = read_custom_inputs(message.datums, loss.custom, num_rows, target_name=TARGET_TOKENS)
        inputs = [_joined(name, dtype, of_datums) for (name, dtype), of_datums in parts.items()]
    if limits is not None:
        _check_values((tokens, *inputs), limits)
    inputs_of: list[dict[str, NDArray[np.generic]]] = [{} for _ in message.datums]
    for column in inputs:
        for datum_index, array in zip(column.datum_indexes, column.arrays(), strict=True):
            inputs_of[datum_index][column.name] = array
    provenances: list[Provenance | None] = [None] * len(inputs_of)
    if limits is not None:
        for datum_index, given in enumerate(inputs_of):
            _check_clips(datum_index, given, loss)
        provenances = [
            read_provenance(datum_index, datum, num_rows)
            for datum_index, (datum, (num_rows,)) in enumerate(zip(message.datums, tokens.shapes, strict=True))
        ]
    datums = tuple(
        Datum(tokens=t, inputs=i, provenance=p) for t, i, p in zip(tokens.arrays(), inputs_of, provenances, strict=True)
    )
    return PassOp(head.model_id, head.seq_id, datums, loss, message.forward_only, uses_adapter=uses_adapter)


def _check_values(columns: Sequence[_Column], limits: PassLimits) -> None:
    """Refuses ids outside the vocabulary and floats that are not finite. Integers of custom losses mean anything."""
    for column in columns:
        if column.flat.dtype.kind != "i":
            column.check_finite()
        elif column.name in (MODEL_INPUT, TARGET_TOKENS):
            column.check_token_ids(limits.vocab_size)


def _custom(custom_loss: CustomLoss, settings: Mapping[str, float | str], name: str) -> Loss:
    known = {LOSS_ID} if name == CUSTOM else set()
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise InvalidRequest(
            f"loss_fn_config key {unknown[0][:80]!r} is not known to {name}; known: {', '.join(known) or 'none'}"
        )
    return Loss(name=CUSTOM, custom=custom_loss)


def _refuse_undeclared(datums: Sequence[pb.DatumMessage], custom_loss: CustomLoss, name: str) -> None:
    """A named loss is no function of the client's own: an input that it does not read may be one that was meant to
    change what is computed."""
    declared = (TARGET_TOKENS, *(given.name for given in custom_loss.datum_inputs))
    for index, datum in enumerate(datums):
        _check_input_names(index, datum.loss_fn_inputs, name, declared, declared)


def _stored_custom_loss(message: pb.PassRequest) -> CustomLoss:
    """The loss that the server put into the payload; takes its definition out of the settings."""
    if DEFINITION not in message.loss_fn_settings:
        raise InvalidRequest(f"the payload has no definition of its {CUSTOM} loss")
    custom_loss = read_custom_loss(message.loss_fn_settings[DEFINITION].text.encode())
    for key in (DEFINITION, NAMED_LOSS):
        message.loss_fn_settings.pop(key, None)
    return custom_loss


def _loss_settings(message: pb.PassRequest) -> Mapping[str, float | str]:
    """The loss's settings. The newer map wins when it has entries: the older one only mirrors its numbers."""
    if not message.loss_fn_settings:
        return dict(message.loss_fn_numbers)
    settings: dict[str, float | str] = {}
    for key, setting in message.loss_fn_settings.items():
        match setting.WhichOneof("value"):
            case "number":
                settings[key] = setting.number
            case "text":
                if len(setting.text) > MAX_ID_CHARS:
                    raise InvalidRequest(f"loss_fn_config {key[:80]!r} has a text of over {MAX_ID_CHARS} characters")
                settings[key] = setting.text
            case _:
                raise InvalidRequest(f"loss_fn_config key {key[:80]!r} has no value")
    return settings


def _disables_lora(settings: dict[str, float | str], *, forward_only: bool) -> bool:
    """Whether the pass is to go through the bare base model; takes the setting out."""
    value = settings.pop(DISABLE_LORA, 0.0)
    if value not in (0.0, 1.0):
        raise InvalidRequest(f"loss_fn_config {DISABLE_LORA}={value!r} must be 0 or 1")
    if value and not forward_only:
        raise InvalidRequest(
            f"loss_fn_config {DISABLE_LORA} is for forward alone: without the adapter there is nothing to train"
        )
    return bool(value)


@dataclass(frozen=True, slots=True)
class _Column:
    """One array of many datums, laid end to end: checked at once, then cut into views.

    A thousand small numpy checks cost more than decoding the request; one large one is cheap.
    """

    name: str
    datum_indexes: Sequence[int]
    shapes: Sequence[tuple[int, ...]]
    flat: NDArray[Any]

    def arrays(self) -> list[NDArray[Any]]:
        """One view per datum, in its own shape."""
        arrays = []
        start = 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            part = self.flat[start:stop]
            arrays.append(part if len(shape) == 1 else part.reshape(shape))
            start = stop
        assert start == len(self.flat)
        return arrays

    def check_token_ids(self, vocab_size: int) -> None:
        """Raises InvalidRequest for the first id outside [0, vocab_size)."""
        ids = self.flat
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            self._refuse_first((ids < 0) | (ids >= vocab_size), f"outside the vocabulary [0, {vocab_size})")

    def check_finite(self) -> None:
        """Raises InvalidRequest for the first NaN or infinity."""
        is_finite = np.isfinite(self.flat)
        if not is_finite.all():
            self._refuse_first(~is_finite, "not finite")

    def _refuse_first(self, is_bad: NDArray[np.bool_], reason: str) -> NoReturn:
        flat_index = int(np.argmax(is_bad))
        stops = np.cumsum([math.prod(shape) for shape in self.shapes])
        place = int(np.searchsorted(stops, flat_index, side="right"))
        shape = self.shapes[place]
        within = flat_index - (int(stops[place - 1]) if place else 0)
        position = ", ".join(str(int(i)) for i in np.unravel_index(within, shape))
        raise InvalidRequest(
            f"datum {self.datum_indexes[place]}: {self.name}[{position}] is {self.flat[flat_index]}, {reason}"
        )


def _joined(name: str, dtype: np.dtype[Any], parts: Sequence[tuple[int, FlatTensor]]) -> _Column:
    # A bytearray makes the views writable; torch warns about arrays that are not.
    buffer = bytearray().join([part.raw for _, part in parts])
    return _Column(
        name=name,
        datum_indexes=[datum_index for datum_index, _ in parts],
        shapes=[part.shape for _, part in parts],
        flat=np.frombuffer(buffer, dtype=dtype),
    )


def _read_tokens(datums: Sequence[pb.DatumMessage], limits: PassLimits | None) -> _Column:
    """The tokens of every datum, int32 [T] each."""
    parts: list[tuple[int, FlatTensor]] = []
    for datum_index, datum in enumerate(datums):
        raw = _token_bytes(datum_index, datum)
        num_tokens = len(raw) // INT32.itemsize
        if num_tokens == 0:
            raise InvalidRequest(f"datum {datum_index}: model_input has no tokens")
        if limits is not None and num_tokens > limits.max_context_length:
            raise InvalidRequest(
                f"datum {datum_index}: model_input has {num_tokens} tokens; "
                f"the context length is {limits.max_context_length}{limits.context_note}"
            )
        parts.append((datum_index, FlatTensor(raw, (num_tokens,))))
    return _joined(MODEL_INPUT, INT32, parts)


def _token_bytes(datum_index: int, datum: pb.DatumMessage) -> bytes:
    chunks: list[bytes] = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "text":
            raise NotSupported(f"datum {datum_index}: model_input has a chunk of kind {kind}; only text is supported")
        raw = chunk.text.tokens
        if len(raw) % INT32.itemsize:
            raise InvalidRequest(f"datum {datum_index}: model_input has {len(raw)} bytes of tokens, not whole int32s")
        chunks.append(raw)
    return b"".join(chunks)


def _read_inputs(
    datums: Sequence[pb.DatumMessage], spec: LossSpec, tokens: _Column, *, is_trusted: bool
) -> list[_Column]:
    """The loss inputs by name, in the order of the loss's table. An input that no datum has is left out.

    is_trusted: the datums are a stored payload's, so that those that the server adds are there.
    """
    required = spec.required_inputs + spec.server_inputs if is_trusted else spec.required_inputs
    allowed = spec.client_inputs + spec.server_inputs if is_trusted else spec.client_inputs
    parts: dict[str, list[tuple[int, FlatTensor]]] = {name: [] for name in allowed}
    budget = MAX_DECOMPRESSED_BYTES
    for datum_index, datum in enumerate(datums):
        inputs = datum.loss_fn_inputs
        _check_input_names(datum_index, inputs, spec.name, required, allowed)
        (num_rows,) = tokens.shapes[datum_index]
        for name in allowed:
            if name not in inputs:
                continue
            try:
                part = flat_tensor(inputs[name], num_rows=num_rows, dtype=_dtype_of(name), budget=budget)
            except InvalidRequest as error:
                raise InvalidRequest(f"datum {datum_index}: loss_fn_inputs {name!r} {error}") from None
            budget -= len(part.raw)
            parts[name].append((datum_index, part))
        _check_columns(datum_index, {name: parts[name][-1][1].shape for name in allowed if name in inputs}, spec)
    return [_joined(name, _dtype_of(name), parts[name]) for name in allowed if parts[name]]


def _dtype_of(name: str) -> np.dtype[Any]:
    return INT64 if name == TARGET_TOKENS else FLOAT32


def _check_input_names(
    datum_index: int,
    inputs: Mapping[str, pb.TensorMessage],
    loss_name: str,
    required: Sequence[str],
    allowed: Sequence[str],
) -> None:
    """Refuses missing inputs, and unknown ones too: a mask that is silently ignored trains on the wrong tokens."""
    missing = [name for name in required if name not in inputs]
    if missing:
        raise InvalidRequest(f"datum {datum_index}: loss_fn_inputs lacks {', '.join(missing)}, which {loss_name} needs")
    unknown = sorted(name for name in inputs if name not in allowed)
    if unknown:
        raise InvalidRequest(
            f"datum {datum_index}: loss_fn_inputs {unknown[0][:80]!r} is not an input of {loss_name}; "
            f"its inputs are {', '.join(allowed)}"
        )


def _check_columns(datum_index: int, shapes: Mapping[str, tuple[int, ...]], spec: LossSpec) -> None:
    """Refuses [T, K] inputs where the loss takes [T] only, and inputs whose shape is not that of the targets."""
    target_shape = shapes[TARGET_TOKENS]
    for name, shape in shapes.items():
        if len(shape) == 2 and not spec.allows_target_columns:
            raise InvalidRequest(
                f"datum {datum_index}: loss_fn_inputs {name!r} has shape {list(shape)}; "
                f"{spec.name} takes one value per token"
            )
        if shape != target_shape:
            raise InvalidRequest(
                f"datum {datum_index}: loss_fn_inputs {name!r} has shape {list(shape)}, "
                f"but {TARGET_TOKENS!r} has {list(target_shape)}"
            )


def _check_clips(datum_index: int, inputs: Mapping[str, NDArray[Any]], loss: Loss) -> None:
    """Refuses per-token bounds of which the lower is above the upper one, be that a tensor or the setting."""
    if CLIP_LOW not in inputs and CLIP_HIGH not in inputs:
        return
    # Compared as the engine sees them: a setting becomes float32 like the tensors.
    low, high = (inputs.get(name, np.float32(loss.config[name])) for name in (CLIP_LOW, CLIP_HIGH))
    is_crossed = low > high
    if not is_crossed.any():
        return
    index = int(np.argmax(is_crossed))

    def bound(name: str) -> str:
        return f"{name}[{index}] = {inputs[name][index]}" if name in inputs else f"{name} = {loss.config[name]}"

    raise InvalidRequest(f"datum {datum_index}: {bound(CLIP_LOW)} is above {bound(CLIP_HIGH)}")
