"""The rules that every plan keeps: one property over arbitrary queues, and an example for each rule."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from treadle.domain.ids import ModelId, TenantId, op_request_id
from treadle.domain.limits import MAX_GAP_IDS_PER_CYCLE, MAX_OPS_PER_CYCLE
from treadle.domain.ops import OpKind, Phase, phase_of
from treadle.domain.plan import CyclePlan, Gap, ModelQueue, PlannedOp, PolicyInput, PolicyState, QueuedOp
from treadle.scheduler.policy import plan_cycle
from treadle.testing.builders import MODEL_ID, model_queue, policy_input, queued

CREATE, LOAD = OpKind.CREATE_MODEL, OpKind.LOAD_WEIGHTS
PASS, FORWARD, STEP = OpKind.FORWARD_BACKWARD, OpKind.FORWARD, OpKind.OPTIM_STEP
SAVE, PUBLISH, UNLOAD = OpKind.SAVE_WEIGHTS, OpKind.SAVE_FOR_SAMPLER, OpKind.UNLOAD_MODEL
PASSES = (PASS, FORWARD)
ENDS_THE_WAIT = (STEP, SAVE, PUBLISH, LOAD, UNLOAD)
PHASES = list(Phase)
GAP_WAIT_S = 30.0


@st.composite
def queues(draw: st.DrawFn, index: int) -> ModelQueue:
    """A model's queue with every irregularity that a client can cause."""
    model_id = ModelId(f"m{index}")
    next_seq_id = seq_id = draw(st.integers(0, 3))
    ops: list[QueuedOp] = []
    settled: set[int] = set()
    for position in range(draw(st.integers(0, 8))):
        for _ in range(draw(st.sampled_from((0, 0, 0, 0, 1, 2)))):
            if draw(st.booleans()):
                settled.add(seq_id)
            seq_id += 1
        kind = draw(st.sampled_from((PASS, PASS, PASS, STEP, STEP, FORWARD, SAVE, PUBLISH, LOAD, UNLOAD)))
        kind = CREATE if seq_id == 0 else kind
        quanta = draw(st.lists(st.integers(1, 3_000), min_size=1, max_size=4)) if kind in PASSES else []
        num_done = draw(st.integers(0, len(quanta) - 1)) if quanta and position == 0 and seq_id == next_seq_id else 0
        age = draw(st.sampled_from((0.0, 0.0, GAP_WAIT_S, GAP_WAIT_S + 0.1)))
        ops.append(queued(kind, seq_id, *quanta, num_quanta_done=num_done, queued_s=age))
        seq_id += 1
    return model_queue(
        *ops,
        model_id=model_id,
        tenant_id=TenantId(draw(st.sampled_from("abc"))),
        next_seq_id=next_seq_id,
        settled_seq_ids=settled,
    )


@st.composite
def inputs(draw: st.DrawFn) -> PolicyInput:
    models = tuple(draw(queues(index)) for index in range(draw(st.integers(0, 6))))
    requests = [op.request_id for model in models for op in model.ops]
    has_suspects = bool(requests) and draw(st.sampled_from((False, False, True)))
    tenants = st.sampled_from([TenantId(name) for name in "abcz"])
    return policy_input(
        *models,
        state=PolicyState(
            deficits=draw(st.dictionaries(tenants, st.floats(-5_000, 5_000), max_size=3)),
            last_tenant=draw(st.none() | tenants),
            turns=draw(st.dictionaries(tenants, st.sampled_from([ModelId(f"m{i}") for i in range(6)]), max_size=2)),
        ),
        budget_tokens=draw(st.integers(1, 8_000)),
        tenant_cap_tokens=draw(st.integers(1, 8_000)),
        gap_wait_s=GAP_WAIT_S,
        weights=draw(st.dictionaries(tenants, st.floats(0.1, 10.0), max_size=3)),
        quarantined=draw(st.sets(st.sampled_from(requests), max_size=2)) if has_suspects else (),
    )


@given(inputs())
@settings(max_examples=400, deadline=None)
@example(policy_input(model_queue(queued(CREATE, 0), queued(PASS, 1, 5), queued(STEP, 2), next_seq_id=0)))
def test_every_plan_keeps_the_rules(given_input: PolicyInput) -> None:
    plan, _ = plan_cycle(given_input)
    for model in given_input.models:
        check_model(model, plan)
    check_tokens(given_input, plan)
    check_quarantine(given_input, plan)
    assert len(plan.ops) <= MAX_OPS_PER_CYCLE
    assert plan.ops or not any(has_eligible_head(model) for model in given_input.models)
    assert [PHASES.index(phase_of(op.kind)) for op in plan.ops] == sorted(
        PHASES.index(phase_of(op.kind)) for op in plan.ops
    )


@given(inputs(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_equal_input_in_any_order_gives_the_same_plan_and_state(given_input: PolicyInput, rng: random.Random) -> None:
    shuffled = list(given_input.models)
    rng.shuffle(shuffled)
    assert plan_cycle(replace(given_input, models=tuple(shuffled))) == plan_cycle(given_input)


def check_model(model: ModelQueue, plan: CyclePlan) -> None:
    """Order, holes, phases and quanta of one model, told from the queue alone."""
    planned = [op for op in plan.ops if op.model_id == model.model_id]
    given_up = [seq_id for gap in plan.gaps if gap.model_id == model.model_id for seq_id in gap.seq_ids]
    waiting = {op.seq_id: op for op in model.ops}
    check_gaps(model, given_up, finished={op.seq_id for op in planned if op.is_last_part})
    expected = model.next_seq_id
    for position, op in enumerate(planned):
        assert all(seq_id in model.settled_seq_ids or seq_id in given_up for seq_id in range(expected, op.seq_id))
        expected = op.seq_id + 1
        assert op.is_last_part or position == len(planned) - 1, "ran behind a pass with quanta left"
        check_parts(waiting[op.seq_id], op)
        if op.kind is LOAD:
            assert position == 0 or op.seq_id <= 1, "a load came behind other ops of its cycle"
    phases = [PHASES.index(phase_of(op.kind)) for op in planned]
    assert phases == sorted(phases)
    assert sum(op.kind is STEP for op in planned) <= 1
    assert UNLOAD not in [op.kind for op in planned[:-1]]


def check_gaps(model: ModelQueue, given_up: list[int], *, finished: set[int]) -> None:
    assert given_up == sorted(set(given_up))
    present = {op.seq_id for op in model.ops} | model.settled_seq_ids
    for seq_id in given_up:
        assert seq_id >= model.next_seq_id
        assert seq_id not in present
        assert any(op.seq_id > seq_id and op.kind in ENDS_THE_WAIT and op.queued_s > GAP_WAIT_S for op in model.ops)
        before = set(range(model.next_seq_id, seq_id))
        assert before <= finished | model.settled_seq_ids | set(given_up), "given up before its turn"


def check_parts(waiting: QueuedOp, planned: PlannedOp) -> None:
    assert planned.request_id == waiting.request_id
    assert planned.kind is waiting.kind
    assert planned.quantum_start == waiting.num_quanta_done
    assert planned.quantum_stop > planned.quantum_start or not waiting.quantum_tokens
    assert planned.num_tokens == sum(waiting.quantum_tokens[planned.quantum_start : planned.quantum_stop])
    assert planned.is_last_part == (planned.quantum_stop == len(waiting.quantum_tokens))


def check_tokens(given_input: PolicyInput, plan: CyclePlan) -> None:
    tenant_of = {model.model_id: model.tenant_id for model in given_input.models}
    passes = [op for op in plan.ops if op.kind in PASSES]
    assert plan.num_tokens <= given_input.budget_tokens or is_one_quantum(passes)
    for tenant in set(tenant_of.values()):
        own = [op for op in passes if tenant_of[op.model_id] == tenant]
        assert sum(op.num_tokens for op in own) <= given_input.tenant_cap_tokens or is_one_quantum(own)


def is_one_quantum(passes: list[PlannedOp]) -> bool:
    return len(passes) == 1 and passes[0].quantum_stop - passes[0].quantum_start == 1


def check_quarantine(given_input: PolicyInput, plan: CyclePlan) -> None:
    suspects = given_input.quarantined
    if any(op.request_id in suspects for op in plan.ops):
        assert len(plan.ops) == 1
    heads = {op_request_id(model.model_id, model.next_seq_id) for model in given_input.models}
    if any(op.request_id in suspects & heads for model in given_input.models for op in model.ops):
        assert plan.ops[0].request_id in suspects


def has_eligible_head(model: ModelQueue) -> bool:
    if not model.ops:
        return False
    absent = set(range(model.next_seq_id, model.ops[0].seq_id)) - model.settled_seq_ids
    return not absent or any(op.kind in ENDS_THE_WAIT and op.queued_s > GAP_WAIT_S for op in model.ops)


def planned_seq_ids(*models: ModelQueue, **options: object) -> list[int]:
    plan, _ = plan_cycle(policy_input(*models, **options))  # type: ignore[arg-type]
    return sorted(op.seq_id for op in plan.ops)


def test_a_step_runs_in_the_cycle_of_its_passes_and_the_next_pass_waits() -> None:
    queue = model_queue(queued(PASS, 1, 10), queued(STEP, 2), queued(SAVE, 3), queued(PASS, 4, 10))
    assert planned_seq_ids(queue) == [1, 2, 3]


def test_a_new_run_is_created_and_trained_in_one_cycle() -> None:
    queue = model_queue(queued(CREATE, 0), queued(LOAD, 1), queued(PASS, 2, 10), queued(STEP, 3), next_seq_id=0)
    assert planned_seq_ids(queue) == [0, 1, 2, 3]


def test_a_load_in_the_middle_of_a_run_starts_a_cycle_of_its_own() -> None:
    load_behind = model_queue(queued(PASS, 1, 10), queued(LOAD, 2), queued(PASS, 3, 10))
    assert planned_seq_ids(load_behind) == [1]
    load_first = model_queue(queued(LOAD, 2), queued(LOAD, 3), queued(PASS, 4, 10), next_seq_id=2)
    assert planned_seq_ids(load_first) == [2]
    assert planned_seq_ids(replace(load_first, ops=(load_first.ops[0], queued(PASS, 3, 10)))) == [2, 3]


def test_nothing_follows_an_unload() -> None:
    assert planned_seq_ids(model_queue(queued(UNLOAD, 1), queued(SAVE, 2))) == [1]


@pytest.mark.parametrize("kind", ENDS_THE_WAIT)
def test_a_hole_is_given_up_once_an_op_that_needs_it_waited_too_long(kind: OpKind) -> None:
    def plan_at(queued_s: float) -> CyclePlan:
        queue = model_queue(queued(PASS, 1, 10), queued(PASS, 4, 10), queued(kind, 5, queued_s=queued_s))
        return plan_cycle(policy_input(queue, gap_wait_s=30.0))[0]

    assert plan_at(30.0).gaps == ()
    assert [op.seq_id for op in plan_at(30.0).ops] == [1]
    assert plan_at(30.1).gaps == (Gap(MODEL_ID, (2, 3)),)
    assert [op.seq_id for op in plan_at(30.1).ops][:2] == [1, 4]


def test_old_passes_alone_never_give_up_a_hole() -> None:
    queue = model_queue(queued(PASS, 2, 10, queued_s=1e6), queued(FORWARD, 3, 10, queued_s=1e6))
    assert plan_cycle(policy_input(queue))[0].is_empty


def test_ids_refused_at_admission_are_no_hole() -> None:
    queue = model_queue(queued(PASS, 1, 10), queued(STEP, 4), settled_seq_ids=(2, 3))
    plan, _ = plan_cycle(policy_input(queue))
    assert [op.seq_id for op in plan.ops] == [1, 4]
    assert plan.gaps == ()


def test_a_huge_jump_of_ids_is_given_up_piece_by_piece() -> None:
    queue = model_queue(queued(STEP, 10**18, queued_s=31.0))
    plan, _ = plan_cycle(policy_input(queue))
    assert plan.ops == ()
    assert plan.gaps == (Gap(MODEL_ID, tuple(range(1, 1 + MAX_GAP_IDS_PER_CYCLE))),)


def test_a_request_over_the_cap_is_spread_over_cycles_and_holds_back_its_step() -> None:
    parts = []
    num_done = 0
    for _ in range(3):
        queue = model_queue(queued(PASS, 1, 400, 400, 400, 400, 400, num_quanta_done=num_done), queued(STEP, 2))
        plan, _ = plan_cycle(policy_input(queue, tenant_cap_tokens=1_000))
        parts.append([(op.quantum_start, op.quantum_stop, op.is_last_part) for op in plan.ops if op.kind is PASS])
        num_done = plan.ops[0].quantum_stop
    assert parts == [[(0, 2, False)], [(2, 4, False)], [(4, 5, True)]]
    assert [op.kind for op in plan.ops] == [PASS, STEP]


def test_a_quantum_over_the_budget_runs_without_other_passes() -> None:
    large = model_queue(queued(PASS, 1, 5_000), queued(STEP, 2), model_id=ModelId("a"), tenant_id=TenantId("a"))
    small = model_queue(queued(PASS, 1, 10), model_id=ModelId("b"), tenant_id=TenantId("b"))
    saving = model_queue(queued(SAVE, 1), model_id=ModelId("c"), tenant_id=TenantId("c"))
    state = PolicyState(deficits={TenantId("a"): 5_000.0})
    plan, _ = plan_cycle(policy_input(large, small, saving, state=state, budget_tokens=1_000, tenant_cap_tokens=500))
    assert [(op.model_id, op.kind) for op in plan.ops] == [("a", PASS), ("a", STEP), ("c", SAVE)]


def test_room_that_one_tenant_cannot_use_is_filled_by_another() -> None:
    first = model_queue(queued(PASS, 1, 600), queued(PASS, 2, 600), model_id=ModelId("a"), tenant_id=TenantId("a"))
    other = model_queue(queued(PASS, 1, 200, 200), model_id=ModelId("b"), tenant_id=TenantId("b"))
    plan, _ = plan_cycle(policy_input(first, other, budget_tokens=1_000))
    assert {(op.model_id, op.seq_id): op.num_tokens for op in plan.ops} == {("a", 1): 600, ("b", 1): 400}


def test_a_suspect_runs_alone_and_others_wait_for_it() -> None:
    suspect = model_queue(queued(PASS, 1, 10), queued(STEP, 2), model_id=ModelId("b"), tenant_id=TenantId("b"))
    other = model_queue(queued(PASS, 1, 10), model_id=ModelId("a"), tenant_id=TenantId("a"))
    plan, _ = plan_cycle(policy_input(suspect, other, quarantined=[op_request_id(ModelId("b"), 1)]))
    assert [(op.model_id, op.seq_id) for op in plan.ops] == [("b", 1)]


def test_a_suspect_behind_its_models_head_waits_without_stopping_others() -> None:
    suspect = model_queue(queued(PASS, 1, 10), queued(STEP, 2), model_id=ModelId("b"), tenant_id=TenantId("b"))
    other = model_queue(queued(PASS, 1, 10), model_id=ModelId("a"), tenant_id=TenantId("a"))
    plan, _ = plan_cycle(policy_input(suspect, other, quarantined=[op_request_id(ModelId("b"), 2)]))
    assert [(op.model_id, op.seq_id) for op in plan.ops] == [("a", 1), ("b", 1)]


def test_ops_without_tokens_ignore_the_budget_but_not_the_op_limit() -> None:
    models = [
        model_queue(*(queued(SAVE, seq_id) for seq_id in range(1, 11)), model_id=ModelId(f"m{i:03}"))
        for i in range(100)
    ]
    plan, _ = plan_cycle(policy_input(*models, budget_tokens=1))
    assert 0 < len(plan.ops) <= MAX_OPS_PER_CYCLE


def test_a_queue_that_was_consumed_already_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="consumed already"):
        plan_cycle(policy_input(model_queue(queued(PASS, 1, 10), next_seq_id=2)))
