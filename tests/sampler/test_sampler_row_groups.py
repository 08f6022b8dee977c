"""The adapters' terms of decoding rows: the reference's numbers, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import AdapterWeights, ProjectionGroup, ProjectionShape, adapter_layout
from treadle.engine.kernels import row_groups as row_groups_module
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.kernels.row_groups import GROUP_ROWS, RowGroups, row_groups
from treadle.engine.kernels.segment_loop import SegmentLoop

CPU = torch.device("cpu")
# Three members and one, odd numbers of outputs, inputs that are no multiple of 8; then sizes whose products have other
# bits when several are done in one call.
GROUPS = (
    ProjectionGroup(
        "attn.qkv", tuple(ProjectionShape(f"attn.{n}_proj", 68, size) for n, size in (("q", 96), ("k", 65), ("v", 8)))
    ),
    ProjectionGroup("mlp.up", (ProjectionShape("mlp.up_proj", 68, 10), ProjectionShape("mlp.gate_proj", 68, 7))),
    ProjectionGroup("mlp.down", (ProjectionShape("mlp.down_proj", 66, 68),)),
    ProjectionGroup("lm_head", (ProjectionShape("lm_head", 68, 331),)),
)
INPUTS = {group.name: group.members[0].in_features for group in GROUPS}


def adapter(rank: int, seed: int, *, train_unembed: bool = True) -> AdapterWeights:
    layout = adapter_layout(GROUPS, LoraSpec(rank=rank, seed=seed, train_unembed=train_unembed))
    flat = torch.empty(layout.num_elements).normal_(generator=torch.Generator().manual_seed(seed))
    return AdapterWeights(layout, flat, 32 / rank)


def terms(groups: RowGroups, x: Tensor, name: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The term of each row, in the order in which the rows were named."""
    places = list(groups.rows)
    laid_out = torch.full((len(places) + 3, x.shape[1]), float("nan"))
    laid_out[places] = x
    size = next(group.out_features for group in GROUPS if group.name == name)
    y = torch.zeros(laid_out.shape[0], size, dtype=dtype)
    groups.add(laid_out.to(dtype), y, name)
    return y[places]


def crowd() -> list[AdapterWeights | None]:
    """Adapters of three ranks and two sets of targets: one row, a few, more than a group of them."""
    kinds = [
        adapter(1, 0),
        adapter(8, 1),
        adapter(8, 2),
        adapter(8, 3, train_unembed=False),
        adapter(5, 4),
        None,
        adapter(8, 6),
        adapter(16, 7),
        adapter(16, 8),
    ]
    chosen = [0, 1, 2, 3, 4, 5, 1, 1, 1, 1, 1, 0, 4, 2, 5, 1, 2, 2, 3, 6, 6, 7, 8, 8, 7]
    return [kinds[index] for index in chosen]


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("name", list(INPUTS))
def test_a_rows_term_has_the_same_bits_in_any_company(
    name: str, num_threads: int, request: pytest.FixtureRequest
) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(num_threads)
    adapters = crowd()
    x = torch.randn(len(adapters), INPUTS[name], generator=torch.Generator().manual_seed(0))
    together = terms(row_groups(adapters, CPU), x, name)
    companies: list[Sequence[int]] = [*([index] for index in range(len(adapters))), range(6), range(5, 25, 2)]
    companies.append(list(reversed(range(len(adapters)))))
    for company in companies:
        chosen = list(company)
        apart = terms(row_groups([adapters[index] for index in chosen], CPU), x[chosen], name)
        assert apart.numpy().tobytes() == together[chosen].numpy().tobytes(), chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_are_those_of_the_reference(dtype: torch.dtype) -> None:
    adapters = crowd()
    for group in GROUPS:
        x = torch.randn(len(adapters), INPUTS[group.name], generator=torch.Generator().manual_seed(0)).to(dtype)
        got = terms(row_groups(adapters, CPU), x.float(), group.name, dtype=dtype)
        for row, of_row in enumerate(adapters):
            expected = torch.zeros(1, group.out_features, dtype=dtype)
            if of_row is not None:
                SegmentLoop().add(x[row : row + 1], expected, [LoraSegment(of_row, 0, 1)], group.name)
            torch.testing.assert_close(
                got[row : row + 1], expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-3
            )


def test_what_does_not_fit_into_the_stack_has_calls_of_its_own_and_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = crowd()
    whole = row_groups(adapters, CPU)
    monkeypatch.setattr(row_groups_module, "MAX_STACK_BYTES", 1)
    apart = row_groups(adapters, CPU)
    assert max(len(stack.adapters) for stack in whole.stacks.values()) > 1
    assert {len(stack.adapters) for stack in apart.stacks.values()} == {1}
    for group in GROUPS:
        x = torch.randn(len(adapters), INPUTS[group.name], generator=torch.Generator().manual_seed(0))
        assert torch.equal(terms(whole, x, group.name), terms(apart, x, group.name))


def test_rows_of_weights_that_are_not_finite_stay_alone() -> None:
    good, bad = adapter(8, 1), adapter(8, 2)
    bad.flat.fill_(float("nan"))
    x = torch.randn(4, 68, generator=torch.Generator().manual_seed(0))
    got = terms(row_groups([good, bad, None, good], CPU), x, "attn.qkv")
    alone = terms(row_groups([good, good], CPU), x[[0, 3]], "attn.qkv")
    assert torch.equal(got[[0, 3]], alone)
    assert got[1].isnan().all()
    assert (got[2] == 0).all()


def test_the_same_adapters_are_copied_once_while_they_decode() -> None:
    one, two = adapter(8, 1), adapter(8, 2)
    first = row_groups([one, two], CPU)
    weights = first.stacks[id(one), id(two)].group("lm_head")
    later = row_groups([one, two, two], CPU, before=first)
    assert later.stacks[id(one), id(two)].group("lm_head") is weights
    alone = row_groups([one] * (GROUP_ROWS + 1), CPU, before=later)
    in_place = alone.stacks[(id(one),)].group("lm_head")
    assert in_place is not None
    assert in_place.a.data_ptr() == one.a("lm_head").data_ptr()
    assert alone.is_for([one] * 5)
    assert not alone.is_for([one] * 4)


def test_a_copy_is_of_the_adapters_that_were_asked_for_though_others_had_their_place_in_memory() -> None:
    x = torch.randn(2, 68, generator=torch.Generator().manual_seed(0))
    before: RowGroups | None = None
    for seed in range(0, 40, 2):
        # The last round's adapters are gone but for what `before` holds of them.
        now = row_groups([adapter(8, seed), adapter(8, seed + 1)], CPU, before=before)
        expected = row_groups([adapter(8, seed), adapter(8, seed + 1)], CPU)
        assert torch.equal(terms(now, x, "attn.qkv"), terms(expected, x, "attn.qkv"))
        before = now


def test_copies_of_many_adapters_keep_within_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [adapter(rank, seed) for seed in range(5) for rank in (4, 8, 16)]
    largest = max(one.flat.numel() for one in adapters) * 4
    monkeypatch.setattr(row_groups_module, "MAX_STACK_BYTES", 4 * largest)
    groups = row_groups(adapters, CPU)
    copied = [stack for stack in groups.stacks.values() if len(stack.adapters) > 1]
    assert copied
    assert sum(one.flat.numel() * 4 for stack in copied for one in stack.adapters) <= 4 * largest
    assert sorted(groups.rows) == list(range(len(adapters)))
