"""What an operator is told of a graph: where it is finite, whether its gradient is its derivative, what it costs."""

from __future__ import annotations

import json
from typing import Any

import torch

from treadle.review import dry_run
from treadle.review.process import ReviewProcess
from treadle.review.tracing import trace_file
from treadle.wire.graphs import write_custom_loss


def report_on(expression: str, *, ranks: str = '{"logprobs": 1, "advantages": 1}') -> dict[str, Any]:
    """The report on a loss of these inputs."""
    names = ", ".join(json.loads(ranks))
    source = f"import torch\nINPUTS = {ranks}\ndef loss({names}):\n    return {expression}, {{}}\n"
    return dry_run.report_on(trace_file(source, "mine"))


def case(report: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = [case for case in report["inputs"] if case["kind"] == kind]
    return dict(found)


def test_a_plain_loss_is_fine_with_everything() -> None:
    report = report_on("-(torch.exp(logprobs) * advantages).sum()")
    assert report["is_ok"] is True
    assert [case["is_ok"] for case in report["inputs"]] == [True] * 4
    assert {case["gradient"] for case in report["inputs"]} == {"agrees"}
    assert report["one_token"] == report["long_datum"] == "ok"
    assert set(report["ms_per_2048_tokens"]) == {"one datum", "16 datums"}
    assert report["peak_bytes"] >= 0


def test_columns_and_scalars_have_their_shapes() -> None:
    ranks = '{"logprobs": 2, "weights": 2, "scale": 0, "per_token": 1}'
    assert report_on("(logprobs * weights * scale * per_token[:, None]).sum()", ranks=ranks)["is_ok"] is True


def test_one_kind_of_inputs_is_enough_and_the_others_say_why_not() -> None:
    report = report_on("(logprobs * torch.log(advantages)).sum()")
    assert report["is_ok"] is True
    assert "is not finite" in case(report, "normal")["reason"]
    assert case(report, "between 0 and 1")["is_ok"] is True


def test_a_loss_that_is_never_finite_is_refused_with_the_reason() -> None:
    report = report_on("(logprobs / (advantages - advantages)).sum()")
    assert report["is_ok"] is False
    assert "is not finite" in report["reason"]
    assert "ms_per_2048_tokens" not in report


def test_a_loss_without_a_gradient_is_refused() -> None:
    assert "does not depend on logprobs" in report_on("(logprobs.detach() * advantages).sum()")["reason"]
    assert "does not depend on logprobs" in report_on("advantages.sum()")["reason"]


def test_an_operation_that_does_not_fit_is_refused_by_name() -> None:
    assert "view (node 'view')" in report_on("logprobs.view(5).sum()")["reason"]


def test_a_gradient_that_is_another_one_on_purpose_is_not_compared() -> None:
    report = report_on("(torch.exp(logprobs).detach() * logprobs * advantages).sum()")
    assert report["is_ok"] is True
    assert case(report, "normal")["gradient"] == "not compared"


def test_a_gradient_that_is_not_the_derivative_is_found(monkeypatch: Any) -> None:
    """No operation of ours has such a one, so the comparison is told of a slope that is not there."""
    monkeypatch.setattr(dry_run, "_slope", lambda *_: 1.0)
    report = report_on("(logprobs * advantages).sum()")
    assert report["is_ok"] is False
    assert "not the derivative" in report["reason"]


def test_a_kink_is_no_mistake() -> None:
    assert case(report_on("torch.relu(logprobs + 1).sum()", ranks='{"logprobs": 1}'), "normal")["gradient"] == "agrees"


def test_numbers_that_depend_on_the_company_are_found() -> None:
    loss = trace_file("INPUTS = {'logprobs': 1}\ndef loss(logprobs): return logprobs.sum(), {}", "mine")
    samples = [dry_run._datum(loss, length, "ones", length) for length in (3, 4)]
    alone = [dry_run._terms(loss, [sample]) for sample in samples]
    assert dry_run._neighbours(loss, samples, alone) is None
    alone[1].grad[0, 0] = torch.nextafter(alone[1].grad[0, 0], torch.tensor(9.0))
    assert "depend on what else" in str(dry_run._neighbours(loss, samples, alone))


def test_what_a_long_datum_costs_too_much_is_said() -> None:
    report = report_on("(logprobs[:, None, None] * torch.ones_like(logprobs)[None, :, None]).sum() * advantages.sum()")
    assert report["is_ok"] is True
    cubic = "(logprobs[:, None, None] * advantages[None, :, None] * advantages[None, None, :]).sum()"
    assert "allowed are" in report_on(cubic)["long_datum"]


def test_what_fails_for_the_datums_of_the_measurement_is_said() -> None:
    # Finite for every length but theirs.
    report = report_on("(logprobs / ((logprobs * 0 + 1).sum() - 128)).sum()", ranks='{"logprobs": 1}')
    assert report["is_ok"] is True
    assert "is not finite" in report["many_datums"]
    assert report["ms_per_2048_tokens"]["16 datums"] is None


def test_it_runs_in_a_process_of_its_own() -> None:
    loss = trace_file("INPUTS = {'logprobs': 1}\ndef loss(logprobs): return logprobs.sum(), {}", "mine")
    answer = ReviewProcess("dry_run", timeout_s=60.0, needs=frozenset()).ask(write_custom_loss(loss))
    assert json.loads(answer.body)["is_ok"] is True
