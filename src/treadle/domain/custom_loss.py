"""Custom losses as data: the graph a client traced, and what is refused in it before anything runs.

A graph is a list of nodes in the order of their execution, as torch.fx records it. It knows no JSON (wire/graphs.py
does) and no tensors. Names are looked up, never evaluated: one that custom_loss_names.py does not have is an error that
says it.
Invariant: a CustomLoss that passed `check_custom_loss` calls nothing but known operations, refers backwards only, and
its text arguments are words of that file. What its operations cost is known only with shapes, so that is
bounded where it runs.
Sources: tinker SDK 0.38, lib/public_interfaces/custom_loss.py and types/custom_loss_graph.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import EllipsisType
from typing import TypeAlias

from treadle.domain.custom_loss_names import (
    ATTRIBUTES,
    BOUND_KEYWORDS,
    DTYPES,
    FREE_KEYWORDS,
    FUNCTIONS,
    GETATTR,
    MAX_POSITIONAL,
    METHODS,
    canonical_function,
)
from treadle.domain.limits import (
    MAX_CUSTOM_LOSS_ARGUMENTS,
    MAX_CUSTOM_LOSS_DEPTH,
    MAX_CUSTOM_LOSS_INPUTS,
    MAX_CUSTOM_LOSS_METRICS,
    MAX_CUSTOM_LOSS_NODES,
)
from treadle.errors import InvalidRequest

CUSTOM = "custom"
LOGPROBS = "logprobs"
MAX_RANK = 2

_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_MAX_INT = 2**63


class NodeOp(StrEnum):
    """What a node does."""

    PLACEHOLDER = "placeholder"
    CALL_FUNCTION = "call_function"
    CALL_METHOD = "call_method"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an earlier node."""

    name: str


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype by its name in torch."""

    name: str


Argument: TypeAlias = (
    "bool | int | float | str | Ref | DType | EllipsisType | slice | tuple[Argument, ...] | list[Argument] "
    "| dict[str, Argument] | None"
)


@dataclass(frozen=True, slots=True)
class Node:
    """One step. target: the input's name, the function's qualified name, or the method's name."""

    op: NodeOp
    name: str
    target: str
    args: tuple[Argument, ...] = ()
    kwargs: Mapping[str, Argument] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LossInput:
    """`logprobs`, or a key of loss_fn_inputs. rank: 0 is a scalar, 1 is [T], 2 is [T, K]."""

    name: str
    rank: int


@dataclass(frozen=True, slots=True)
class CustomLoss:
    """A loss of one datum: its inputs in order, `logprobs` first, and its nodes."""

    name: str
    inputs: tuple[LossInput, ...]
    nodes: tuple[Node, ...]

    @property
    def logprobs_rank(self) -> int:
        """The rank of target_tokens in every datum."""
        return self.inputs[0].rank

    @property
    def datum_inputs(self) -> tuple[LossInput, ...]:
        """What it reads of a datum's loss_fn_inputs."""
        return self.inputs[1:]

    @property
    def output(self) -> tuple[Ref, Mapping[str, Ref]]:
        """The loss and the metrics. Only of a checked loss."""
        pair = self.nodes[-1].args[0]
        assert isinstance(pair, tuple | list)
        loss, metrics = pair
        assert isinstance(loss, Ref)
        assert isinstance(metrics, dict)
        return loss, {name: value for name, value in metrics.items() if isinstance(value, Ref)}


def check_custom_loss(loss: CustomLoss) -> None:
    """Raise InvalidRequest, naming the operation, for anything that this server does not run."""
    _check_inputs(loss)
    if len(loss.nodes) > MAX_CUSTOM_LOSS_NODES:
        raise InvalidRequest(
            f"the graph has {len(loss.nodes)} nodes; a custom loss has at most {MAX_CUSTOM_LOSS_NODES}"
        )
    if not loss.nodes or loss.nodes[-1].op is not NodeOp.OUTPUT:
        raise InvalidRequest("the graph does not end with an output node")
    known: set[str] = set()
    placeholders: list[str] = []
    for node in loss.nodes:
        if not _NODE_NAME.fullmatch(node.name) or node.name in known:
            raise InvalidRequest(f"node name {node.name[:80]!r} is used twice or is not a name")
        _check_arguments(node, known)
        _check_node(node, placeholders)
        known.add(node.name)
    if sum(node.op is NodeOp.OUTPUT for node in loss.nodes) != 1:
        raise InvalidRequest("the graph has more than one output node")
    names = [given.name for given in loss.inputs]
    if placeholders != names:
        raise InvalidRequest(f"the graph's placeholders are {placeholders[:20]}, but its inputs are {names}")


def _check_inputs(loss: CustomLoss) -> None:
    if not 1 <= len(loss.inputs) <= MAX_CUSTOM_LOSS_INPUTS or loss.inputs[0].name != LOGPROBS:
        raise InvalidRequest(f"inputs must be {LOGPROBS!r} and up to {MAX_CUSTOM_LOSS_INPUTS - 1} others behind it")
    for given in loss.inputs:
        if not _INPUT_NAME.fullmatch(given.name):
            raise InvalidRequest(f"input name {given.name[:80]!r} is not a lower-case name of up to 64 characters")
        if not (1 if given.name == LOGPROBS else 0) <= given.rank <= MAX_RANK:
            raise InvalidRequest(f"input {given.name} has rank {given.rank}; {LOGPROBS} has 1 or 2, others 0 to 2")
    if len({given.name for given in loss.inputs}) != len(loss.inputs):
        raise InvalidRequest("two inputs have the same name")


def _check_node(node: Node, placeholders: list[str]) -> None:
    match node.op:
        case NodeOp.PLACEHOLDER:
            if node.args or node.kwargs:
                raise InvalidRequest(f"placeholder {node.target[:80]!r} has a default; every input is required")
            placeholders.append(node.target)
        case NodeOp.CALL_FUNCTION:
            _check_call(node, canonical_function(node.target), FUNCTIONS)
        case NodeOp.CALL_METHOD:
            _check_call(node, node.target, METHODS)
            if not node.args or not isinstance(node.args[0], Ref):
                raise _refused(node, "is a method, so its first argument is the value of a node")
        case NodeOp.OUTPUT:
            _check_output(node)


def _check_call(node: Node, target: str, allowed: frozenset[str]) -> None:
    if target not in allowed:
        raise _refused(node, "is not an operation of custom losses; docs/custom-losses.md lists them")
    if len(node.args) > MAX_POSITIONAL.get(target, MAX_CUSTOM_LOSS_ARGUMENTS):
        raise _refused(node, f"takes at most {MAX_POSITIONAL.get(target)} positional arguments here")
    if target == GETATTR:
        match node.args:
            case (Ref(), str() as name) if name in ATTRIBUTES and not node.kwargs:
                return
        raise _refused(node, f"of {_shown(node.args[1:])} is not allowed; readable are {', '.join(sorted(ATTRIBUTES))}")
    is_norm = target in ("torch.norm", "norm")
    for argument in node.args:
        if any(isinstance(part, str) and not (is_norm and part == "fro") for part, _ in _parts(argument)):
            raise _refused(node, f"does not take the text {_shown(argument)} here")
    for keyword, value in node.kwargs.items():
        _check_keyword(node, keyword, value, is_norm=is_norm)


def _check_keyword(node: Node, keyword: str, value: Argument, *, is_norm: bool) -> None:
    words = BOUND_KEYWORDS.get(keyword)
    if words is not None:
        # Identity, because 0 == False.
        if not any(value is allowed or (isinstance(value, str) and value == allowed) for allowed in words):
            raise _refused(node, f"does not take {keyword}={_shown(value)} here")
        return
    if keyword == "device":
        if not (value is None or isinstance(value, Ref)):
            raise _refused(node, "does not take a device by name; the server decides where it computes")
        return
    if keyword == "p" and (not isinstance(value, str) or (is_norm and value == "fro")):
        return
    if keyword not in FREE_KEYWORDS:
        raise _refused(node, f"does not take the keyword {keyword[:40]!r} here")
    if any(isinstance(part, str) for part, _ in _parts(value)):
        raise _refused(node, f"does not take {keyword}={_shown(value)}")


def _check_output(node: Node) -> None:
    if node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], tuple | list) or len(node.args[0]) != 2:
        raise InvalidRequest("the output must be a loss and its metrics")
    loss, metrics = node.args[0]
    if not isinstance(loss, Ref) or not isinstance(metrics, dict):
        raise InvalidRequest("the output must be the value of a node, and a dictionary of metrics")
    if len(metrics) > MAX_CUSTOM_LOSS_METRICS:
        raise InvalidRequest(f"the output has {len(metrics)} metrics; allowed are {MAX_CUSTOM_LOSS_METRICS}")
    for name, value in metrics.items():
        if not _METRIC_NAME.fullmatch(name):
            raise InvalidRequest(f"metric {name[:100]!r} is not custom/NAME:sum or custom/NAME:mean in lower case")
        if not isinstance(value, Ref):
            raise InvalidRequest(f"metric {name} is not the value of a node")


def _check_arguments(node: Node, known: set[str]) -> None:
    """References point backwards; nesting, number and size of what is written out are bounded."""
    is_output = node.op is NodeOp.OUTPUT
    num_parts = 0
    for argument in (*node.args, *node.kwargs.values()):
        for part, depth in _parts(argument):
            num_parts += 1
            if num_parts > MAX_CUSTOM_LOSS_ARGUMENTS * (4 if is_output else 1):
                raise _refused(node, f"has over {MAX_CUSTOM_LOSS_ARGUMENTS} arguments")
            if depth > MAX_CUSTOM_LOSS_DEPTH:
                raise _refused(node, f"has arguments nested over {MAX_CUSTOM_LOSS_DEPTH} deep")
            _check_part(node, part, known, is_output=is_output)


def _check_part(node: Node, part: Argument, known: set[str], *, is_output: bool) -> None:
    if isinstance(part, Ref) and part.name not in known:
        raise _refused(node, f"refers to {part.name[:80]!r}, which is not a node before it")
    if isinstance(part, DType) and part.name not in DTYPES:
        raise _refused(node, f"names the dtype {part.name[:40]!r}; known are {', '.join(sorted(DTYPES))}")
    if isinstance(part, int) and not -_MAX_INT <= part < _MAX_INT:
        raise _refused(node, "has an integer that does not fit into 64 bits")
    if isinstance(part, dict) and not is_output:
        raise _refused(node, "has a dictionary as an argument")


def _parts(argument: Argument, depth: int = 0) -> Iterator[tuple[Argument, int]]:
    """The argument and everything inside it, with its depth; it stops one level below what is allowed."""
    yield argument, depth
    if depth > MAX_CUSTOM_LOSS_DEPTH:
        return
    inner: list[Argument] = []
    if isinstance(argument, tuple | list):
        inner = list(argument)
    elif isinstance(argument, dict):
        inner = list(argument.values())
    elif isinstance(argument, slice):
        inner = [argument.start, argument.stop, argument.step]
    for part in inner:
        yield from _parts(part, depth + 1)


def _refused(node: Node, why: str) -> InvalidRequest:
    return InvalidRequest(f"{node.target[:80]} (node {node.name[:80]!r}) {why}")


def _shown(argument: object) -> str:
    return repr(argument)[:80]
