"""OpenAI's and Anthropic's own clients against a real server: the same tokens and numbers as the SDK's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import psutil
import pytest
from e2e_support import MODEL, ServerProcess, batch, new_key, new_run, train_step
from tinker import types
from transformers import AutoTokenizer

import treadle

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

BUNDLED = Path(treadle.__file__).parent / "bundled" / "tiny"
PROMPT = "English: banana split\nPig Latin:"
CHAT = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture
def key() -> str:
    return new_key()


@pytest.fixture
def client(server: ServerProcess, key: str) -> Iterator[Any]:
    with openai.OpenAI(api_key=key, base_url=f"{server.url}/oai/api/v1", max_retries=0, timeout=60) as opened:
        yield opened


def sdk_sample(
    server: ServerProcess, key: str, tokens: list[int], num: int = 1, *, path: str | None = None, **params: Any
):
    """What the SDK samples for the same tokens and parameters."""
    options = {"base_model": MODEL} if path is None else {"model_path": path}
    sampler = server.service(key).create_sampling_client(**options)
    prompt = types.ModelInput.from_ints(tokens)
    return sampler.result(timeout=60).sample(prompt, num, types.SamplingParams(**params)).result(timeout=60)


def chat_tokens(tokenizer: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False))


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completions_are_the_sdks_samples(server: ServerProcess, client: Any, key: str, tokenizer: Any) -> None:
    tokens = tokenizer.encode(PROMPT)
    sampled = sdk_sample(server, key, tokens, 3, seed=7, max_tokens=12, temperature=0.8, top_p=0.95)
    answers = [
        client.completions.create(
            model=MODEL, prompt=prompt, n=3, seed=7, max_tokens=12, temperature=0.8, top_p=0.95, logprobs=0
        )
        for prompt in (PROMPT, tokens)
    ]
    for answer in answers:
        assert len(answer.choices) == 3
        for choice, sequence in zip(answer.choices, sampled.sequences, strict=True):
            assert choice.text == tokenizer.decode(sequence.tokens, skip_special_tokens=True)
            assert choice.finish_reason == sequence.stop_reason
            shown = choice.logprobs.token_logprobs
            assert shown == pytest.approx(sequence.logprobs[: len(shown)], abs=0)
            assert len(shown) >= len(sequence.tokens) - 1
        assert answer.usage.prompt_tokens == len(tokens)
        assert answer.usage.completion_tokens == sum(len(sequence.tokens) for sequence in sampled.sequences)
    assert len({choice.text for choice in answers[0].choices}) > 1


def test_chats_are_the_sdks_samples_behind_the_template(
    server: ServerProcess, client: Any, key: str, tokenizer: Any
) -> None:
    sampled = sdk_sample(server, key, chat_tokens(tokenizer), seed=3, max_tokens=20)
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, seed=3, max_completion_tokens=20, logprobs=True, top_logprobs=2
    )
    (choice,), (sequence,) = answer.choices, sampled.sequences
    assert choice.message.role == "assistant"
    assert choice.message.content == tokenizer.decode(sequence.tokens, skip_special_tokens=True)
    content = choice.logprobs.content
    assert [token.logprob for token in content] == pytest.approx(sequence.logprobs[: len(content)], abs=0)
    assert "".join(token.token for token in content) == choice.message.content
    for token in content:
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 2
        assert best == sorted(best, reverse=True)
        assert best[0] >= token.logprob - 1e-6


def test_a_stop_ends_the_text_and_is_not_in_it(server: ServerProcess, client: Any, key: str, tokenizer: Any) -> None:
    free = client.completions.create(model=MODEL, prompt=PROMPT, seed=1, max_tokens=30, temperature=0)
    stop = free.choices[0].text[3:6]
    answer = client.completions.create(model=MODEL, prompt=PROMPT, seed=1, max_tokens=30, temperature=0, stop=[stop])
    assert answer.choices[0].text == free.choices[0].text[: free.choices[0].text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    sampled = sdk_sample(server, key, tokenizer.encode(PROMPT), seed=1, max_tokens=30, temperature=0.0, stop=[stop])
    assert answer.usage.completion_tokens == len(sampled.sequences[0].tokens)


def test_a_stream_is_the_whole_answer_in_pieces(client: Any) -> None:
    options = {
        "model": MODEL,
        "messages": CHAT,
        "seed": 5,
        "n": 2,
        "max_tokens": 150,
        "temperature": 1.5,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts, logprobs, reasons = ["", ""], [[], []], [None, None]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_stream_shows_tokens_while_they_are_sampled(client: Any) -> None:
    options = {"model": MODEL, "prompt": PROMPT, "seed": 0, "max_tokens": 200, "logprobs": 0, "temperature": 2.0}
    whole = client.completions.create(**options)
    assert whole.usage.completion_tokens == 200
    pieces = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    logprobs = [logprob for piece in pieces if piece.logprobs for logprob in piece.logprobs.token_logprobs]
    assert logprobs == whole.choices[0].logprobs.token_logprobs
    # So many tokens take the sampler several units of work, and each is told.
    assert sum(bool(piece.text) for piece in pieces) > 2


def test_checkpoints_are_models(server: ServerProcess, client: Any, key: str, tokenizer: Any) -> None:
    training = new_run(server.service(key))
    for _ in range(3):
        train_step(training, batch(), lr=1e-2)
    for saved in (training.save_weights_for_sampler("mine"), training.save_state("state")):
        path = saved.result(timeout=60).path
        sampled = sdk_sample(server, key, tokenizer.encode(PROMPT), path=path, seed=2, max_tokens=10)
        for name in (path, f"{MODEL};{path}"):
            answer = client.completions.create(model=name, prompt=PROMPT, seed=2, max_tokens=10, logprobs=0)
            shown = answer.choices[0].logprobs.token_logprobs
            assert shown == pytest.approx(sampled.sequences[0].logprobs[: len(shown)], abs=0)
        with openai.OpenAI(api_key=new_key(), base_url=f"{server.url}/v1", max_retries=0) as stranger:
            with pytest.raises(openai.NotFoundError) as refusal:
                stranger.completions.create(model=path, prompt=PROMPT)
            assert refusal.value.code == "model_not_found"


def test_errors_are_openais(server: ServerProcess, client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no/such-model", messages=CHAT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="word " * 3_000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=MODEL, messages=CHAT, presence_penalty=1.0)
    assert unknown.value.param == "presence_penalty"
    with (
        openai.OpenAI(api_key="sk-other", base_url=f"{server.url}/v1", max_retries=0) as nobody,
        pytest.raises(openai.AuthenticationError),
    ):
        nobody.models.list()


def test_a_client_that_leaves_a_stream_frees_the_sampler(server: ServerProcess, client: Any, key: str) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=CHAT, seed=1, n=64, temperature=2.0, stream=True)
    first = next(iter(stream))
    request_id = first.id.removeprefix("chatcmpl-")
    stream.close()
    with server.http(key) as http:
        deadline = time.monotonic() + 20
        while (answer := http.post("retrieve_future", json={"request_id": request_id})).status_code == 408:
            assert time.monotonic() < deadline
        assert "cancelled" in answer.json()["error"]


def test_anthropics_client_works(server: ServerProcess, key: str, tokenizer: Any) -> None:
    with anthropic.Anthropic(api_key=key, base_url=f"{server.url}/anthropic/api", max_retries=0) as client:
        options: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": CHAT}
        # Newer clients have no such parameter.
        options["extra_body"] = {"temperature": 0.0}
        message = client.messages.create(**options)
        sampled = sdk_sample(server, key, chat_tokens(tokenizer), max_tokens=20, temperature=0.0)
        (sequence,) = sampled.sequences
        assert message.content[0].text == tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        assert message.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[sequence.stop_reason]
        assert message.usage.output_tokens == len(sequence.tokens)
        with client.messages.stream(**options) as stream:
            assert "".join(stream.text_stream) == message.content[0].text
            assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens
        assert client.messages.count_tokens(model=MODEL, messages=CHAT).input_tokens == len(chat_tokens(tokenizer))
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**options, "model": "nope"})


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was_when_its_worker_dies(own_server: ServerProcess, key: str) -> None:
    """The next worker draws the same tokens again, and what was sent is not sent twice."""
    with openai.OpenAI(api_key=key, base_url=f"{own_server.url}/v1", max_retries=0, timeout=100) as client:
        options = {"model": MODEL, "prompt": PROMPT, "seed": 0, "max_tokens": 400, "temperature": 2.0}
        whole = client.completions.create(**options)
        text, num_before = "", 0
        for chunk in client.completions.create(**options, stream=True):
            text += chunk.choices[0].text
            if not num_before and len(text) > 20:
                num_before = len(text)
                assert own_server.process is not None
                (worker,) = psutil.Process(own_server.process.pid).children()
                os.kill(worker.pid, signal.SIGKILL)
        assert 0 < num_before < len(text)
        assert text == whole.choices[0].text
