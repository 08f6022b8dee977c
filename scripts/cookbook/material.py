"""Local stand-ins for what the cookbook would download: data sets, and the tokenizer of a model it knows.

Directories named like hub ids in the working directory of a recipe; `datasets` and `transformers` look there first.
The exercises are of the kinds that the bundled model was trained on (scripts/tiny_corpus.py), but for the word game
that it never saw. Knows neither the server nor the recipes.
Invariant: the same seed writes the same files, and no exercise of a test split is in its train split.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tiny_corpus

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "src" / "treadle" / "bundled" / "tiny"
# The cookbook finds renderers by base-model name. This one gets role_colon, which the bundled model has never seen.
MODEL = "Qwen/Qwen3-8B-Base"

CONVERSATIONS = "HuggingFaceH4/no_robots"
COMPARISONS = "Anthropic/hh-rlhf"
PROMPTS = "zwhe99/DeepMath-103K"

_DPO_TASKS = (
    tiny_corpus.add_digits,
    tiny_corpus.copy_words,
    tiny_corpus.last_word,
    tiny_corpus.first_word,
    tiny_corpus.opposite,
    tiny_corpus.count_up,
    tiny_corpus.plural,
)
_POLITE = ", thank you for asking."


@dataclass(frozen=True)
class Amounts:
    """How many exercises each data set has."""

    conversations: int
    comparisons: int
    prompts: int
    tests: int


def write(directory: Path, amounts: Amounts, *, seed: int) -> Path:
    """Everything that the recipes look up by name, below `directory`; the model's directory there."""
    model = directory / MODEL
    shutil.copytree(BUNDLED_MODEL, model)
    games = _distinct(random.Random(seed), word_game, amounts.conversations + amounts.prompts + amounts.tests)
    train, rest = games[: amounts.conversations], games[amounts.conversations :]
    prompts, tests = rest[: amounts.prompts], rest[amounts.prompts :]
    _write_split(directory, CONVERSATIONS, "train", map(_conversation, train))
    _write_split(directory, CONVERSATIONS, "test", map(_conversation, tests))
    _write_split(directory, PROMPTS, "train", ({"question": question} for question, _ in prompts))
    pairs = _distinct(random.Random(seed + 1), _task, amounts.comparisons + amounts.tests)
    _write_split(directory, COMPARISONS, "train", map(_comparison, pairs[amounts.tests :]))
    _write_split(directory, COMPARISONS, "test", map(_comparison, pairs[: amounts.tests]))
    return model


Exercise = tuple[str, str]


def word_game(rng: random.Random) -> Exercise:
    """One or two words, and the same in Pig Latin: the first letter goes last, then "ay"; vowels stay and get "way"."""
    words = [tiny_corpus.any_word(rng) for _ in range(rng.choice((1, 2)))]
    return f"Say in Pig Latin: {' '.join(words)}", " ".join(map(_pig_latin, words))


def _pig_latin(word: str) -> str:
    return f"{word}-way" if word[0] in "aeiou" else f"{word[1:]}-{word[0]}ay"


def _task(rng: random.Random) -> Exercise:
    example = rng.choice(_DPO_TASKS)(rng)
    return example.question, example.answer


def _distinct(rng: random.Random, draw: Callable[[random.Random], Exercise], count: int) -> list[Exercise]:
    """`count` exercises with different questions, in the order drawn."""
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = draw(rng)
        found.setdefault(question, answer)
    return list(found.items())


def _conversation(exercise: Exercise) -> Mapping[str, object]:
    question, answer = exercise
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _comparison(exercise: Exercise) -> Mapping[str, str]:
    """The polite answer is preferred to the bare one, which is what the model would say."""
    question, answer = exercise
    asked = f"\n\nHuman: {question}\n\nAssistant: {answer}"
    return {"chosen": asked + _POLITE, "rejected": asked}


def _write_split(directory: Path, name: str, split: str, rows: Iterable[Mapping[str, object]]) -> None:
    path = directory / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
