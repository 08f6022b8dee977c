"""Samples that cannot be, beside one that can: each gets a clear, quick user error, and the other keeps its bits."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from e2e_support import MODEL, ServerProcess, failure_of, new_key
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

QUICK_S = 15.0
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [10, 11, 12]}]}
CONTEXT = 2048

# What is wrong, and a word of the error that names it.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a negative top_k": ({"sampling_params": {"max_tokens": 4, "top_k": -5}}, "top_k"),
    "top_k 0": ({"sampling_params": {"max_tokens": 4, "top_k": 0}}, "top_k"),
    "a seed beyond 64 bits": ({"sampling_params": {"max_tokens": 4, "seed": 2**64}}, "seed"),
    "a negative seed": ({"sampling_params": {"max_tokens": 4, "seed": -(2**70)}}, "seed"),
    "a seed that is no integer": ({"sampling_params": {"max_tokens": 4, "seed": 1.5}}, "seed"),
    "an empty prompt": ({"prompt": {"chunks": []}}, "prompt"),
    "a prompt of an empty chunk": ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": []}]}}, "prompt"),
    "10,000 stop strings": ({"sampling_params": {"max_tokens": 4, "stop": [f"s{i}" for i in range(10_000)]}}, "stop"),
    "prompt and answer over the context": ({"sampling_params": {"max_tokens": CONTEXT}}, str(CONTEXT)),
    "no samples": ({"num_samples": 0}, "num_samples"),
    "a token beyond the vocabulary": ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [10**6]}]}}, "1000000"),
}


def sampled(server: ServerProcess, key: str) -> Any:
    sampler = server.service(key).create_sampling_client(base_model=MODEL).result(timeout=60)
    prompt = types.ModelInput.from_ints(list(range(10, 40)))
    params = types.SamplingParams(max_tokens=400, temperature=1.0, seed=7, stop=[])
    return sampler.sample(prompt, 2, params)


def contents_of(future: Any) -> list[tuple[list[int], list[float]]]:
    return [(list(one.tokens), list(one.logprobs or [])) for one in future.result(timeout=60).sequences]


def told(server: ServerProcess, http: httpx.Client, session: str, seq: int, changes: dict[str, Any]) -> str:
    """What the server says to a sample that is changed so, at once or as the end of its future."""
    body = {
        "sampling_session_id": session,
        "seq_id": seq,
        "prompt": PROMPT,
        "num_samples": 1,
        "sampling_params": {"max_tokens": 4},
        **changes,
    }
    answer = http.post("asample", json=body)
    if answer.status_code == 200:
        answer = http.post("retrieve_future", json={"request_id": answer.json()["request_id"]}, timeout=QUICK_S)
        found: dict[str, Any] = answer.json()
        assert found.get("category") == "user", found
        return str(found["error"])
    assert answer.status_code in (400, 422), answer.text
    return answer.text


def test_bad_samples_are_named_and_leave_their_neighbour_its_bits(server: ServerProcess) -> None:
    key = new_key()
    alone = contents_of(sampled(server, key))
    beside = sampled(server, key)
    with server.http() as http:
        first = http.post("create_session", json={"tags": [], "sdk_version": "0.38.0"}).json()["session_id"]
        body = {"session_id": first, "sampling_session_seq_id": 0, "base_model": MODEL}
        session = http.post("create_sampling_session", json=body).json()["sampling_session_id"]
        for seq, (name, (changes, word)) in enumerate(BAD.items()):
            assert word in told(server, http, session, seq, changes), name
    assert contents_of(beside) == alone


def test_a_client_that_sampled_badly_samples_on(server: ServerProcess) -> None:
    sampler = server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    prompt = types.ModelInput.from_ints([10, 11])
    bad = types.SamplingParams(max_tokens=4, top_k=-7)
    assert failure_of(sampler.sample(prompt, 1, bad), timeout_s=QUICK_S) is not None
    assert sampler.sample(prompt, 1, types.SamplingParams(max_tokens=4)).result(timeout=QUICK_S).sequences
