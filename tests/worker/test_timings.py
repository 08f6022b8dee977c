"""A worker says how long the parts of a cycle took, and its log lines say which cycle and run they are of."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from worker_support import Driver, create, datums, item, model_id, passed, save, step

from treadle.domain.outcome import CycleOutcome, CyclePart
from treadle.telemetry.logs import configure_logging
from treadle.worker.compute import ComputeLoop
from treadle.worker.work import DecodedCycle


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged during the test, as JSON."""
    root, ours = logging.getLogger(), logging.getLogger("treadle")
    before = (root.handlers[:], root.level, ours.level)
    stream = io.StringIO()
    configure_logging(level="debug", style="json", stream=stream)
    yield stream
    root.handlers[:], root.level, ours.level = before


def run_cycle(driver: Driver, number: int) -> CycleOutcome:
    run = model_id(number)
    ops = (create(run), passed(run, 1, datums(2, 16)), step(run, 2), save(run, 3))
    loop = ComputeLoop(driver.worker, wake=lambda: None)
    loop.begin_cycle(DecodedCycle(token=1, cycle=number, items=tuple(item(op) for op in ops)))
    while (outcome := loop.run_unit().cycle) is None:
        pass
    return outcome


def test_the_parts_of_a_cycle_are_timed(driver: Driver) -> None:
    outcome = run_cycle(driver, 7)

    run = model_id(7)
    of = [(timing.part, timing.model_id, timing.request_id) for timing in outcome.timings]
    assert of == [
        (CyclePart.SETUP, run, f"{run}:0"),
        (CyclePart.PASSES, None, None),
        (CyclePart.STEPS, None, None),
        (CyclePart.PUBLISH, run, f"{run}:3"),
    ]
    began = [timing.began_at for timing in outcome.timings]
    assert began == sorted(began)
    assert all(timing.seconds > 0 for timing in outcome.timings)
    assert sum(timing.seconds for timing in outcome.timings) <= outcome.compute_s


def test_lines_of_a_worker_say_which_cycle_and_run_they_are_of(driver: Driver, lines: io.StringIO) -> None:
    for number in (7, 8):
        run_cycle(driver, number)

    events = [json.loads(line) for line in lines.getvalue().splitlines()]
    saves = [event for event in events if event.get("phase") == "save"]
    steps = [event for event in events if event.get("phase") == "stepped"]
    assert [(event["cycle"], event["request_id"]) for event in saves] == [(n, f"{model_id(n)}:3") for n in (7, 8)]
    assert [event["cycle"] for event in steps] == [7, 8]
    assert all("request_id" not in event for event in steps), "steps of all runs are taken together"
