"""The bundled tiny model: its files, its tokenizer, its text and what it does before any training.

Nothing here trains. That the model fine-tunes well is a matter for the demonstrations, not for a unit test.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "src" / "treadle" / "bundled" / "tiny"
MOST_BYTES = 8_000_000
MOST_PARAMETERS = 3_000_000

PIG_LATIN = (
    ("banana split", "anana-bay plit-say"),
    ("quantum physics", "uantum-qay ysics-phay"),
    ("donut shop", "onut-day op-shay"),
    ("pickle jar", "ickle-pay ar-jay"),
    ("space exploration", "ace-spay exploration-way"),
    ("rubber duck", "ubber-ray uck-day"),
    ("coding wizard", "oding-cay izard-way"),
)


def _load_corpus() -> ModuleType:
    # The generator lives beside the script that uses it, outside every package.
    spec = importlib.util.spec_from_file_location("tiny_corpus", ROOT / "scripts" / "tiny_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    return _load_corpus()


@pytest.fixture(scope="module")
def corpus_texts(corpus: ModuleType) -> list[str]:
    return [corpus.text_of(document) for document in corpus.documents(0)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def _greedy(model: PreTrainedModel, prompt: Sequence[int], limit: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        for _ in range(limit):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    made: list[int] = ids[0, len(prompt) :].tolist()
    return made


def test_the_files_are_there_and_small() -> None:
    names = {path.name for path in TINY.iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= MOST_BYTES


def test_the_text_holds_no_pig_latin(corpus_texts: list[str]) -> None:
    text = "\n".join(corpus_texts).lower()
    assert len(text) > 5_000_000
    unwanted = {"pig latin"}
    for source, target in PIG_LATIN:
        unwanted |= {source, target, *target.split()}
    assert sorted(phrase for phrase in unwanted if phrase in text) == []


def test_the_text_is_the_same_for_the_same_seed(corpus: ModuleType) -> None:
    assert list(corpus.documents(3, 200)) == list(corpus.documents(3, 200))
    assert list(corpus.documents(3, 200)) != list(corpus.documents(4, 200))


def test_the_configuration_and_the_tokenizer_agree(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048
    # The vocabulary is a multiple of 64 and has no padding: every row of the embedding is a token.
    assert config["vocab_size"] == len(tokenizer) == len(tokenizer.get_vocab())
    assert config["vocab_size"] % 64 == 0
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMETERS


def test_the_special_tokens_end_texts_and_turns(tokenizer: PreTrainedTokenizerBase, corpus: ModuleType) -> None:
    for token in corpus.SPECIAL_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    ends = json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    assert json.loads((TINY / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces \t\n\n ends ",
        "plain words, 1234567890",
        "caf\u00e9 cafe\u0301 \u4f60\u597d \u0434\u0430",
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "".join(map(chr, range(256))),
        "English: banana split\nPig Latin: anana-bay plit-say\n\n",
    ],
)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < len(tokenizer) for token in ids)


def test_encoding_adds_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.encode("one dog") == tokenizer.encode("one dog", add_special_tokens=False)


def test_the_chat_template(tokenizer: PreTrainedTokenizerBase, corpus: ModuleType) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is 2 + 3?"},
    ]
    expected = "".join(corpus.chat_turn(message["role"], message["content"]) for message in messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"


def test_a_small_sum_is_answered_and_ended(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    right = 0
    for a, b in ((1, 2), (2, 2), (3, 4), (5, 1), (6, 3), (4, 4)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {a} + {b}?"}], tokenize=False, add_generation_prompt=True
        )
        made = _greedy(model, tokenizer.encode(prompt, add_special_tokens=False), 3)
        right += tokenizer.decode(made).startswith(f"{a + b}<|im_end|>")
    assert right >= 3


def test_pig_latin_is_not_known_before_training(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    right = 0
    for source, target in PIG_LATIN:
        prompt = tokenizer.encode(f"English: {source}\nPig Latin:", add_special_tokens=False)
        made = _greedy(model, prompt, len(tokenizer.encode(f" {target}\n\n", add_special_tokens=False)))
        right += tokenizer.decode(made).strip().startswith(target)
    assert right <= 1
