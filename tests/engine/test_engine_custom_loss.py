"""Custom losses in the engine: equal to what the SDK would compute, bounded, and harmless."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from custom_loss_builders import body, checked, custom_datum, node, ref, terms_of, total, traced

from treadle.domain.custom_loss_names import FUNCTIONS, MAX_POSITIONAL, METHODS
from treadle.engine.custom_loss_ops import FUNCTION_TABLE, METHOD_TABLE, Operation
from treadle.errors import InvalidRequest, NonFiniteResult

# What torch says of shapes that are legal and odd is not the subject here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTH = 12
RANKS = {"logprobs": 1, "q": 1}


def ppo(x: torch.Tensor, q: torch.Tensor) -> Any:
    ratio = torch.exp(x - q)
    return -torch.minimum(ratio * q, torch.clamp(ratio, 0.8, 1.2) * q)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "ppo": ppo,
    "length": lambda x, q: x / math.log(x.shape[0] + 1) + x * math.sqrt(x.numel()),
    "arithmetic": lambda x, q: (-x) ** 2 + abs(x) - x / q + q // 2 + 1 / q + 2**x - q % 0.3,
    "masks": lambda x, q: torch.where((q > 0.3) & ~(q >= 0.8) | (q == 0.0), x, 0.0) + x.masked_fill(q < 0.5, -1.0),
    "slices": lambda x, q: x[None, ..., 1:-1:2] * q[1:-1:2],
    "chosen": lambda x, q: x[q > 0.5].sum() + x[(q * 10).long() % 12].sum() + x.gather(0, (q * 10).long()),
    "pairs": lambda x, q: F.logsigmoid(x[:, None] - x[None, :]) * (q[:, None] > q[None, :]),
    "best": lambda x, q: torch.max(x, dim=0).values + x.topk(3).values.sum() + torch.sort(x * q)[0],
    "softmax": lambda x, q: F.log_softmax(x, dim=-1) * q.softmax(0) + torch.logsumexp(x, dim=-1),
    "made": lambda x, q: torch.arange(x.shape[0], device=x.device) * x + torch.full((x.size(0),), 0.5) * x,
    "joined": lambda x, q: torch.stack([x, q]).sum(0) + torch.cat((x, q)).mean() + x.cumsum(0).flip(0),
    "dtypes": lambda x, q: x.double() * q.to(torch.float64) + q.to(x.dtype) + x.detach().float(),
    "divergence": lambda x, q: F.kl_div(x, q, reduction="none") + F.huber_loss(x, q, reduction="none", delta=0.1),
    "shapes": lambda x, q: x.view(x.shape[0], 1).expand(-1, 3).mean(1) + x.reshape(2, -1).repeat(1, 2).sum() + x @ q,
    "special": lambda x, q: torch.special.expit(x) + torch.special.xlogy(x, q) + F.softplus(x) + x.var() + x.std(),
    "padded": lambda x, q: F.pad(x, (1, 0))[:-1] * q - F.normalize(x, dim=0) + F.cosine_similarity(x, q, dim=0),
}


def inputs_of(seed: int, length: int = LENGTH) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    logprobs = torch.from_numpy(rng.uniform(0.05, 0.95, length).astype(np.float32))
    return logprobs, rng.uniform(0.05, 0.95, length).astype(np.float32)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_are_those_of_the_client(name: str) -> None:
    def loss(logprobs: torch.Tensor, q: torch.Tensor) -> Any:
        value = LOSSES[name](logprobs, q).sum()
        return value, {"custom/value:mean": value, "custom/q:sum": q.sum()}

    handle, ours = traced(loss, {"logprobs": 1, "q": 1})
    logprobs, q = inputs_of(1)
    terms = terms_of(ours, [custom_datum(LENGTH, q=q)], logprobs)
    theirs = logprobs.clone().requires_grad_()
    value, metrics = handle.graph(theirs, torch.from_numpy(q.copy()))
    value.backward()
    assert torch.equal(terms.grad[:, 0], theirs.grad)
    assert terms.loss.sum() == value.float()
    assert {key: float(number) for key, number in terms.metrics.items()} == pytest.approx(
        {key: float(number) for key, number in metrics.items()}
    )


def test_ranks_0_and_2_integers_and_datums_of_different_widths() -> None:
    def loss(logprobs: torch.Tensor, scale: torch.Tensor, kind: torch.Tensor) -> Any:
        return -(logprobs * scale * (kind == 2)).sum(), {"custom/scale:sum": scale}

    handle, ours = traced(loss, {"logprobs": 2, "scale": 0, "kind": 1})
    datums = [
        custom_datum(
            5,
            columns=columns,
            scale=np.array(0.5 + columns, np.float32),
            kind=np.array([1, 2, 2, 0, 2]),
        )
        for columns in (5, 5)
    ]
    logprobs = torch.randn(10, 7)
    terms = terms_of(ours, datums, logprobs)
    for index, datum in enumerate(datums):
        theirs = logprobs[5 * index : 5 * index + 5, :5].clone().requires_grad_()
        value, _ = handle.graph(theirs, torch.tensor(5.5), torch.from_numpy(datum.inputs["kind"].copy()))
        value.backward()
        assert torch.equal(terms.grad[5 * index : 5 * index + 5, :5], theirs.grad)
        assert terms.loss[5 * index, 0] == value
    assert not terms.grad[:, 5:].any()
    assert terms.metrics["custom/scale:sum"] == 11


def test_a_datum_has_the_same_bits_alone_and_in_company() -> None:
    _, ours = traced(lambda logprobs, q: (ppo(logprobs, q).mean() + logprobs.logsumexp(0), {}), RANKS)
    lengths = [1, 7, 300, 2, 33]
    parts = [inputs_of(index, length) for index, length in enumerate(lengths)]
    datums = [custom_datum(length, q=q) for length, (_, q) in zip(lengths, parts, strict=True)]
    together = terms_of(ours, datums, torch.cat([logprobs for logprobs, _ in parts]))
    starts = np.cumsum([0, *lengths])
    for index, (datum, (logprobs, _)) in enumerate(zip(datums, parts, strict=True)):
        alone = terms_of(ours, [datum], logprobs)
        rows = slice(starts[index], starts[index + 1])
        assert torch.equal(alone.grad, together.grad[rows])
        assert torch.equal(alone.loss, together.loss[rows])


def test_forward_only_asks_for_no_gradient() -> None:
    _, ours = traced(lambda logprobs: (logprobs.detach().sum(), {}), {"logprobs": 1})
    logprobs, _ = inputs_of(1)
    datums = [custom_datum(LENGTH)]
    assert terms_of(ours, datums, logprobs, wants_grad=False).loss.sum() == logprobs.sum()
    with pytest.raises(InvalidRequest, match=r"datum 0: custom loss '<lambda>': the loss does not depend on logprobs"):
        terms_of(ours, datums, logprobs)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda logprobs: ((logprobs - logprobs).log().sum(), {}), "the gradient is not finite|the loss is -inf"),
        (lambda logprobs: ((logprobs - logprobs.detach()).sqrt().sum(), {}), "the gradient is not finite"),
        (
            lambda logprobs: (logprobs.sum() + logprobs.detach().double().sum() * 1e300, {}),
            "the loss is .* not a finite float32",
        ),
        (
            lambda logprobs: (logprobs.sum(), {"custom/empty:mean": logprobs[:0].mean()}),
            "metric custom/empty:mean is nan",
        ),
    ],
)
def test_what_is_not_finite_fails(function: Callable[[torch.Tensor], Any], why: str) -> None:
    _, ours = traced(function, {"logprobs": 1})
    with pytest.raises(NonFiniteResult, match=why):
        terms_of(ours, [custom_datum(LENGTH)], inputs_of(1)[0])


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda logprobs: (logprobs, {}), r"must return a scalar loss of floats, got a tensor of shape \[12\]"),
        (lambda logprobs: (logprobs.sum().long(), {}), "must return a scalar loss of floats"),
        (lambda logprobs: (logprobs.sum(), {"custom/all:sum": logprobs}), "metric custom/all:sum must be a scalar"),
        (lambda logprobs: (logprobs.view(5).sum(), {}), r"view \(node 'view'\): shape '\[5\]' is invalid"),
        (lambda logprobs: ((logprobs + logprobs[:5]).sum(), {}), r"operator.add \(node 'add'\): The size of tensor a"),
        (lambda logprobs: (logprobs[logprobs.long() + 99].sum(), {}), r"operator.getitem .* out of bounds"),
    ],
)
def test_what_does_not_fit_names_the_datum_and_the_operation(function: Callable[[torch.Tensor], Any], why: str) -> None:
    _, ours = traced(function, {"logprobs": 1})
    with pytest.raises(InvalidRequest, match=why) as caught:
        terms_of(ours, [custom_datum(LENGTH)], inputs_of(1)[0])
    assert caught.value.message.startswith("datum 0: custom loss '<lambda>': ")


X = ref("logprobs")


def call(target: str, *args: object, **kwargs: object) -> dict[str, object]:
    return node("call_function", "bad", target, *args, **kwargs)


def method(target: str, *args: object, **kwargs: object) -> dict[str, object]:
    return node("call_method", "bad", target, *args, **kwargs)


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def doublings(count: int) -> list[dict[str, object]]:
    """Each node twice as long as the one before it."""
    nodes = [node("call_function", "d0", "torch.cat", [X, X])]
    nodes += [node("call_function", f"d{n}", "torch.cat", [ref(f"d{n - 1}")] * 2) for n in range(1, count)]
    return [*nodes, node("call_function", "bad", "torch.cat", [ref(f"d{count - 1}")] * 2)]


def chain(count: int, target: str = "exp") -> list[dict[str, object]]:
    nodes = [node("call_method", "c0", target, X)]
    nodes += [node("call_method", f"c{n}", target, ref(f"c{n - 1}")) for n in range(1, count)]
    return [*nodes, node("call_method", "bad", target, ref(f"c{count - 1}"))]


SIZE = node("call_method", "n", "numel", X)
POWERS = [
    node("call_function", "p0", "operator.mul", ref("n"), 2**40),
    node("call_function", "p1", "operator.mul", ref("p0"), ref("p0")),
    node("call_function", "bad", "operator.mul", ref("p1"), ref("p1")),
]
PAIRS = node("call_function", "big", "torch.full", {"tuple": [2000, 2000]}, 0.5)

HOSTILE: Mapping[str, tuple[Sequence[dict[str, object]], str]] = {
    "unknown function": ([call("torch.load", "/etc/passwd")], "torch.load"),
    "eval": ([call("builtins.eval", "1+1")], "builtins.eval"),
    "exec": ([call("exec", "1+1")], "exec"),
    "import": ([call("builtins.__import__", "os")], "builtins.__import__"),
    "open": ([call("builtins.open", "/etc/passwd")], "builtins.open"),
    "os.system": ([call("os.system", "true")], "os.system"),
    "an alias of an alias": ([call("builtins.builtins.eval", "1")], "builtins.builtins.eval"),
    "a dotted way out": ([call("torch.serialization.os.system", "true")], "torch.serialization.os.system"),
    "torch.ops": ([call("torch.ops.aten.resize_", X, [1])], "torch.ops.aten.resize_"),
    "from_file": ([call("torch.from_file", "/etc/passwd")], "torch.from_file"),
    "getattr of __class__": ([call("getattr", X, "__class__")], "getattr"),
    "getattr of data": ([call("getattr", X, "data")], "getattr"),
    "getattr of grad_fn": ([call("getattr", X, "grad_fn")], "getattr"),
    "getattr with a computed name": ([call("getattr", X, X)], "getattr"),
    "a private method": ([method("__reduce_ex__", X, 2)], "__reduce_ex__"),
    "as_strided": ([method("as_strided", X, [100], [1])], "as_strided"),
    "data_ptr": ([method("data_ptr", X)], "data_ptr"),
    "item": ([method("item", X)], "item"),
    "backward": ([method("backward", X)], "backward"),
    "uninitialised memory": ([call("torch.empty_like", X)], "torch.empty_like"),
    "randomness": ([call("torch.rand_like", X)], "torch.rand_like"),
    "dropout": ([call("torch.nn.functional.dropout", X)], "torch.nn.functional.dropout"),
    "in place by method": ([method("add_", X, 1)], "add_"),
    "in place by operator": ([call("operator.iadd", X, 1)], "operator.iadd"),
    "setitem": ([call("operator.setitem", X, 0, 1.0)], "operator.setitem"),
    "in place by keyword": ([call("torch.nn.functional.relu", X, inplace=True)], "torch.nn.functional.relu"),
    "in place by position": ([call("torch.nn.functional.relu", X, True)], "torch.nn.functional.relu"),
    "out": ([call("torch.exp", X, out=X)], "torch.exp"),
    "out by position": ([call("torch.norm", X, 2, 0, False, X)], "torch.norm"),
    "a device by name": ([call("torch.zeros_like", X, device={"device": "cuda"})], "torch.zeros_like"),
    "a module": ([node("call_module", "bad", "torch.nn.Linear", X)], "torch.nn.Linear"),
    "an attribute": ([node("get_attr", "bad", "weight")], "weight"),
    "a billion numbers": ([call("torch.full", {"tuple": [10**9]}, 1.0)], "torch.full"),
    "zeros by keyword": ([call("torch.zeros", size=[10**9])], "torch.zeros"),
    "zeros of many dimensions": ([call("torch.zeros", *[10] * 9)], "torch.zeros"),
    "new_zeros": ([method("new_zeros", X, [10**5, 10**5])], "new_zeros"),
    "new_full": ([method("new_full", X, [10**5, 10**5], 1.0)], "new_full"),
    "arange": ([call("torch.arange", 10**12)], "torch.arange"),
    "a fine arange": ([call("torch.arange", 0.0, 1.0, 1e-12)], "torch.arange"),
    "an endless arange": ([call("torch.arange", 0, {"float": "inf"})], "torch.arange"),
    "linspace": ([call("torch.linspace", 0, 1, 10**10)], "torch.linspace"),
    "repeat": ([method("repeat", X, 10**9)], "repeat"),
    "tile": ([method("tile", X, {"tuple": [10**5, 10**5]})], "tile"),
    "expand": ([method("expand", X, 10**9, -1)], "expand"),
    "broadcast_to": ([call("torch.broadcast_to", X, [10**9, 12])], "torch.broadcast_to"),
    "repeat_interleave": ([call("torch.repeat_interleave", X, 10**9)], "torch.repeat_interleave"),
    "padding": ([call("torch.nn.functional.pad", X, {"tuple": [0, 10**9]})], "torch.nn.functional.pad"),
    "one_hot": ([node("call_method", "l", "long", X), call("torch.nn.functional.one_hot", ref("l"), 10**9)], "one_hot"),
    "windows": ([method("unfold", X, 0, 10**9, 1)], "unfold"),
    "doublings": (doublings(30), "torch.cat"),
    "products of products": (
        [PAIRS, node("call_function", "bad", "torch.outer", X, {"ref": "big"})],
        "torch.outer",
    ),
    "matrix products": ([PAIRS, call("torch.matmul", ref("big"), ref("big"))], "torch.matmul"),
    "sorts": (
        [PAIRS, *[node("call_method", f"s{n}", "argsort", ref("big")) for n in range(8)], total("s7")],
        "argsort",
    ),
    "powers of integers": ([call("operator.pow", 10, 10**9)], "operator.pow"),
    "powers of sizes": ([SIZE, call("operator.pow", ref("n"), 10**9)], "operator.pow"),
    "large integers": ([SIZE, *POWERS], "operator.mul"),
    "a shift": ([call("operator.lshift", 1, 10**9)], "operator.lshift"),
    "a long text": ([call("operator.mul", "a", 10**9)], "operator.mul"),
    "a formatted text": ([call("operator.mod", "%1000000000d", 1)], "operator.mod"),
    "a long list": ([call("operator.mul", [1], 10**9)], "operator.mul"),
    "a long tuple": (
        [node("call_function", "s", "getattr", X, "shape"), call("operator.mul", ref("s"), 10**9)],
        "operator.mul",
    ),
    "factorial": ([call("math.factorial", 10**6)], "math.factorial"),
    "math of a tensor": ([call("math.log", X)], "math.log"),
    "an integer division that ends processes": (
        [
            node("call_function", "low", "torch.full", [3], -(2**63)),
            call("torch.div", ref("low"), -1, rounding_mode="trunc"),
        ],
        "torch.div",
    ),
    "deep nesting": ([call("torch.cat", nested(200))], "torch.cat"),
    "a wide call": ([call("torch.stack", [X] * 1000)], "torch.stack"),
    "a reference to itself": ([call("torch.exp", ref("bad"))], "torch.exp"),
    "a reference forwards": ([call("torch.exp", ref("loss"))], "torch.exp"),
    "a reference to nothing": ([call("torch.exp", ref("nobody"))], "torch.exp"),
    "many nodes": (chain(2_000), "nodes"),
    "a complex power": (
        [SIZE, node("call_function", "m", "operator.neg", ref("n")), call("operator.pow", ref("m"), 0.5)],
        "operator.pow",
    ),
    "many dimensions": (chain(9, "unsqueeze"), "unsqueeze"),
    "a method of a number": ([SIZE, method("exp", ref("n"))], "exp"),
    "a dictionary": ([call("torch.exp", {"dict": {"a": 1}})], "torch.exp"),
    "an odd argument": ([call("torch.exp", {"pickle": "gASV"})], "torch.exp"),
    "an unknown dtype": ([method("to", X, {"dtype": "complex64"})], "to"),
    "an unknown keyword": ([call("torch.exp", X, generator=1)], "torch.exp"),
    "a text as a reduction": (
        [call("torch.nn.functional.l1_loss", X, X, reduction="eval")],
        "torch.nn.functional.l1_loss",
    ),
    "uncounted huge integers": ([call("operator.add", 2**80, 1)], "operator.add"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graphs_are_refused_by_name(name: str) -> None:
    nodes, named = HOSTILE[name]
    if name == "many dimensions":
        nodes = [{**fields, "args": [*fields["args"], 0]} for fields in nodes]  # type: ignore[misc]
    has_loss = any(fields["name"] == "loss" for fields in nodes)
    fields = body(*nodes, *(() if has_loss else (total("bad"),)))
    logprobs = inputs_of(1)[0]
    with pytest.raises(InvalidRequest) as caught:
        terms_of(checked(fields), [custom_datum(LENGTH)], logprobs)
    assert named in caught.value.message
    assert logprobs.equal(inputs_of(1)[0])


def test_the_bounds_leave_room_for_what_people_write() -> None:
    """All pairs of 2,048 tokens, some ten operations on them."""

    def pairwise(logprobs: torch.Tensor, q: torch.Tensor) -> Any:
        difference = logprobs[:, None] - logprobs[None, :]
        is_better = (q[:, None] > q[None, :]).float()
        return -(F.logsigmoid(difference) * is_better).sum() / is_better.sum().clamp(min=1), {}

    _, ours = traced(pairwise, RANKS)
    logprobs, q = inputs_of(1, 2_048)
    assert terms_of(ours, [custom_datum(2_048, q=q)], logprobs).grad.abs().sum() > 0


def test_what_a_datum_may_cost_in_all_is_bounded() -> None:
    """Every operation is within its own bound, and so is each node; together they are not."""
    nodes = [node("call_function", f"t{n}", "torch.full", [2**20], 1.0) for n in range(100)]
    with pytest.raises(InvalidRequest, match=r"torch.full \(node 't\d+'\) takes the datum over"):
        terms_of(checked(body(*nodes, total("t99"))), [custom_datum(LENGTH)], inputs_of(1)[0])


def test_every_operation_costs_at_least_what_it_makes_and_leaves_its_arguments_alone() -> None:
    """Each is called with some lists of arguments, of which at least one must fit."""
    assert FUNCTION_TABLE.keys() == FUNCTIONS
    assert METHOD_TABLE.keys() == METHODS
    never: list[str] = []
    for name, operation in [*FUNCTION_TABLE.items(), *METHOD_TABLE.items()]:
        if not sum(_succeeds(name, operation, args, kwargs) for args, kwargs in _calls(name)):
            never.append(name)
    assert not never, " ".join(sorted(set(never)))


def _calls(name: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(6, generator=generator) * 0.8 + 0.1 for _ in range(2))
    m = torch.rand(6, 6, generator=generator) * 0.8 + 0.1
    pair = (x, torch.arange(6))
    index, mask = torch.tensor([0, 3, 5, 1, 1, 2]), x > 0.5
    by_name: Mapping[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "getattr": [((x, attribute), {}) for attribute in ("shape", "dtype", "ndim", "device", "T")]
        + [((m, "mT"), {}), ((pair, "values"), {}), ((pair, "indices"), {})],
        "getitem": [((m, part), {}) for part in (0, slice(1, 3), (None, ..., 0), index, m > 0.5, (index, index))],
        "pad": [((m, (1, 2, 3, 0)), {}), ((x, (-1, 2)), {})],
        "one_hot": [((index, 9), {})],
        "cosine_similarity": [((x, y), {"dim": 0})],
        "linspace": [((0, 1, 5), {}), ((0, 1), {"steps": 7})],
        "arange": [((5,), {}), ((1, 7, 2), {}), ((7, 1, -2), {}), ((), {"start": 1, "end": 4, "step": 0.5})],
        "unfold": [((x, 0, 3, 1), {})],
        "copysign": [((x, y), {}), ((1.0, -2), {})],
        "hypot": [((x, y), {}), ((1.0, -2), {})],
        "atan2": [((x, y), {})],
        "bitwise_and": [((index, index), {}), ((mask, mask), {})],
        "bitwise_or": [((index, index), {}), ((mask, mask), {})],
        "bitwise_xor": [((index, index), {}), ((mask, mask), {})],
        "gather": [((x, 0, index), {}), ((m, 1, index.expand(6, 6)), {})],
        "index_select": [((m, 1, index), {}), ((x, 0, index), {}), ((m, 0, torch.zeros(50, dtype=torch.int64)), {})],
        "masked_fill": [((m, mask, 0.0), {}), ((x, m > 0.5, 0.0), {})],
        "masked_select": [((m, mask), {})],
        "movedim": [((m, 0, 1), {})],
        "moveaxis": [((m, 0, 1), {})],
        "swapaxes": [((m, 0, 1), {})],
        "transpose": [((m, 0, 1), {})],
        "select": [((m, 0, 1), {})],
        "unflatten": [((x, 0, (2, 3)), {})],
        "full": [(((3, 2), 1.0), {})],
        "mv": [((m, x), {})],
        "narrow": [((m, 1, 2, 3), {})],
        "broadcast_to": [((x, (4, 6)), {})],
        "expand": [((x, 4, 6), {}), ((x, (4, -1)), {}), ((m[:, :1], -1, 5), {})],
        "where": [((mask, x, 0.0), {}), ((x, mask, y), {}), ((mask, m, y), {})],
        "scatter": [((x, 0, index, 1.0), {}), ((x, 0, index, y), {})],
        "scatter_add": [((x, 0, index, y), {})],
        "matmul": [((m, m), {}), ((m, x), {}), ((x, m), {}), ((x, y), {}), ((m.expand(2, 6, 6), m), {})],
        "new_full": [((x, (3, 2), 1.0), {})],
    }
    yield from by_name.get(name.rpartition(".")[2], [])
    candidates: list[Any] = [x, y, m, index, mask, 0, 1, 2.0, 0.5, (0,), (2, 3), [x, y], torch.float64, mask.int()]
    draws = random.Random(name)
    for length in range(1, min(MAX_POSITIONAL.get(name, 3), 3) + 1):
        for args in itertools.islice(itertools.product(candidates, repeat=length), 60 if length == 2 else 20):
            yield args, {}
        for _ in range(8):
            yield tuple(draws.choices(candidates, k=length)), {}
    yield (x, index, x), {"dim": 0}


def _succeeds(name: str, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    before = [part.clone() for part in _flat(args)]
    try:
        cost = operation.cost(args, kwargs)
        result = operation.run(*args, **kwargs)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        assert all(torch.equal(a, b) for a, b in zip(before, _flat(args), strict=True)), f"{name} changes {args}"
    made = sum(part.numel() for part in _flat((result,)))
    assert made <= max(cost.numbers, 1), f"{name} makes {made} of {cost} from {args} {kwargs}"
    assert cost.work >= 0
    return True


def _flat(values: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _flat(value)
    return found
