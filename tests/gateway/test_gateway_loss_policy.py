"""What losses a tenant may run: rules by scope, bounds, operations, named losses, and names for older SDKs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gateway_support import Harness, failed, ok, refused
from loss_support import (
    ADMIN_KEY,
    ALICE,
    ALICE_KEY,
    BOB,
    BOB_KEY,
    OPERATOR,
    add_users,
    admin,
    approve,
    definition_of,
    new_run,
    refresh,
    rule,
    send,
    submit,
)
from test_gateway_custom_losses import body_of, loss_id_of, send_pass
from test_gateway_legacy import json_pass

from treadle.domain.ids import ModelId, TenantId
from treadle.domain.named_losses import LossStatus
from treadle.domain.ops import Datum, PassOp
from treadle.domain.states import RequestState
from treadle.gateway import GatewaySettings
from treadle.testing.builders import datum, pass_op, policy_gradient_datum
from treadle.wire.graphs import read_custom_loss
from treadle.wire.passes import named_loss_sha256


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.1, max_datums_per_request=64)


@pytest.fixture
async def operated(gateway: Harness) -> Harness:
    """A gateway with an operator, alice and bob."""
    await add_users(gateway)
    return gateway


async def failure_of(gateway: Harness, op: PassOp, *, key: str = ALICE_KEY, loss_fn: str | None = None) -> str:
    return failed(await gateway.future(await send(gateway, op, key=key, loss_fn=loss_fn), key=key))


async def is_queued(gateway: Harness, request_id: str) -> bool:
    return (await gateway.row(request_id)).state is RequestState.QUEUED


def dro(model_id: str, seq_id: int, **settings: float) -> PassOp:
    return pass_op(
        seq_id, model_id=ModelId(model_id), datums=[policy_gradient_datum(5)], loss="dro", loss_config=settings
    )


def ppo(model_id: str, seq_id: int, **columns: list[float]) -> PassOp:
    given = policy_gradient_datum(3)
    inputs = {name: np.array(values, np.float32) for name, values in columns.items()}
    return pass_op(
        seq_id, model_id=ModelId(model_id), datums=[given, Datum(given.tokens, {**given.inputs, **inputs})], loss="ppo"
    )


class TestRules:
    async def test_everything_runs_where_nobody_said_anything(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        assert await is_queued(operated, await send(operated, dro(model_id, 1)))

    async def test_a_loss_that_is_off_is_refused_with_what_is_on(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await rule(operated, "default", "dro", is_enabled=False)
        message = await failure_of(operated, dro(model_id, 1))
        assert message.startswith("loss_fn 'dro' is not enabled for you; enabled: cross_entropy, importance_sampling,")
        assert "custom; ask this server's operators for it" in message
        assert ", dro" not in message

    async def test_an_unknown_loss_says_how_to_submit_it(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await rule(operated, "default", "dro", is_enabled=False)
        for seq_id, name in enumerate(("hinge", "", "HINGE", "a\0b", "x" * 5_000, "../etc", "cross_entropy "), 1):
            message = await failure_of(operated, pass_op(seq_id, model_id=ModelId(model_id)), loss_fn=name or "\t")
            assert message.endswith("custom; submit it with POST /api/v1/losses")
            assert len(message) < 400

    async def test_the_narrowest_scope_that_says_something_decides(self, operated: Harness) -> None:
        of_alice, of_bob = await new_run(operated), await new_run(operated, key=BOB_KEY)
        await rule(operated, "default", "dro", is_enabled=False)
        await rule(operated, "organization:acme", "dro", is_enabled=True)
        assert await is_queued(operated, await send(operated, dro(of_alice, 1)))
        assert "not enabled" in await failure_of(operated, dro(of_bob, 1), key=BOB_KEY)
        # Says nothing about is_enabled.
        await rule(operated, f"tenant:{ALICE}", "dro", bounds={"beta": [0, 1]})
        assert await is_queued(operated, await send(operated, dro(of_alice, 2)))
        await rule(operated, f"tenant:{ALICE}", "dro", is_enabled=False)
        assert "not enabled" in await failure_of(operated, dro(of_alice, 3))
        ok(await admin(operated, "DELETE", f"losses/rules/tenant:{ALICE}/dro"))
        assert await is_queued(operated, await send(operated, dro(of_alice, 4)))

    async def test_passes_in_json_and_forward_alone_obey_too(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await rule(operated, "default", "dro", is_enabled=False)
        op = dro(model_id, 1)
        for path, field, seq_id in (("forward_backward", "forward_backward_input", 1), ("forward", "forward_input", 2)):
            body = {**json_pass(op, field=field), "seq_id": seq_id}
            answer = ok(await operated.post(path, body, key=ALICE_KEY))
            assert "'dro' is not enabled" in failed(await operated.future(answer["request_id"], key=ALICE_KEY))
        body = {**json_pass(op), "seq_id": 3}
        body["forward_backward_input"] = {**body["forward_backward_input"], "loss_fn": "hinge"}  # type: ignore[dict-item]
        answer = ok(await operated.post("forward_backward", body, key=ALICE_KEY))
        assert "submit it with POST" in failed(await operated.future(answer["request_id"], key=ALICE_KEY))

    async def test_what_was_admitted_before_still_runs(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        request_id = await send(operated, dro(model_id, 1))
        await rule(operated, "default", "dro", is_enabled=False)
        assert await is_queued(operated, request_id)
        # A retry gets the first answer, not another one.
        assert await send(operated, dro(model_id, 1)) == request_id
        assert await is_queued(operated, request_id)


class TestBounds:
    async def test_a_setting_out_of_bounds_names_key_value_and_bounds(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await rule(operated, "default", "dro", bounds={"beta": [0.01, 0.1]})
        assert await is_queued(operated, await send(operated, dro(model_id, 1, beta=0.1)))
        message = await failure_of(operated, dro(model_id, 2, beta=0.2))
        assert message == "loss_fn_config beta=0.2 of dro is outside the bounds that are set for you, 0.01 to 0.1"

    async def test_the_default_is_judged_like_what_was_sent(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await rule(operated, "default", "dro", bounds={"beta": [0.1, 1]})
        message = await failure_of(operated, dro(model_id, 1))
        assert "beta=0.05 of dro is outside" in message
        assert message.endswith("it is the default, so send one within them")
        assert await is_queued(operated, await send(operated, dro(model_id, 2, beta=0.1)))

    async def test_of_each_setting_the_narrowest_bounds_count(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await rule(operated, "default", "ppo", bounds={"clip_low_threshold": [0.7, 1], "clip_high_threshold": [1, 1.3]})
        await rule(operated, f"tenant:{ALICE}", "ppo", bounds={"clip_high_threshold": [1, 9]})

        def clipped(seq_id: int, low: float, high: float) -> PassOp:
            config = {"clip_low_threshold": low, "clip_high_threshold": high}
            op = ppo(model_id, seq_id)
            return replace(op, loss=replace(op.loss, config=config))

        assert await is_queued(operated, await send(operated, clipped(1, 0.7, 9)))
        assert "clip_low_threshold=0.6 of ppo" in await failure_of(operated, clipped(2, 0.6, 1.2))
        assert "1.0 to 9.0" in await failure_of(operated, clipped(3, 0.8, 9.5))

    async def test_a_tensor_in_place_of_a_setting_is_bounded_too(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await rule(operated, "default", "ppo", bounds={"clip_low_threshold": [0.2, 1], "clip_high_threshold": [1, 1.2]})
        op = ppo(model_id, 1, clip_low_threshold=[0.2, 0.8, 1], clip_high_threshold=[1.2, 1.2, 1.0])
        assert await is_queued(operated, await send(operated, op))
        message = await failure_of(operated, ppo(model_id, 2, clip_high_threshold=[1.1, 1.3, 1.1]))
        assert message.startswith("datum 1: clip_high_threshold[1] = 1.2999999523162842 of ppo is outside")

    @pytest.mark.parametrize(
        ("loss", "says", "why"),
        [
            ("dro", {}, "a rule says is_enabled, bounds or both"),
            ("dro", {"bounds": {"gamma": [0, 1]}}, "dro has no such setting; it has beta"),
            ("dro", {"bounds": {"beta": [1, 0]}}, "low and high"),
            ("dro", {"bounds": {"beta": [0]}}, "bounds.beta"),
            ("dro", {"enabled": False}, "enabled"),
            ("dro", {"is_enabled": "no"}, "is_enabled"),
            ("custom", {"bounds": {"beta": [0, 1]}}, "custom has no such setting; it has none"),
            ("hinge", {"is_enabled": False}, "has no rules"),
        ],
    )
    async def test_a_rule_that_would_mean_nothing_is_refused(
        self, operated: Harness, loss: str, says: dict[str, object], why: str
    ) -> None:
        assert why in refused(await admin(operated, "PUT", f"losses/rules/default/{loss}", says), 400)

    @pytest.mark.parametrize("scope", ["nobody", "tenant:", "default:x", "tenant:" + "x" * 2_000])
    async def test_a_scope_that_is_none_is_refused(self, operated: Harness, scope: str) -> None:
        says = {"is_enabled": False}
        assert refused(await admin(operated, "PUT", f"losses/rules/{scope}/dro", says), 400).startswith("scope")


class TestTracedLosses:
    async def test_they_are_made_and_used_only_where_allowed(self, operated: Harness) -> None:
        session_id = await operated.new_session(key=ALICE_KEY)
        made = ok(await operated.post("create_custom_loss", body_of(session_id), key=ALICE_KEY))
        loss_id = ok(await operated.future(made["request_id"], key=ALICE_KEY))["loss_id"]
        model_id = await new_run(operated)
        await rule(operated, "default", "custom", is_enabled=False)
        later = ok(await operated.post("create_custom_loss", body_of(session_id, 1), key=ALICE_KEY))
        for request_id in (
            later["request_id"],
            await send_pass(operated, model_id, {"loss_id": loss_id}, key=ALICE_KEY),
        ):
            message = failed(await operated.future(request_id, key=ALICE_KEY))
            assert message.startswith("loss_fn 'custom' is not enabled for you; enabled: cross_entropy")
        # Its client waits for no answer that never comes: a retry gets this one again.
        again = ok(await operated.post("create_custom_loss", body_of(session_id, 1), key=ALICE_KEY))
        assert again == later

    async def test_an_operation_that_is_switched_off_is_refused_by_name(self, operated: Harness) -> None:
        session_id = await operated.new_session(key=ALICE_KEY)
        made = ok(await operated.post("create_custom_loss", body_of(session_id), key=ALICE_KEY))
        loss_id = ok(await operated.future(made["request_id"], key=ALICE_KEY))["loss_id"]
        model_id = await new_run(operated)
        answer = ok(await admin(operated, "PUT", "losses/operations", {"disabled": ["torch.exp", "Tensor.exp"]}))
        assert answer["disabled"] == ["Tensor.exp", "torch.exp"]
        assert "torch.exp" in answer["operations"]
        later = ok(await operated.post("create_custom_loss", body_of(session_id, 1), key=ALICE_KEY))
        for request_id in (
            later["request_id"],
            await send_pass(operated, model_id, {"loss_id": loss_id}, key=ALICE_KEY),
        ):
            message = failed(await operated.future(request_id, key=ALICE_KEY))
            assert "custom loss 'mine': torch.exp (node 'f') is switched off on this server" in message
        shown = ok(await operated.get("losses", key=ALICE_KEY))["traced"]["operations"]
        assert "torch.exp" not in shown
        assert "torch.log" in shown
        ok(await admin(operated, "PUT", "losses/operations", {"disabled": []}))
        request_id = await send_pass(operated, model_id, {"loss_id": loss_id}, seq_id=2, key=ALICE_KEY)
        assert await is_queued(operated, request_id)

    @pytest.mark.parametrize("name", ["torch.save", "exp", "Tensor.exp_", "torch.exp "])
    async def test_an_operation_that_does_not_exist_is_refused(self, operated: Harness, name: str) -> None:
        answer = await admin(operated, "PUT", "losses/operations", {"disabled": ["torch.log", name]})
        assert f"{name!r} is not an operation" in refused(answer, 400)
        assert ok(await admin(operated, "GET", "losses/operations"))["disabled"] == []


class TestNamedLosses:
    async def test_an_approved_one_runs_as_the_graph_that_was_approved(self, operated: Harness) -> None:
        model_id = await new_run(operated, key=BOB_KEY)
        submission = await submit(operated, "soft")
        await approve(operated, submission)
        request_id = await send(operated, pass_op(1, model_id=ModelId(model_id)), key=BOB_KEY, loss_fn="soft")
        op = await operated.op(request_id)
        assert isinstance(op, PassOp)
        assert op.loss.name == "custom"
        assert op.loss.custom == read_custom_loss(definition_of("soft"))
        assert op.datums[0].inputs.keys() == {"target_tokens", "weights"}
        payload, _ = await operated.store.requests.payload((await operated.row(request_id)).request_id)
        assert named_loss_sha256(payload) == submission.definition_sha256

    async def test_until_then_its_owner_is_told_where_it_stands(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        submission = await submit(operated, "soft")
        op = pass_op(1, model_id=ModelId(model_id))
        message = await failure_of(operated, op, loss_fn="soft")
        assert message.startswith("loss_fn 'soft' is not enabled for you; enabled: cross_entropy")
        assert message.endswith("submit it with POST /api/v1/losses (your submission of it is pending)")
        of_bob = await new_run(operated, key=BOB_KEY)
        message = await failure_of(operated, pass_op(1, model_id=ModelId(of_bob)), key=BOB_KEY, loss_fn="soft")
        assert message.endswith("submit it with POST /api/v1/losses")
        losses = operated.store.named_losses
        await losses.decide(submission.named_loss_id, LossStatus.REJECTED, "it is not smooth", OPERATOR)
        message = await failure_of(operated, replace(op, seq_id=2), loss_fn="soft")
        assert message.endswith("(your submission of it is rejected: it is not smooth)")

    async def test_it_is_for_the_tenants_of_its_approval(self, operated: Harness) -> None:
        of_alice, of_bob = await new_run(operated), await new_run(operated, key=BOB_KEY)
        submission = await submit(operated, "soft")
        await approve(operated, submission, [BOB])
        used = await send(operated, pass_op(1, model_id=ModelId(of_bob)), key=BOB_KEY, loss_fn="soft")
        assert await is_queued(operated, used)
        assert "'soft' is not enabled" in await failure_of(
            operated, pass_op(1, model_id=ModelId(of_alice)), loss_fn="soft"
        )
        assert [loss["name"] for loss in ok(await operated.get("losses", key=BOB_KEY))["named"]] == ["soft"]
        assert ok(await operated.get("losses", key=ALICE_KEY))["named"] == []
        # What was remembered of it is forgotten when anything is decided.
        await operated.store.named_losses.approve(submission.named_loss_id, [ALICE], OPERATOR)
        await refresh(operated)
        used = await send(operated, pass_op(2, model_id=ModelId(of_alice)), loss_fn="soft")
        assert await is_queued(operated, used)
        message = await failure_of(operated, pass_op(2, model_id=ModelId(of_bob)), key=BOB_KEY, loss_fn="soft")
        assert "'soft' is not enabled" in message

    async def test_a_revoked_one_is_refused(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        submission = await submit(operated, "soft")
        await approve(operated, submission)
        assert await is_queued(operated, await send(operated, pass_op(1, model_id=ModelId(model_id)), loss_fn="soft"))
        losses = operated.store.named_losses
        await losses.decide(submission.named_loss_id, LossStatus.REVOKED, "it leaks", OPERATOR)
        await refresh(operated)
        message = await failure_of(operated, pass_op(2, model_id=ModelId(model_id)), loss_fn="soft")
        assert message.endswith("(your submission of it is revoked: it leaks)")

    @pytest.mark.parametrize("tenants", [None, [BOB], [ALICE]])
    async def test_who_used_anothers_is_told_why_it_was_revoked(
        self, operated: Harness, tenants: list[TenantId] | None
    ) -> None:
        submission = await submit(operated, "soft")
        await approve(operated, submission, tenants)
        await operated.store.named_losses.decide(submission.named_loss_id, LossStatus.REVOKED, "it leaks", OPERATOR)
        await refresh(operated)
        model_id = await new_run(operated, key=BOB_KEY)
        message = await failure_of(operated, pass_op(1, model_id=ModelId(model_id)), key=BOB_KEY, loss_fn="soft")
        # What was never for a tenant is not there for it.
        assert message.endswith("(it was revoked: it leaks)") == (tenants != [ALICE])

    async def test_it_takes_the_inputs_that_it_declares_and_no_settings(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await approve(operated, await submit(operated, "soft"))
        given = datum(5)
        extra = Datum(given.tokens, {**given.inputs, "mask": np.ones(5, np.float32)})
        message = await failure_of(operated, pass_op(1, model_id=ModelId(model_id), datums=[extra]), loss_fn="soft")
        assert message == (
            "datum 0: loss_fn_inputs 'mask' is not an input of soft; its inputs are target_tokens, weights"
        )
        bare = Datum(given.tokens, {"target_tokens": given.inputs["target_tokens"]})
        message = await failure_of(operated, pass_op(2, model_id=ModelId(model_id), datums=[bare]), loss_fn="soft")
        assert message == "datum 0: loss_fn_inputs lacks weights, which soft needs"
        message = await failure_of(operated, dro(model_id, 3), loss_fn="soft")
        assert message == "loss_fn_config key 'beta' is not known to soft; known: none"

    async def test_operations_that_are_switched_off_are_so_for_approved_losses_too(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await approve(operated, await submit(operated, "soft"))
        ok(await admin(operated, "PUT", "losses/operations", {"disabled": ["torch.exp"]}))
        message = await failure_of(operated, pass_op(1, model_id=ModelId(model_id)), loss_fn="soft")
        assert "custom loss 'soft': torch.exp" in message

    async def test_traced_losses_may_be_off_and_named_ones_on(self, operated: Harness) -> None:
        model_id = await new_run(operated)
        await approve(operated, await submit(operated, "soft"))
        await rule(operated, "default", "custom", is_enabled=False)
        assert await is_queued(operated, await send(operated, pass_op(1, model_id=ModelId(model_id)), loss_fn="soft"))


class TestMetadata:
    async def test_a_run_says_what_a_name_is_in_it(self, operated: Harness) -> None:
        await approve(operated, await submit(operated, "soft"))
        metadata = {"treadle.loss.cross_entropy": "soft", "purpose": "test"}
        model_id = await new_run(operated, metadata=metadata)
        body = json_pass(pass_op(1, model_id=ModelId(model_id)))
        answer = ok(await operated.post("forward_backward", body, key=ALICE_KEY))
        op = await operated.op(answer["request_id"])
        assert isinstance(op, PassOp)
        assert op.loss.custom == read_custom_loss(definition_of("soft"))
        # The other names are what they are, and so are other runs.
        op = await operated.op(await send(operated, dro(model_id, 2)))  # type: ignore[assignment]
        assert op.loss.name == "dro"
        other = await new_run(operated)
        op = await operated.op(await send(operated, pass_op(1, model_id=ModelId(other))))  # type: ignore[assignment]
        assert op.loss.name == "cross_entropy"
        shown = ok(await operated.get(f"training_runs/{model_id}", key=ALICE_KEY))
        assert shown["user_metadata"] == metadata

    async def test_a_built_in_loss_that_an_old_sdk_cannot_name(self, operated: Harness) -> None:
        model_id = await new_run(operated, metadata={"treadle.loss.ppo": "gspo"})
        op = await operated.op(
            await send(operated, replace(ppo(model_id, 1), loss=replace(ppo(model_id, 1).loss, config={})))
        )
        assert isinstance(op, PassOp)
        assert op.loss.name == "gspo"
        assert op.loss.config["clip_low_threshold"] == 0.9997
        await rule(operated, "default", "gspo", is_enabled=False)
        assert "loss_fn 'gspo' is not enabled" in await failure_of(operated, ppo(model_id, 2))

    @pytest.mark.parametrize(
        ("key", "loss", "why"),
        [
            (
                "cross_entropy",
                "hinge",
                "'treadle.loss.cross_entropy': loss_fn 'hinge' is not enabled for you; enabled:",
            ),
            ("cross_entropy", "dro", "'treadle.loss.cross_entropy': loss_fn 'dro' is not enabled for you; enabled:"),
            ("hinge", "ppo", "is about loss_fn 'hinge', not one of cross_entropy"),
            ("", "ppo", "is about loss_fn ''"),
            ("ppo", "custom", "needs a loss_id"),
        ],
    )
    async def test_what_could_never_run_fails_the_creation(
        self, operated: Harness, key: str, loss: str, why: str
    ) -> None:
        await rule(operated, "default", "dro", is_enabled=False)
        body = {
            "session_id": await operated.new_session(key=ALICE_KEY),
            "model_seq_id": 0,
            "base_model": "fake/base",
            "lora_config": {"rank": 8},
            "user_metadata": {f"treadle.loss.{key}": loss},
        }
        answer = ok(await operated.post("create_model", body, key=ALICE_KEY))
        assert why in failed(await operated.future(answer["request_id"], key=ALICE_KEY))

    async def test_a_run_made_from_a_checkpoint_has_metadata_of_its_own(self, operated: Harness) -> None:
        await approve(operated, await submit(operated, "soft"))
        source = await new_run(operated)
        path = (await operated.publish(source, "start", public=True)).tinker_path
        session_id = await operated.new_session(key=ALICE_KEY)
        for number, (loss, is_fine) in enumerate((("soft", True), ("hinge", False))):
            body = {
                "session_id": session_id,
                "model_seq_id": number,
                "path": path,
                "optimizer": False,
                "user_metadata": {"treadle.loss.ppo": loss},
            }
            answer = ok(await operated.post("load_weights", body, key=ALICE_KEY))
            if is_fine:
                assert await is_queued(operated, answer["request_id"])
            else:
                message = failed(await operated.future(answer["request_id"], key=ALICE_KEY))
                assert "'treadle.loss.ppo': loss_fn 'hinge' is not enabled for you" in message

    async def test_a_loss_that_is_revoked_later_fails_the_passes(self, operated: Harness) -> None:
        submission = await submit(operated, "soft")
        await approve(operated, submission)
        model_id = await new_run(operated, metadata={"treadle.loss.cross_entropy": "soft"})
        losses = operated.store.named_losses
        await losses.decide(submission.named_loss_id, LossStatus.REVOKED, "it leaks", OPERATOR)
        await refresh(operated)
        # Never cross_entropy in its place.
        message = await failure_of(operated, pass_op(1, model_id=ModelId(model_id)))
        assert message.startswith("loss_fn 'soft' is not enabled for you")


class TestAnswers:
    async def test_users_see_what_holds_for_them(self, operated: Harness) -> None:
        await rule(operated, "organization:acme", "dro", is_enabled=False, bounds={"beta": [0, 0.5]})
        await rule(operated, f"tenant:{BOB}", "custom", is_enabled=False)
        await approve(operated, await submit(operated, "soft"))
        await submit(operated, "hard")
        seen = ok(await operated.get("losses", key=ALICE_KEY))
        by_name = {loss["name"]: loss for loss in seen["built_in"]}
        assert by_name["dro"] == {
            "name": "dro",
            "is_enabled": False,
            "required_inputs": ["target_tokens", "logprobs", "advantages"],
            "optional_inputs": [],
            "settings": [{"name": "beta", "default": 0.05, "low": 0, "high": 0.5}],
        }
        assert by_name["ppo"]["is_enabled"]
        assert by_name["ppo"]["settings"][0]["low"] is None
        assert seen["traced"]["is_enabled"]
        assert seen["named"][0]["name"] == "soft"
        assert seen["named"][0]["inputs"] == [{"name": "logprobs", "rank": 1}, {"name": "weights", "rank": 1}]
        assert [(loss["name"], loss["status"]) for loss in seen["submitted"]] == [
            ("hard", "pending"),
            ("soft", "approved"),
        ]
        of_bob = ok(await operated.get("losses", key=BOB_KEY))
        assert {loss["name"]: loss["is_enabled"] for loss in of_bob["built_in"]}["dro"]
        assert not of_bob["traced"]["is_enabled"]
        assert of_bob["submitted"] == []

    async def test_operators_see_the_rules_and_each_change_is_audited(self, operated: Harness) -> None:
        await rule(operated, "default", "dro", is_enabled=False)
        await rule(operated, "default", "dro", is_enabled=True, bounds={"beta": [0, 1]})
        await rule(operated, "tenant:user:carol", "custom", is_enabled=False)
        ok(await admin(operated, "PUT", "losses/operations", {"disabled": ["torch.sort"]}))
        seen = ok(await admin(operated, "GET", "losses"))
        assert seen["rules"] == [
            {"scope": "default", "loss": "dro", "is_enabled": True, "bounds": {"beta": [0, 1]}},
            {"scope": "tenant:user:carol", "loss": "custom", "is_enabled": False, "bounds": {}},
        ]
        assert seen["disabled_operations"] == ["torch.sort"]
        ok(await admin(operated, "DELETE", "losses/rules/default/dro"))
        refused(await admin(operated, "DELETE", "losses/rules/default/dro"), 404)
        events = await operated.store.audit.read(TenantId("user:root"), since=0, before=1e12, event_type="admin")
        assert events is not None
        changes = [(one.event, one.subject, one.details) for one in events if one.event.startswith("loss_")]
        off, on = {"is_enabled": False, "bounds": {}}, {"is_enabled": True, "bounds": {"beta": [0, 1]}}
        assert changes == [
            ("loss_rule.set", "loss:dro default", {"before": None, "after": off}),
            ("loss_rule.set", "loss:dro default", {"before": off, "after": on}),
            ("loss_rule.set", "loss:custom tenant:user:carol", {"before": None, "after": off}),
            ("loss_operations.set", "losses", {"before": [], "after": ["torch.sort"]}),
            ("loss_rule.removed", "loss:dro default", {"before": on, "after": None}),
        ]
        assert all(one.actor is not None for one in events)

    @pytest.mark.parametrize("key", [ALICE_KEY, "tml-nobody"])
    async def test_only_operators_decide(self, operated: Harness, key: str) -> None:
        status = 403 if key == ALICE_KEY else 401
        for method, path, body in (
            ("GET", "losses", None),
            ("GET", "losses/operations", None),
            ("PUT", "losses/operations", {"disabled": []}),
            ("PUT", "losses/rules/default/dro", {"is_enabled": False}),
            ("DELETE", "losses/rules/default/dro", None),
        ):
            refused(await admin(operated, method, path, body, key=key), status)
        assert ok(await admin(operated, "GET", "losses", key=ADMIN_KEY))["rules"] == []


async def test_open_mode_has_no_rules_and_every_loss(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    assert await loss_id_of(gateway, session_id)
    assert all(loss["is_enabled"] for loss in ok(await gateway.get("losses"))["built_in"])
