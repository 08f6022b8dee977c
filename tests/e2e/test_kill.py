"""Workers and servers killed under training clients: clients see latency, and nothing else.

The short version of the campaign runs by default, the whole one is slow; `scripts/kill_campaign` writes its figures.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from kill_campaign import NUM_TENANTS, Aim, Campaign, Kill, Victim, plan, summary
from kill_campaign_crowd import CampaignFailed, Crowd, Diary, Reference

from treadle.telemetry.phases import Phase

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

# Each phase of the worker's and the server's that has a cost of its own, each victim, and a death during a recovery.
SHORT = (
    Aim(Phase.MID_PASS, Victim.WORKER),
    Aim(Phase.OUTCOME_RECEIVED, Victim.SERVER),
    Aim(Phase.STEPPED, Victim.WORKER),
    Aim(Phase.SAVE, Victim.WORKER),
    Aim(Phase.SAMPLING, Victim.WORKER),
    Aim(Phase.CYCLE_BEGUN, Victim.BOTH),
    Aim(Phase.RESTORED, Victim.WORKER),
    Aim(Phase.SAVE_FOR_SAMPLER, Victim.WORKER),
    Aim(Phase.LOAD, Victim.SERVER),
    Aim(Phase.QUEUED, Victim.WORKER),
)


# A minute and a half on two idle cores, and many times that on busy ones.
@pytest.mark.timeout(900)
def test_ten_kills_change_no_number_and_reach_no_client(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed=1)
    campaign.write_reference()
    campaign.run_leg(SHORT)
    assert [kill.cell for kill in campaign.kills] == [aim.cell for aim in SHORT], "a phase was never reached"
    # What was compared is what the name of this test says.
    assert campaign.num_rounds >= NUM_TENANTS
    assert campaign.num_states >= NUM_TENANTS


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_hundreds_of_kills_at_every_phase_change_no_number(tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    campaign = Campaign(tmp_path, seed=seed)
    campaign.write_reference()
    while left := plan(10, Counter(kill.cell for kill in campaign.kills)):
        random.Random(seed + len(campaign.kills)).shuffle(left)
        campaign.run_leg(left[:30])
    print(json.dumps(summary(campaign.kills), indent=1))


def test_a_plan_asks_for_every_phase_with_both_processes() -> None:
    left = Counter(aim.cell for aim in plan(10, Counter()))
    assert sum(left.values()) >= 200
    for phase in Phase:
        for victim in (Victim.WORKER, Victim.SERVER):
            assert left[Aim(phase, victim).cell] == 10
    done = Counter({Aim(Phase.SAVE, Victim.SERVER).cell: 4})
    assert Counter(aim.cell for aim in plan(10, done))[Aim(Phase.SAVE, Victim.SERVER).cell] == 6


def test_an_answer_that_differs_in_one_bit_is_a_problem() -> None:
    diary = Diary(answers=[("stepped", {"num_steps": 1.0}), ("stepped", {"num_steps": 2.0})])
    reference = Reference((diary,), ((),))

    def problems_after(*told: tuple[str, object]) -> list[str]:
        crowd = Crowd("http://nowhere", seed=1, num_tenants=1, reference=reference, log=Path("/dev/null"))
        for what, value in told:
            crowd.book({"tenant": 0, "round": 0, "what": what, "value": value, "path": None})
        return crowd.problems

    first, second = diary.answers
    assert problems_after(first, second, ("round over", None)) == []
    assert len(problems_after(first, ("stepped", {"num_steps": 2.0000000000000004}))) == 1
    assert len(problems_after(first, second, second)) == 1  # doubled
    assert len(problems_after(first, ("round over", None))) == 1  # lost
    assert len(problems_after(("error", "APIConnectionError"))) == 1


def test_a_tenant_that_is_told_nothing_fails_the_campaign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kill_campaign_crowd.MAX_PAUSE_S", 0.01)
    crowd = Crowd("http://nowhere", seed=1, num_tenants=2, reference=None, log=Path("/dev/null"))
    crowd.book({"tenant": 1, "round": 0, "what": "stepped", "value": None, "path": None})
    with pytest.raises(CampaignFailed, match="tenant 0 behind answer 0"):
        crowd.wait_for_answers(0.0)


def test_pauses_are_told_by_victim() -> None:
    kills = [Kill("any time / worker", 0.0, 0.1, (1.0, 2.0)), Kill("save / server", 0.0, 0.1, (5.0,))]
    found = summary(kills)
    assert found["pause_s_after_worker"] == {"p50": 1.5, "p95": 2.0, "max": 2.0}
    assert found["pause_s_after_server"]["max"] == 5.0
    assert found["num_kills"] == 2
