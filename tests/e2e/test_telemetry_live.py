"""One live server with everything on: its log lines, its metrics and its traces tell the same story of one run."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from e2e_support import ServerProcess, datum, new_key
from tinker import types

from treadle.telemetry.tracing import request_trace
from treadle.testing.otlp_collector import attributes_of, collecting

pytestmark = pytest.mark.slow


def test_lines_metrics_and_traces_tell_one_story(tmp_path: Path) -> None:
    lines: list[str] = []
    key = new_key()
    with collecting() as collector:
        env = {
            "TREADLE_LOG__FORMAT": "json",
            "TREADLE_LOG__LEVEL": "debug",
            "TREADLE_OTEL__ENDPOINT": collector.endpoint,
        }
        with ServerProcess(tmp_path / "data", env=env, on_log=lines.append) as server:
            client = server.training_client(key)
            passed = client.forward_backward([datum([1, 2, 3, 4])], "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=60)
            passed.result(timeout=60)
            sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
            prompt = types.ModelInput.from_ints([1, 2, 3])
            sampler.sample(prompt, num_samples=2, sampling_params=types.SamplingParams(max_tokens=4)).result(timeout=60)
            scraped = httpx.get(f"{server.url}/metrics").text
            assert server.terminate() == 0
            model_id = client.model_id

    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert not [line for line in lines if line and not line.startswith("{")], "every line is JSON"
    assert key not in "".join(lines)
    request_id = f"{model_id}:1"
    queued = [event for event in events if event.get("phase") == "queued" and event["request_id"] == request_id]
    assert len(queued) == 1
    assert queued[0]["call_id"]
    assert queued[0]["tenant_id"]
    begun = {event["cycle"] for event in events if event.get("phase") == "cycle begun"}
    stepped = [event for event in events if event.get("phase") == "stepped"]
    assert stepped
    assert {event["cycle"] for event in stepped} <= begun
    assert all(event["pool"] == "treadle/tiny" for event in stepped), "a worker's lines say whose they are"
    saves = [event for event in events if event.get("phase") == "save for sampler"]
    assert [event["model_id"] for event in saves] == [model_id]

    for text in (
        'treadle_pool_ready{pool="treadle/tiny"} 1.0',
        'treadle_pool_leader{pool="treadle/tiny"} 1.0',
        'treadle_pool_workers{pool="treadle/tiny",state="up"} 1.0',
        'treadle_resident_runs{pool="treadle/tiny"} 1.0',
        'treadle_finished_requests_total{kind="forward_backward",pool="treadle/tiny"} 1.0',
        'treadle_failed_requests_total{category="server",kind="sample",pool="treadle/tiny"} 0.0',
        'treadle_worker_deaths_total{pool="treadle/tiny",worker="0"} 0.0',
        'treadle_lease_changes_total{change="acquired",pool="treadle/tiny"} 1.0',
        'treadle_worker_resident_bytes{pool="treadle/tiny",worker="0"} ',
        "process_resident_memory_bytes ",
    ):
        assert text in scraped, text
    assert key not in scraped
    assert model_id not in scraped

    trace_id = request_trace(request_id).trace_id.to_bytes(16, "big")
    spans = [span for span in collector.spans if span.trace_id == trace_id]
    names = [span.name for span in spans]
    assert {"forward_backward", "queued", "run", "passes", "POST /api/v1/forward_backward"} <= set(names)
    assert "POST /api/v1/retrieve_future" in names
    [root] = [span for span in spans if span.name == "forward_backward"]
    assert attributes_of(root)["treadle.model_id"] == model_id
    assert {"sampling", "sample"} <= {span.name for span in collector.spans}
