"""A Python file with one loss, traced by torch.fx into the graph of a custom loss. Runs in a confined child.

The file is executed here, once, as its author wrote it: what keeps it harmless is confine.py, not this. What is refused
here is refused with a line and a reason, because people read it; what leaves is checked again by whoever takes it.
Source of the graph's form: tinker SDK 0.38, lib/public_interfaces/custom_loss.py.
"""

from __future__ import annotations

import builtins
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.fx
from torch.fx.node import _get_qualified_name

from treadle.domain.custom_loss import Argument, CustomLoss, DType, LossInput, Node, NodeOp, Ref
from treadle.domain.custom_loss_names import FUNCTIONS, METHODS, canonical_dtype, canonical_function
from treadle.domain.limits import MAX_CUSTOM_LOSS_NODES

# What tracebacks call the file.
FILE = "<loss>"
FUNCTION, INPUTS = "loss", "INPUTS"
_MAX_REASON_CHARS = 500
# Modules that a file may import: what a traced function can use, and what its annotations need.
_IMPORTABLE = frozenset(
    (
        "__future__",
        "collections.abc",
        "functools",
        "itertools",
        "math",
        "operator",
        "torch",
        "torch.nn",
        "torch.nn.functional",
        "torch.special",
        "typing",
    )
)
_WITHHELD = ("open", "input", "breakpoint", "eval", "exec", "compile", "exit", "quit")


class UntraceableError(Exception):
    """The file is no loss that can be traced; the message says where and why."""


def trace_file(source: str, name: str) -> CustomLoss:
    """The loss that a file defines, under the name it was submitted with. Raises UntraceableError, and nothing else."""
    try:
        return _traced(source, name)
    except UntraceableError:
        raise
    except BaseException as error:  # noqa: BLE001 (a stranger's code raises what it likes, SystemExit too)
        raise UntraceableError(_reason(error)) from None


def _traced(source: str, name: str) -> CustomLoss:
    module = types.ModuleType("loss_file")
    module.__dict__["__builtins__"] = _builtins()
    exec(compile(source, FILE, "exec", dont_inherit=True), module.__dict__)
    function = module.__dict__.get(FUNCTION)
    if not isinstance(function, types.FunctionType):
        raise UntraceableError(f"the file defines no function {FUNCTION!r}; see docs/named-losses.md for its form")
    inputs = _inputs(function, module.__dict__.get(INPUTS))
    graph = _Tracer().trace(function)
    return CustomLoss(name, inputs, tuple(_node(node) for node in graph.nodes))


def _builtins() -> dict[str, Any]:
    """Python's own, without those that no loss needs."""
    known = dict(vars(builtins))
    for name in _WITHHELD:
        known[name] = _withheld(name)
    known["print"] = _withheld("print")
    known["__import__"] = _import
    return known


def _withheld(name: str) -> Callable[..., NoReturn]:
    def refuse(*_args: object, **_kwargs: object) -> NoReturn:
        raise UntraceableError(f"{_line()}{name}() is not there for a loss file")

    return refuse


def _import(name: str, *args: Any, **kwargs: Any) -> Any:
    if name not in _IMPORTABLE:
        known = ", ".join(sorted(_IMPORTABLE))
        raise UntraceableError(f"{_line()}import of {name[:80]!r}; a loss file imports no more than {known}")
    return builtins.__import__(name, *args, **kwargs)


def _inputs(function: types.FunctionType, declared: object) -> tuple[LossInput, ...]:
    """What the loss takes, in the order of its parameters."""
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters]
    if any(
        parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        or parameter.default is not parameter.empty
        for parameter in parameters
    ):
        raise UntraceableError(f"{FUNCTION}() takes plain parameters without defaults only")
    if not names or names[0] != "logprobs":
        raise UntraceableError(f"the first parameter of {FUNCTION}() is logprobs")
    if not isinstance(declared, dict) or set(declared) != set(names):
        raise UntraceableError(
            f"{INPUTS} must be a dictionary with the rank of each parameter: "
            f"{INPUTS} = {{{', '.join(f'{name!r}: 1' for name in names)}}}"
        )
    for name in names:
        if type(declared[name]) is not int:
            raise UntraceableError(f"{INPUTS}[{name!r}] is not 0, 1 or 2")
    return tuple(LossInput(name, declared[name]) for name in names)


class _Tracer(torch.fx.Tracer):
    """torch.fx's, which refuses what no custom loss may do where it is done, so that the reason has a line."""

    def __init__(self) -> None:
        super().__init__()
        self._num_nodes = 0

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> torch.fx.Node:
        self._num_nodes += 1
        if self._num_nodes > MAX_CUSTOM_LOSS_NODES:
            raise UntraceableError(f"{_line()}the graph has over {MAX_CUSTOM_LOSS_NODES} nodes")
        lost = _lost_setting()
        if lost is not None:
            raise UntraceableError(f"{_line()}{lost}")
        match kind:
            case "call_function" if canonical_function(_name_of(target)) not in FUNCTIONS:
                raise UntraceableError(f"{_line()}{_name_of(target)[:80]} is not an operation of custom losses")
            case "call_method" if target not in METHODS:
                raise UntraceableError(f"{_line()}.{str(target)[:80]}() is not an operation of custom losses")
            case "call_module":
                raise UntraceableError(f"{_line()}a torch.nn module is called; use torch.nn.functional")
            case "get_attr":
                raise UntraceableError(
                    f"{_line()}a tensor that was made outside of the trace is used; make it from the inputs, with "
                    "torch.full_like or new_ones, or write a number"
                )
        return super().create_node(kind, target, args, kwargs, *rest, **named)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)


class _Proxy(torch.fx.Proxy):
    """A value of the graph. What is set on it would be lost."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("node", "tracer"):
            raise UntraceableError(f"{_line()}.{name[:80]} of a tensor is set, which a graph cannot hold")
        super().__setattr__(name, value)


def _lost_setting() -> str | None:
    """Why a graph would compute something else than the file says here: torch.fx records operations, and none of what
    surrounds them."""
    if not torch.is_grad_enabled():
        return "torch.no_grad() and torch.autograd.Function are not recorded in a graph; use .detach()"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "torch.autocast is not recorded in a graph; convert with .to(dtype)"
    if torch.get_default_dtype() is not torch.float32:
        return "torch.set_default_dtype is not recorded in a graph; convert with .to(dtype)"
    return None


def _name_of(function: Any) -> str:
    if function is getattr:
        return "getattr"
    return str(_get_qualified_name(function))


def _node(node: torch.fx.Node) -> Node:
    target = canonical_function(_name_of(node.target)) if node.op == "call_function" else str(node.target)
    return Node(
        op=NodeOp(node.op),
        name=node.name,
        target=target,
        args=tuple(_argument(node, argument) for argument in node.args),
        kwargs={key: _argument(node, argument) for key, argument in node.kwargs.items()},
    )


def _argument(node: torch.fx.Node, value: object) -> Argument:
    match value:
        case torch.fx.Node():
            return Ref(value.name)
        case torch.dtype():
            return DType(canonical_dtype(str(value).removeprefix("torch.")))
        case list():
            return [_argument(node, part) for part in value]
        case tuple():
            return tuple(_argument(node, part) for part in value)
        case slice():
            return slice(*(_argument(node, part) for part in (value.start, value.stop, value.step)))
        case Mapping():
            return {str(key): _argument(node, part) for key, part in value.items()}
        case int() if not isinstance(value, bool) and not -(2**63) <= value < 2**63:
            raise UntraceableError(f"{str(node.target)[:80]} takes an integer that does not fit into 64 bits")
        case None | bool() | int() | float() | str():
            return value
    if value is ...:
        return ...
    raise UntraceableError(f"{str(node.target)[:80]} takes a {type(value).__name__}, which a graph cannot hold")


def _line() -> str:
    """The place in the file that is being executed, for the start of a reason."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == FILE:
            return f"line {frame.f_lineno}: "
        frame = frame.f_back
    return ""


def _reason(error: BaseException) -> str:
    """An exception in words, with the last line of the file that led to it."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == FILE else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    place = "" if line is None else f"line {line}: "
    try:
        # The first sentence: torch appends traces of its own.
        text = str(error).partition("\n")[0]
    except BaseException:  # noqa: BLE001 (the exception is a stranger's as well)
        text = ""
    return f"{place}{type(error).__name__}: {text}"[:_MAX_REASON_CHARS]
