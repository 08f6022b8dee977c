"""Who is suspected of a worker's death, in what company suspects run, and when one is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.ids import ModelId, RequestId
from treadle.scheduler.quarantine import MAX_DEATHS, THINNING, Quarantine

A, B = ModelId("a"), ModelId("b")


def ids(*names: str) -> list[RequestId]:
    return [RequestId(name) for name in names]


def cycle_dies(quarantine: Quarantine, *names: str) -> None:
    quarantine.cycle_begins(ids(*names))
    quarantine.worker_died()


def samples_die(quarantine: Quarantine, *names: str) -> None:
    quarantine.samples_begin(ids(*names))
    quarantine.worker_died()


def test_a_death_in_company_makes_suspects_and_counts_for_none() -> None:
    quarantine = Quarantine()
    for _ in range(MAX_DEATHS + 1):
        cycle_dies(quarantine, "a:1", "b:1")
    assert quarantine.suspects == set(ids("a:1", "b:1"))
    assert quarantine.verdict(RequestId("a:1")) is None


def test_the_third_death_alone_is_final() -> None:
    quarantine = Quarantine()
    for _ in range(MAX_DEATHS - 1):
        cycle_dies(quarantine, "a:1")
    assert quarantine.verdict(RequestId("a:1")) is None
    cycle_dies(quarantine, "a:1")
    assert quarantine.verdict(RequestId("a:1")) == "this request ended its worker 3 times"


def test_a_sample_in_flight_is_company() -> None:
    quarantine = Quarantine()
    for _ in range(MAX_DEATHS):
        quarantine.samples_begin(ids("s"))
        cycle_dies(quarantine, "a:1")
    assert quarantine.verdict(RequestId("a:1")) is None
    assert not quarantine.is_condemned(RequestId("s"))


def test_what_was_answered_was_not_in_flight() -> None:
    quarantine = Quarantine()
    quarantine.cycle_begins(ids("a:1"))
    quarantine.cycle_ended()
    quarantine.samples_begin(ids("s"))
    quarantine.sample_ended(RequestId("s"))
    quarantine.worker_died()
    assert not quarantine.suspects
    assert quarantine.admit_samples(ids("s")) == ids("s")


def test_samples_wait_until_suspects_of_training_are_cleared() -> None:
    quarantine = Quarantine()
    told: list[str] = []
    quarantine.on_change(lambda: told.append("changed"))
    cycle_dies(quarantine, "a:1", "b:1")
    assert quarantine.admit_samples(ids("s")) == []
    assert quarantine.isolated({A: ids("a:1")}, ()) is None
    assert quarantine.admit_samples(ids("s")) == []
    quarantine.clear(ids("a:1", "b:1"))
    quarantine.isolated({A: ids("a:2")}, ())
    assert told
    assert quarantine.admit_samples(ids("s")) == ids("s")


def test_a_suspect_that_cannot_run_keeps_nobody_waiting() -> None:
    """Its client is gone, or its run pauses: it is not among what could run."""
    quarantine = Quarantine()
    cycle_dies(quarantine, "a:1", "b:1")
    quarantine.isolated({}, ())
    assert quarantine.admit_samples(ids("s")) == ids("s")


def test_runs_go_one_at_a_time_once_a_suspect_has_killed_alone() -> None:
    quarantine = Quarantine()
    cycle_dies(quarantine, "a:1", "b:1")
    lines = {A: ids("a:0", "a:1"), B: ids("b:1")}
    assert quarantine.isolated(lines, ()) is None
    cycle_dies(quarantine, "a:1")
    assert quarantine.isolated(lines, ()) == B, "innocents first"
    quarantine.clear(ids("b:1"))
    assert quarantine.isolated({A: ids("a:0", "a:1"), B: ids("b:2")}, ()) == A


def test_runs_replay_one_at_a_time_while_a_replayed_op_is_suspect() -> None:
    quarantine = Quarantine()
    cycle_dies(quarantine, "a:1", "b:1")
    assert quarantine.isolated({A: ids("a:1"), B: ids("b:1")}, ids("a:1", "b:1")) == A
    quarantine.clear(ids("a:1"))
    assert quarantine.isolated({A: ids("a:2"), B: ids("b:1")}, ids("b:1")) == B


def test_an_outcome_that_cannot_be_stored_is_found_the_same_way() -> None:
    quarantine = Quarantine()
    quarantine.suspect_unstorable(ids("a:1", "b:1"))
    assert quarantine.suspects == set(ids("a:1", "b:1"))
    for _ in range(MAX_DEATHS):
        quarantine.suspect_unstorable(ids("a:1"))
    assert quarantine.verdict(RequestId("b:1")) is None
    assert quarantine.verdict(RequestId("a:1")) == "the outcome of this request could not be stored 3 times"


def test_one_death_suspects_no_sample() -> None:
    quarantine = Quarantine()
    samples_die(quarantine, "s", "t")
    assert quarantine.admit_samples(ids("s", "t", "u")) == ids("s", "t", "u")
    assert quarantine.may_train


def test_suspects_among_samples_are_thinned_out_until_one_is_alone() -> None:
    quarantine = Quarantine()
    names = [f"s{index}" for index in range(THINNING * THINNING)]
    for _ in range(2):
        samples_die(quarantine, *names)
    together = quarantine.admit_samples(ids(*names, "new"))
    assert together == ids(*names[:THINNING])
    assert quarantine.may_train
    samples_die(quarantine, *together)
    alone = quarantine.admit_samples(ids(*names, "new"))
    assert alone == ids(names[0])
    assert not quarantine.may_train, "it could not be alone beside a cycle"
    quarantine.samples_begin(alone)
    assert quarantine.admit_samples(ids(*names[1:])) == [], "one at a time"


def test_a_sample_waits_for_the_cycle_in_flight_before_it_runs_alone() -> None:
    quarantine = Quarantine()
    for _ in range(2):
        samples_die(quarantine, "s")
    quarantine.cycle_begins(ids("a:1"))
    assert quarantine.admit_samples(ids("s")) == []
    quarantine.cycle_ended()
    assert quarantine.admit_samples(ids("s")) == ids("s")


def test_a_cleared_sample_lets_cycles_go_on() -> None:
    quarantine = Quarantine()
    for _ in range(2):
        samples_die(quarantine, "s", "t")
    assert quarantine.admit_samples(ids("s", "t")) == ids("s")
    quarantine.samples_begin(ids("s"))
    for name in ("s", "t"):
        quarantine.sample_ended(RequestId(name))
    assert quarantine.admit_samples(ids("u", "v")) == ids("u", "v")
    assert quarantine.may_train


@given(num=st.integers(1, 300), guilty=st.integers(0, 299), others=st.booleans())
@pytest.mark.filterwarnings("error")
def test_one_guilty_sample_is_found_in_a_few_deaths(num: int, guilty: int, others: bool) -> None:
    quarantine = Quarantine()
    waiting = ids(*(f"s{index}" for index in range(num)))
    poison = waiting[guilty % num]
    num_deaths = 0
    while not quarantine.is_condemned(poison):
        if others and quarantine.may_train:
            quarantine.cycle_begins(ids("a:1"))
        quarantine.isolated({}, ())
        admitted = quarantine.admit_samples(waiting)
        if not admitted:
            quarantine.cycle_ended()
            continue
        quarantine.samples_begin(admitted)
        if poison in admitted:
            quarantine.worker_died()
            num_deaths += 1
            assert num_deaths < 12
        else:
            for request_id in admitted:
                quarantine.sample_ended(request_id)
                waiting.remove(request_id)
            quarantine.cycle_ended()
    assert all(not quarantine.is_condemned(request_id) for request_id in waiting if request_id != poison)


def test_a_worker_that_dies_while_it_starts_clears_nobody() -> None:
    quarantine = Quarantine()
    quarantine.cycle_begins(ids("a:1", "b:1"))
    quarantine.worker_died()
    quarantine.worker_died()
    assert quarantine.admit_samples(ids("s")) == [], "beside a suspect: its next death would not be told apart"
