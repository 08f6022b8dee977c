"""Custom losses as JSON: what create_custom_loss sends, and what is stored of it, to CustomLoss and back.

It reads the shapes of JSON alone; what a graph may call is decided in domain/custom_loss.py, which checks everything
that leaves here. Knows no sessions and no tensors.
Invariant: `read_custom_loss(write_custom_loss(loss)) == loss`, and both sides of it were checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import AfterValidator, StringConstraints

from treadle.domain.custom_loss import (
    Argument,
    CustomLoss,
    DType,
    LossInput,
    Node,
    NodeOp,
    Ref,
    check_custom_loss,
)
from treadle.domain.custom_loss_names import canonical_dtype
from treadle.domain.limits import (
    MAX_CUSTOM_LOSS_BYTES,
    MAX_CUSTOM_LOSS_DEPTH,
    MAX_CUSTOM_LOSS_INPUTS,
    MAX_CUSTOM_LOSS_NODES,
)
from treadle.domain.outcome import EncodedResult
from treadle.errors import InvalidRequest
from treadle.wire.bodies import Body, Counter, SessionIdField, _without_nul
from treadle.wire.results import JSON

FORMAT = 1
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class CreateCustomLossBody(Body):
    """create_custom_loss. What is inside `inputs` and `graph` is read by `custom_loss_of`."""

    head_fields: ClassVar[frozenset[str]] = frozenset({"session_id", "custom_loss_seq_id"})

    session_id: SessionIdField
    custom_loss_seq_id: Counter
    name: Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_without_nul)]
    inputs: list[dict[str, Any]]
    graph: dict[str, Any]


class CustomLossHead(Body):
    """Whose loss it is, whatever the rest of the body holds."""

    head_fields: ClassVar[frozenset[str]] = frozenset({"session_id", "custom_loss_seq_id"})

    session_id: SessionIdField
    custom_loss_seq_id: Counter


def custom_loss_of(body: CreateCustomLossBody) -> CustomLoss:
    """The loss, checked. Raises InvalidRequest, naming the operation or the field."""
    loss = _custom_loss({"name": body.name, "inputs": body.inputs, "graph": body.graph})
    size = len(write_custom_loss(loss))
    if size > MAX_CUSTOM_LOSS_BYTES:
        raise InvalidRequest(f"custom loss {loss.name[:80]!r} has {size} bytes; allowed are {MAX_CUSTOM_LOSS_BYTES}")
    return loss


def read_custom_loss(definition: bytes) -> CustomLoss:
    """The loss of a stored definition, checked again: it comes with every pass. Raises InvalidRequest."""
    try:
        fields = orjson.loads(definition)
    except orjson.JSONDecodeError:
        raise InvalidRequest("the definition of the custom loss is not JSON") from None
    return _custom_loss(_object(fields, "the definition"))


def loss_of_fields(name: str, fields: Mapping[str, Any]) -> CustomLoss:
    """The loss that an object of `inputs` and `graph` is, under this name, checked. Raises InvalidRequest."""
    return _custom_loss({"name": name, "inputs": fields.get("inputs"), "graph": fields.get("graph")})


def read_inputs(definition: bytes) -> tuple[LossInput, ...]:
    """What the loss of a stored definition declares, without reading its graph."""
    return tuple(_input(given) for given in orjson.loads(definition)["inputs"])


def write_custom_loss(loss: CustomLoss) -> bytes:
    """The definition as it is stored: JSON with sorted keys, the same bytes for the same loss."""
    fields = {
        "name": loss.name,
        "inputs": [{"name": given.name, "rank": given.rank} for given in loss.inputs],
        "graph": {
            "format": FORMAT,
            "nodes": [
                {
                    "op": node.op.value,
                    "name": node.name,
                    "target": node.target,
                    "args": [_written(argument) for argument in node.args],
                    "kwargs": {key: _written(argument) for key, argument in node.kwargs.items()},
                }
                for node in loss.nodes
            ],
        },
    }
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def custom_loss_result(loss_id: str) -> EncodedResult:
    """The loss can be used under this id."""
    return EncodedResult(JSON, orjson.dumps({"loss_id": loss_id, "type": "create_custom_loss"}))


def _custom_loss(fields: Mapping[str, Any]) -> CustomLoss:
    name = _text(fields.get("name"), "name")
    try:
        inputs, graph = fields.get("inputs"), _object(fields.get("graph"), "graph")
        if graph.get("format", FORMAT) != FORMAT or isinstance(graph.get("format"), bool):
            raise InvalidRequest(f"graph format {graph.get('format')!s:.40} is not known; known is {FORMAT}")
        nodes = graph.get("nodes")
        if not isinstance(nodes, list) or len(nodes) > MAX_CUSTOM_LOSS_NODES:
            count = len(nodes) if isinstance(nodes, list) else "no list of"
            raise InvalidRequest(f"the graph has {count} nodes; allowed are up to {MAX_CUSTOM_LOSS_NODES}")
        if not isinstance(inputs, list) or len(inputs) > MAX_CUSTOM_LOSS_INPUTS:
            raise InvalidRequest(f"inputs must be a list of up to {MAX_CUSTOM_LOSS_INPUTS}")
        loss = CustomLoss(name, tuple(_input(given) for given in inputs), tuple(_node(node) for node in nodes))
        check_custom_loss(loss)
    except InvalidRequest as error:
        raise InvalidRequest(f"custom loss {name[:80]!r}: {error.message}") from None
    return loss


def _input(value: object) -> LossInput:
    fields = _object(value, "an input")
    rank = fields.get("rank")
    if type(rank) is not int:
        raise InvalidRequest(f"rank {rank!s:.40} of an input is not 0, 1 or 2")
    return LossInput(_text(fields.get("name"), "the name of an input"), rank)


def _node(value: object) -> Node:
    fields = _object(value, "a node")
    target = _text(fields.get("target"), "the target of a node")
    op = _text(fields.get("op"), "the op of a node")
    try:
        node_op = NodeOp(op)
    except ValueError:
        known = ", ".join(known.value for known in NodeOp)
        raise InvalidRequest(f"{target[:80]}: node op {op[:40]!r} is not allowed; allowed are {known}") from None
    args, kwargs = fields.get("args", []), fields.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise InvalidRequest(f"{target[:80]}: args must be a list and kwargs an object")
    try:
        return Node(
            op=node_op,
            name=_text(fields.get("name"), "the name of a node"),
            target=target,
            args=tuple(_argument(argument) for argument in args),
            kwargs={key: _argument(argument) for key, argument in kwargs.items()},
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"{target[:80]}: {error.message}") from None


def _argument(value: object, depth: int = 0) -> Argument:
    """Raises InvalidRequest for an encoding that is not known, and beyond a depth that no check would allow."""
    if depth > MAX_CUSTOM_LOSS_DEPTH + 1:
        raise InvalidRequest(f"arguments are nested over {MAX_CUSTOM_LOSS_DEPTH} deep")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_argument(part, depth + 1) for part in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise InvalidRequest("an argument is an object of other than one key")
    ((kind, content),) = value.items()
    read = _ENCODINGS.get(kind)
    if read is None:
        raise InvalidRequest(f"arguments of kind {kind[:40]!r} are not allowed")
    return read(content, depth)


def _ref(content: object, depth: int) -> Argument:
    return Ref(_text(content, "a ref"))


def _tuple(content: object, depth: int) -> Argument:
    if not isinstance(content, list):
        raise InvalidRequest("a tuple's content is not a list")
    return tuple(_argument(part, depth + 1) for part in content)


def _dict(content: object, depth: int) -> Argument:
    return {key: _argument(part, depth + 1) for key, part in _object(content, "a dict").items()}


def _slice(content: object, depth: int) -> Argument:
    if not isinstance(content, list) or len(content) != 3:
        raise InvalidRequest("a slice has start, stop and step")
    start, stop, step = (_argument(part, depth + 1) for part in content)
    return slice(start, stop, step)


def _ellipsis(content: object, depth: int) -> Argument:
    if content is not True:
        raise InvalidRequest("an ellipsis is true")
    return ...


def _float(content: object, depth: int) -> Argument:
    value = _FLOATS.get(content) if isinstance(content, str) else None
    if value is None:
        raise InvalidRequest(f"a float written as text is one of {', '.join(_FLOATS)}")
    return value


def _dtype(content: object, depth: int) -> Argument:
    return DType(canonical_dtype(_text(content, "a dtype")))


_ENCODINGS: Mapping[str, Callable[[object, int], Argument]] = {
    "ref": _ref,
    "tuple": _tuple,
    "dict": _dict,
    "slice": _slice,
    "ellipsis": _ellipsis,
    "float": _float,
    "dtype": _dtype,
}


def _written(argument: Argument) -> object:
    match argument:
        case Ref(name):
            return {"ref": name}
        case DType(name):
            return {"dtype": name}
        case float() if not math.isfinite(argument):
            return {"float": str(argument)}
        case list():
            return [_written(part) for part in argument]
        case tuple():
            return {"tuple": [_written(part) for part in argument]}
        case dict():
            return {"dict": {key: _written(part) for key, part in argument.items()}}
        case slice():
            return {"slice": [_written(part) for part in (argument.start, argument.stop, argument.step)]}
    return {"ellipsis": True} if argument is ... else argument


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} is not an object")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{what} is not a text")
    return value
