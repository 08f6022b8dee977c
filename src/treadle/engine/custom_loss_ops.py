"""The code behind the operations of custom losses, and what each costs, from shapes, before it runs.

domain/custom_loss_names.py says which operations there are; this table has exactly those. Arguments were written by a
stranger: an operation takes what torch takes and raises what torch raises, but where torch would end the process, take
memory by a number alone or compute with Python's unbounded integers, it is guarded here. All of it runs on the CPU.
Invariant: no operation writes into its arguments; the cost is an upper bound of what comes out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from treadle.domain.custom_loss_names import (
    FUNCTIONS,
    FUNCTIONS_AND_METHODS,
    GETATTR,
    MATH_FUNCTIONS,
    METHODS,
    NN_FUNCTIONS,
    OPERATORS,
    SPECIAL_FUNCTIONS,
    TENSOR_METHODS,
    TORCH_FUNCTIONS,
)

Args: TypeAlias = Sequence[Any]
Kwargs: TypeAlias = Mapping[str, Any]

# Most significant bits of a Python integer; wider ones are refused before they are made.
MAX_INT_BITS = 64
# Of an operation, in units of about a quarter of a nanosecond a number: sorts, and anything else.
_SORT_WORK = 32
_PLAIN_WORK = 4


class Cost(NamedTuple):
    """numbers: of all tensors that come out, at most. work: operations on single numbers."""

    numbers: int
    work: int


class Operation(NamedTuple):
    """run: what is called. cost: of a call with these arguments; it may raise what `run` would raise."""

    run: Callable[..., Any]
    cost: Callable[[Args, Kwargs], Cost]


def _tensors(values: Iterator[Any] | Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _given(args: Args, kwargs: Kwargs) -> list[Tensor]:
    """All tensors, `input` first however it was written."""
    named = [kwargs["input"]] if "input" in kwargs else []
    return list(_tensors([*named, *args, *(value for key, value in kwargs.items() if key != "input")]))


def _room(tensor: Tensor) -> int:
    """Its numbers; of an empty one what is left when the dimensions without length are gone, as in a sum over one."""
    return math.prod(max(size, 1) for size in tensor.shape)


def _cost(numbers: int, given: Sequence[Tensor], factor: int = 1) -> Cost:
    read = max((_room(tensor) for tensor in given), default=1)
    return Cost(numbers, factor * max(numbers, read))


def _broadcast(args: Args, kwargs: Kwargs) -> Cost:
    """Of everything that works number by number after broadcasting, and of what makes less of it."""
    given = _given(args, kwargs)
    shapes = [tensor.shape for tensor in given]
    numbers = 1
    for place in range(1, max((len(shape) for shape in shapes), default=0) + 1):
        numbers *= max(1, *(shape[-place] for shape in shapes if len(shape) >= place))
    return _cost(max(numbers, 1), given, _PLAIN_WORK)


def _total(args: Args, kwargs: Kwargs) -> Cost:
    """Of what puts its arguments together, or takes numbers out of one where another says."""
    given = _given(args, kwargs)
    return _cost(sum(map(_room, given)), given)


def _pairs(args: Args, kwargs: Kwargs) -> Cost:
    """Of values and indices."""
    cost = _broadcast(args, kwargs)
    return Cost(2 * cost.numbers, _SORT_WORK * cost.work)


def _parts(args: Args, kwargs: Kwargs) -> Cost:
    """Of what cuts a tensor into many: each of them is an object."""
    (tensor, *_) = _given(args, kwargs)
    most = max(tensor.shape, default=1)
    if not tensor.numel():
        # chunk cuts nothing into as many parts as it is asked for.
        most = max(1, most, *_integers([*args, *kwargs.values()]))
    return Cost(_room(tensor), _room(tensor) + 4_096 * most)


def _by_size(args: Args, kwargs: Kwargs) -> Cost:
    """Of what is made from sizes: the product of all the numbers given, as sizes or in sizes."""
    return _sized(_sizes([*args, *kwargs.values()]), None)


def _new_by_size(args: Args, kwargs: Kwargs) -> Cost:
    """The same of methods, whose tensor only says of what kind."""
    return _by_size(args[1:], kwargs)


def _expanded_as(args: Args, kwargs: Kwargs) -> Cost:
    return _cost(_room(_given(args, kwargs)[-1]), ())


def _expanded(args: Args, kwargs: Kwargs) -> Cost:
    """expand, broadcast_to: the sizes asked for, of which -1 keeps one of the tensor's."""
    tensor, rest = _first(args, kwargs)
    sizes = _sizes(rest)
    kept = [1] * len(sizes) + list(tensor.shape)
    places = zip(sizes, kept[len(kept) - len(sizes) :], strict=True)
    return _sized([here if size == -1 else size for size, here in places], None)


def _repeated(args: Args, kwargs: Kwargs) -> Cost:
    tensor, rest = _first(args, kwargs)
    return _sized(_sizes(rest), tensor, keeps=True)


def _sized(sizes: Sequence[int], tensor: Tensor | None, *, keeps: bool = False) -> Cost:
    numbers = _room(tensor) if tensor is not None and keeps else 1
    for size in sizes:
        numbers *= max(size, 1)
        if numbers.bit_length() > MAX_INT_BITS:
            break
    return Cost(numbers, numbers)


def _integers(values: Sequence[Any]) -> list[int]:
    found: list[int] = []
    for value in values:
        if isinstance(value, tuple | list):
            found += _integers(value)
        elif isinstance(value, int):
            found.append(int(value))
    return found


def _sizes(values: Sequence[Any]) -> list[int]:
    """The numbers that are sizes. torch would take tensors for them as well, whose numbers are not counted here."""
    if next(_tensors(values), None) is not None:
        raise TypeError("sizes are numbers here, not tensors; take them from a tensor's shape")
    return _integers(values)


def _first(args: Args, kwargs: Kwargs) -> tuple[Tensor, list[Any]]:
    """The tensor that an operation is called on, and the other arguments."""
    values = [*args, *(value for key, value in kwargs.items() if key != "input")]
    tensor = kwargs["input"] if "input" in kwargs else values.pop(0)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a tensor is due, not a {type(tensor).__name__}")
    return tensor, values


def _full(args: Args, kwargs: Kwargs) -> Cost:
    """torch.full(size, value): the value is no size."""
    size = kwargs["size"] if "size" in kwargs else args[0]
    return _sized(_sizes([size]), None)


def _new_full(args: Args, kwargs: Kwargs) -> Cost:
    size = kwargs["size"] if "size" in kwargs else args[1]
    return _sized(_sizes([size]), None)


def _arange(args: Args, kwargs: Kwargs) -> Cost:
    bounds = [*args[:3]]
    start, end = (kwargs.get("start", 0), bounds[0] if bounds else kwargs["end"])
    if len(bounds) > 1:
        start, end = bounds[0], bounds[1]
    step = bounds[2] if len(bounds) > 2 else kwargs.get("step", 1)
    count = (_number(kwargs.get("end", end)) - _number(start)) / _number(step)
    if not abs(count) < 2**MAX_INT_BITS:
        raise ValueError("the number of steps is not a number that fits into 64 bits")
    numbers = max(math.ceil(count), 0)
    return Cost(numbers, numbers)


def _linspace(args: Args, kwargs: Kwargs) -> Cost:
    steps = kwargs["steps"] if "steps" in kwargs else args[2]
    return _sized(_sizes([steps]), None)


def _one_hot(args: Args, kwargs: Kwargs) -> Cost:
    (tensor, *_) = _given(args, kwargs)
    num_classes = kwargs["num_classes"] if "num_classes" in kwargs else args[1]
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError("num_classes must be given, as a number above 0")
    return _sized([num_classes], tensor, keeps=True)


def _padded(args: Args, kwargs: Kwargs) -> Cost:
    (tensor, *_) = given = _given(args, kwargs)
    pads = _sizes([kwargs["pad"] if "pad" in kwargs else args[1]])
    numbers = 1
    for place, size in enumerate(reversed(tensor.shape)):
        numbers *= max(size + sum(max(pad, 0) for pad in pads[2 * place : 2 * place + 2]), 1)
    return _cost(numbers, given)


def _repeat_interleaved(args: Args, kwargs: Kwargs) -> Cost:
    tensor = kwargs["input"] if "input" in kwargs else args[0]
    repeats = kwargs["repeats"] if "repeats" in kwargs else args[1]
    if isinstance(repeats, Tensor):
        most = int(repeats.max()) if repeats.numel() else 0
    else:
        most = int(_number(repeats))
    return _sized([most], tensor, keeps=True)


def _windows(args: Args, kwargs: Kwargs) -> Cost:
    """Tensor.unfold: windows may overlap, so each number is there up to `size` times."""
    (tensor, *_) = _given(args, kwargs)
    size = kwargs["size"] if "size" in kwargs else args[2]
    return _sized(_sizes([size]), tensor, keeps=True)


def _product(args: Args, kwargs: Kwargs) -> Cost:
    """Of matrix products of any rank: the numbers that come out, times the length of the inner dimension."""
    a, b = _given(args, kwargs)
    inner = max(a.shape[-1] if a.ndim else 1, 1)
    columns = b.shape[-1] if b.ndim > 1 else 1
    rows = a.shape[-2] if a.ndim > 1 else 1
    batch = max(math.prod(a.shape[:-2]), 1) * max(math.prod(b.shape[:-2]), 1)
    return Cost(batch * rows * columns, batch * rows * columns * inner)


def _outer(args: Args, kwargs: Kwargs) -> Cost:
    """Of what has every pair of numbers: outer, inner of matrices, several quantiles."""
    numbers = math.prod(map(_room, _given(args, kwargs)))
    return Cost(numbers, _SORT_WORK * numbers)


def _selected(args: Args, kwargs: Kwargs) -> Cost:
    """index_select: the index's length replaces one dimension."""
    tensor, index = _given(args, kwargs)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    size = max(tensor.shape[dim] if tensor.ndim else 1, 1)
    numbers = _room(tensor) // size * _room(index)
    return _cost(numbers, (tensor, index))


def _differences(args: Args, kwargs: Kwargs) -> Cost:
    cost = _total(args, kwargs)
    n = kwargs.get("n", args[1] if len(args) > 1 else 1)
    rounds = max(min(int(_number(n)), cost.numbers), 1)
    return Cost(cost.numbers, cost.work * rounds)


def _item(args: Args, kwargs: Kwargs) -> Cost:
    """x[index]: tensors as indices replace the dimensions that they index by their own shape."""
    value, index = args
    if not isinstance(value, Tensor):
        return Cost(1, 1)
    indices = index if isinstance(index, tuple) else (index,)
    given = [part for part in indices if isinstance(part, Tensor)]
    if any(isinstance(part, list | tuple) for part in indices):
        raise TypeError("a list or a tuple in an index is none here; use slices, numbers, None, ... or tensors")
    if not given:
        return Cost(_room(value), _room(value))
    replaced, place = 1, 0
    for number, part in enumerate(indices):
        if part is Ellipsis:
            place = value.ndim - sum(_consumes(later) for later in indices[number + 1 :])
            continue
        width = _consumes(part)
        if isinstance(part, Tensor):
            replaced *= max(math.prod(value.shape[place : place + width]), 1)
        place += width
    chosen = _broadcast([part if part.dtype != torch.bool else part.reshape(-1) for part in given], {}).numbers
    return _cost(max(_room(value) // replaced, 1) * chosen, [value, *given])


def _consumes(part: object) -> int:
    """Dimensions that one index stands for."""
    if isinstance(part, Tensor) and part.dtype == torch.bool:
        return part.ndim
    return 0 if part is None or part is Ellipsis or isinstance(part, bool) else 1


def _scalar(args: Args, kwargs: Kwargs) -> Cost:
    return Cost(1, 1)


def _number(value: object) -> int | float:
    if isinstance(value, int | float):
        return value
    raise TypeError(f"a number is due, not a {type(value).__name__}")


def _numbers_or_tensors(run: Callable[..., Any]) -> Callable[..., Any]:
    """Python's operators mean other things for texts and lists."""

    def guarded(*operands: Any) -> Any:
        if any(isinstance(operand, Tensor) for operand in operands):
            return run(*operands)
        return run(*(_number(operand) for operand in operands))

    return guarded


def _numbers(run: Callable[..., Any]) -> Callable[..., Any]:
    """math's functions turn a tensor into a number, and lose its gradient."""

    def guarded(*operands: Any) -> Any:
        return run(*(_number(operand) for operand in operands))

    return guarded


def _added(a: Any, b: Any) -> Any:
    """a + b; also of two tuples, for shapes."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) + len(b) <= 16:
        return tuple(a) + tuple(b)
    return _numbers_or_tensors(operator.add)(a, b)


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() * abs(b) > MAX_INT_BITS:
        raise OverflowError(f"the result does not fit into {MAX_INT_BITS} bits")
    return _numbers_or_tensors(operator.pow)(a, b)


def _indexed(value: Any, index: Any) -> Any:
    if isinstance(value, tuple | list) and isinstance(index, int | slice):
        return value[index]
    if isinstance(value, Tensor):
        return value[index]
    raise TypeError(f"a {type(value).__name__} cannot be indexed so")


def _divided(*args: Any, **kwargs: Any) -> Tensor:
    """torch.div. Truncating the smallest 64-bit integer by -1 ends the process (SIGFPE, torch 2.x on x86)."""
    if kwargs.get("rounding_mode") is not None and not any(
        tensor.is_floating_point() for tensor in _given(args, kwargs)
    ):
        raise TypeError("rounding_mode takes floating-point tensors here; convert one with .float() or .double()")
    return torch.div(*args, **kwargs)


def _where(*args: Any, **kwargs: Any) -> Tensor:
    """torch.where(condition, a, b), or a.where(condition, b); with a condition alone it would give indices."""
    if len(args) + len(kwargs) != 3:
        raise TypeError("takes a condition and two values")
    chosen: Tensor = torch.where(*args, **kwargs)
    return chosen


def _viewed(tensor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """x.view(sizes). By a dtype it would show the bytes of numbers as others, and as truths that are neither."""
    if any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
        raise TypeError("takes sizes; convert to another dtype with .to(dtype)")
    shown: Tensor = Tensor.view(tensor, *args, **kwargs)
    return shown


def _where_method(tensor: Any, *args: Any, **kwargs: Any) -> Tensor:
    if len(args) + len(kwargs) != 2 or not isinstance(tensor, Tensor):
        raise TypeError("takes a condition and the other value")
    chosen: Tensor = Tensor.where(tensor, *args, **kwargs)
    return chosen


_ATTRIBUTES: Mapping[str, Callable[[Any], Any]] = {
    "shape": lambda value: value.shape,
    "dtype": lambda value: value.dtype,
    "ndim": lambda value: value.ndim,
    "device": lambda value: value.device,
    # Of more than two dimensions torch no longer defines it.
    "T": lambda value: value.t(),
    "mT": lambda value: value.mT,
    "values": lambda value: value[0],
    "indices": lambda value: value[1],
}


def _attribute(value: Any, name: str) -> Any:
    is_pair = name in ("values", "indices")
    if is_pair != isinstance(value, tuple) or (is_pair and len(value) != 2) or not isinstance(value, tuple | Tensor):
        raise TypeError(f"a {type(value).__name__} has no attribute {name!r} here")
    return _ATTRIBUTES[name](value)


_SPECIAL_COSTS: Mapping[str, Callable[[Args, Kwargs], Cost]] = {
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), _total),
    **dict.fromkeys(("gather", "take", "scatter", "scatter_add", "searchsorted", "bucketize"), _total),
    **dict.fromkeys(("sort", "topk", "kthvalue", "median", "max", "min", "cummax", "cummin"), _pairs),
    **dict.fromkeys(("argsort", "norm"), _pairs),
    **dict.fromkeys(("split", "chunk", "unbind"), _parts),
    **dict.fromkeys(("zeros", "ones"), _by_size),
    **dict.fromkeys(("new_zeros", "new_ones"), _new_by_size),
    **dict.fromkeys(("expand", "broadcast_to"), _expanded),
    "expand_as": _expanded_as,
    **dict.fromkeys(("repeat", "tile"), _repeated),
    **dict.fromkeys(("matmul", "mm", "mv", "dot"), _product),
    **dict.fromkeys(("outer", "inner", "quantile"), _outer),
    **dict.fromkeys(("size", "dim", "ndimension", "numel"), _scalar),
    "full": _full,
    "new_full": _new_full,
    "arange": _arange,
    "linspace": _linspace,
    "one_hot": _one_hot,
    "pad": _padded,
    "repeat_interleave": _repeat_interleaved,
    "unfold": _windows,
    "index_select": _selected,
    "diff": _differences,
}
_SPECIAL_RUNS: Mapping[str, Callable[..., Any]] = {"div": _divided, "divide": _divided, "where": _where}
_SPECIAL_OPERATORS: Mapping[str, Callable[..., Any]] = {"add": _added, "pow": _power, "getitem": _indexed}


def _operation(name: str, namespace: object) -> Operation:
    return Operation(_SPECIAL_RUNS.get(name) or getattr(namespace, name), _SPECIAL_COSTS.get(name, _broadcast))


def _operator(name: str) -> Operation:
    cost = {"matmul": _product, "getitem": _item}.get(name, _broadcast)
    return Operation(_SPECIAL_OPERATORS.get(name) or _numbers_or_tensors(getattr(operator, name)), cost)


FUNCTION_TABLE: Mapping[str, Operation] = {
    GETATTR: Operation(_attribute, _broadcast),
    **{f"torch.{name}": _operation(name, torch) for name in FUNCTIONS_AND_METHODS | TORCH_FUNCTIONS},
    **{f"torch.nn.functional.{name}": _operation(name, F) for name in NN_FUNCTIONS},
    **{f"torch.special.{name}": _operation(name, torch.special) for name in SPECIAL_FUNCTIONS},
    **{f"math.{name}": Operation(_numbers(getattr(math, name)), _scalar) for name in MATH_FUNCTIONS},
    **{f"operator.{name}": _operator(name) for name in OPERATORS},
}
METHOD_TABLE: Mapping[str, Operation] = {
    **{name: _operation(name, Tensor) for name in FUNCTIONS_AND_METHODS | TENSOR_METHODS},
    "where": Operation(_where_method, _broadcast),
    "view": Operation(_viewed, _broadcast),
}
assert FUNCTION_TABLE.keys() == FUNCTIONS, "admission and engine know different functions"
assert METHOD_TABLE.keys() == METHODS, "admission and engine know different methods"
