"""Costs of custom losses' operations against calls that are written so as to be counted as less than they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from treadle.engine.custom_loss_ops import FUNCTION_TABLE, METHOD_TABLE, Operation

ROW = torch.zeros(1, 50)
COLUMN = torch.zeros(50, 1)
INDEX = torch.zeros(40, dtype=torch.long)
EMPTY = torch.zeros(0)
SIZE = torch.tensor(30)
F = FUNCTION_TABLE
M = METHOD_TABLE

CALLS: Mapping[str, tuple[Operation, tuple[Any, ...], dict[str, Any]]] = {
    "a tuple as an index": (F["operator.getitem"], (ROW, ((0,) * 40,)), {}),
    "a tuple of tensors as an index": (F["operator.getitem"], (ROW, (tuple(INDEX.unbind()),)), {}),
    "the index before the input": (F["torch.index_select"], (), {"index": INDEX, "input": ROW, "dim": 0}),
    "the right factor first": (F["torch.matmul"], (), {"other": ROW, "input": COLUMN}),
    "zeros": (F["torch.zeros"], (SIZE, SIZE), {}),
    "ones": (F["torch.ones"], ((SIZE, SIZE),), {}),
    "zeros by name": (F["torch.zeros"], (), {"size": (SIZE, SIZE)}),
    "full": (F["torch.full"], ((SIZE, SIZE), 1.0), {}),
    "linspace": (F["torch.linspace"], (0, 1, SIZE), {}),
    "broadcast_to": (F["torch.broadcast_to"], (ROW, (SIZE, 1, 50)), {}),
    "tile": (F["torch.tile"], (ROW, (SIZE, SIZE)), {}),
    "pad": (F["torch.nn.functional.pad"], (ROW, (SIZE, SIZE)), {}),
    "repeat": (M["repeat"], (ROW, SIZE, SIZE), {}),
    "expand": (M["expand"], (ROW, SIZE, 1, 50), {}),
    "new_zeros": (M["new_zeros"], (ROW, SIZE, SIZE), {}),
    "new_full": (M["new_full"], (ROW, (SIZE, SIZE), 1.0), {}),
    "unfold": (M["unfold"], (ROW[0], 0, SIZE, 1), {}),
    "as another dtype": (M["view"], (ROW, torch.bool), {}),
    "as a smaller dtype": (M["view"], (ROW,), {"dtype": torch.float16}),
    "a sum over nothing": (F["torch.sum"], (EMPTY.view(0, 1_000), 0), {}),
    "pairs of nothing": (F["torch.inner"], (torch.zeros(40, 0), torch.zeros(40, 0)), {}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_way_to_write_a_call_makes_more_than_is_counted(call: tuple[Operation, tuple[Any, ...], Any]) -> None:
    operation, args, kwargs = call
    try:
        counted = operation.cost(args, kwargs).numbers
        made = operation.run(*args, **kwargs)
    except (TypeError, ValueError):
        return
    assert _numbers(made) <= counted


def test_parts_of_nothing_are_counted() -> None:
    assert F["torch.chunk"].cost((EMPTY, 2**40), {}).work >= 2**40
    assert F["torch.chunk"].cost((ROW, 2**40), {}).work < 2**20, "there are as many parts as there is to cut"


@pytest.mark.parametrize(
    ("operation", "args"),
    [
        (F["torch.zeros"], (3, 4)),
        (M["new_zeros"], (ROW, (3, 4))),
        (M["new_full"], (ROW, (3, 4), torch.tensor(2.0))),
        (M["expand"], (ROW, 3, -1)),
        (M["expand_as"], (ROW, torch.zeros(3, 50))),
        (M["view"], (ROW, 5, -1)),
        (F["operator.getitem"], (ROW, (0, INDEX))),
    ],
)
def test_what_people_write_still_runs(operation: Operation, args: tuple[Any, ...]) -> None:
    run: Callable[..., Tensor] = operation.run
    assert run(*args).numel() <= operation.cost(args, {}).numbers


def _numbers(made: object) -> int:
    if isinstance(made, Tensor):
        return made.numel()
    return sum(map(_numbers, made)) if isinstance(made, tuple | list) else 0
