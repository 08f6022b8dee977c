"""Rules about losses, applied: scopes, bounds, operations, and what metadata may say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain import loss_policy
from treadle.domain.custom_loss import CustomLoss, LossInput, Node, NodeOp, Ref
from treadle.domain.custom_loss_names import FUNCTIONS, METHODS
from treadle.domain.ids import TenantId
from treadle.domain.loss_policy import OPERATIONS, RULED_LOSSES
from treadle.domain.losses import LOSSES
from treadle.domain.ops import Datum
from treadle.domain.policy import LossRule, Policies
from treadle.errors import InvalidRequest
from treadle.testing.builders import pass_op, policy_gradient_datum

ALICE = TenantId("user:alice")
# Narrowest first.
SCOPES = ("tenant:user:alice", "organization:acme", "default")
rules = st.builds(
    LossRule,
    st.sampled_from([None, True, False]),
    st.dictionaries(st.sampled_from(["beta", "other"]), st.tuples(st.floats(0, 1), st.floats(1, 2)), max_size=2),
)


@given(st.dictionaries(st.sampled_from([*SCOPES, "tenant:user:bob", "organization:else"]), rules))
def test_the_narrowest_scope_that_says_something_decides(by_scope: dict[str, LossRule]) -> None:
    policies = Policies(
        losses={scope: {"dro": rule} for scope, rule in by_scope.items()}, organizations={ALICE: "acme"}
    )
    mine = [by_scope[scope] for scope in SCOPES if scope in by_scope]
    said = [rule.is_enabled for rule in mine if rule.is_enabled is not None]
    assert loss_policy.is_enabled(policies, ALICE, "dro") == (said[0] if said else True)
    bounds = loss_policy.bounds_of(policies, ALICE, "dro")
    for key in ("beta", "other"):
        bounded = [rule.bounds[key] for rule in mine if key in rule.bounds]
        assert bounds.get(key) == (bounded[0] if bounded else None)
    assert loss_policy.is_enabled(policies, ALICE, "ppo")
    assert loss_policy.bounds_of(policies, ALICE, "ppo") == {}


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_a_setting_passes_if_and_only_if_it_is_within_its_bounds(value: float, low: float, high: float) -> None:
    op = pass_op(1, datums=[policy_gradient_datum()], loss="dro", loss_config={"beta": value})
    if low <= value <= high:
        loss_policy.check_bounds(op, {"beta": (low, high)})
    else:
        with pytest.raises(InvalidRequest, match="beta="):
            loss_policy.check_bounds(op, {"beta": (low, high)})


@pytest.mark.parametrize("bound", [0.1, 0.2, 0.3, 0.7, 1.2, 4.0])
def test_a_tensor_of_exactly_the_bound_is_within_it(bound: float) -> None:
    """Whatever float32 makes of the bound."""
    plain = policy_gradient_datum(3)
    column = np.full(3, bound, np.float32)
    op = pass_op(1, datums=[Datum(plain.tokens, {**plain.inputs, "clip_high_threshold": column})], loss="cispo")
    bounds = {"clip_high_threshold": (bound, 5.0)}
    loss_policy.check_bounds(op, bounds)
    loss_policy.check_bounds(op, {"clip_high_threshold": (-1.0, max(bound, 4.0))})
    beyond = np.nextafter(column, np.float32(-1))
    op = pass_op(1, datums=[Datum(plain.tokens, {**plain.inputs, "clip_high_threshold": beyond})], loss="cispo")
    with pytest.raises(InvalidRequest, match=r"datum 0: clip_high_threshold\[0\]"):
        loss_policy.check_bounds(op, bounds)


def test_a_bound_of_a_setting_that_the_loss_does_not_have_any_more_bounds_nothing() -> None:
    loss_policy.check_bounds(pass_op(1), {"gone": (0.0, 1.0)})


def test_operations_have_names_for_every_form() -> None:
    assert OPERATIONS >= FUNCTIONS
    assert {f"Tensor.{name}" for name in METHODS} <= OPERATIONS
    assert len(OPERATIONS) == len(FUNCTIONS) + len(METHODS)


def test_aliases_of_an_operation_are_the_operation() -> None:
    """torch.fx writes some functions as where they live in C; to switch one off means those too."""
    loss = CustomLoss(
        "mine",
        (LossInput("logprobs", 1),),
        (
            Node(NodeOp.PLACEHOLDER, "logprobs", "logprobs"),
            Node(NodeOp.CALL_FUNCTION, "a", "torch._C._nn.gelu", (Ref("logprobs"),)),
            Node(NodeOp.CALL_FUNCTION, "b", "_operator.add", (Ref("a"), 1.0)),
            Node(NodeOp.CALL_METHOD, "c", "sum", (Ref("b"),)),
            Node(NodeOp.OUTPUT, "output", "output", ((Ref("c"), {}),)),
        ),
    )
    called = ["torch.nn.functional.gelu", "operator.add", "Tensor.sum"]
    assert list(loss_policy.operations_of(loss)) == called
    for name in called:
        with pytest.raises(InvalidRequest, match=f"{name} .* is switched off"):
            loss_policy.check_operations(loss, {name})
    loss_policy.check_operations(loss, OPERATIONS - set(called))


def test_metadata_name_built_in_losses_and_nothing_else() -> None:
    metadata = {"treadle.loss.ppo": "mine", "treadle.lossy": "x", "loss": "y"}
    assert loss_policy.aliases_of(metadata) == {"ppo": "mine"}
    for wrong in ({"treadle.loss.custom": "mine"}, {"treadle.loss.PPO": "mine"}, {"treadle.loss.ppo": "custom"}):
        with pytest.raises(InvalidRequest, match="user_metadata"):
            loss_policy.aliases_of(wrong)


def test_rules_are_about_losses_of_this_server() -> None:
    assert set(RULED_LOSSES) == {*LOSSES, "custom"}
    for name, spec in LOSSES.items():
        loss_policy.check_rule(name, LossRule(True, dict.fromkeys(spec.config_defaults, (0.0, 1.0))))


def test_a_long_list_is_cut_and_says_where_the_whole_one_is() -> None:
    message = loss_policy.not_enabled("x", [f"loss_{i}" for i in range(100)]).message
    assert "loss_39 and 60 more (GET /api/v1/losses); submit it with POST /api/v1/losses" in message
