"""scripts/cookbook: the same data for the same seed, in the columns that recipes read; and when an aim is met."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def material(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for directory in (SCRIPTS, SCRIPTS / "cookbook"):
        monkeypatch.syspath_prepend(directory)
    return importlib.import_module("material")


def test_the_same_seed_writes_the_same_files_and_splits_share_no_exercise(material: ModuleType, tmp_path: Path) -> None:
    amounts = material.Amounts(conversations=40, comparisons=30, prompts=20, tests=10)
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    for directory, seed in ((first, 0), (again, 0), (other, 1)):
        assert (material.write(directory, amounts, seed=seed) / "tokenizer.json").is_file()
    paths = sorted(path.relative_to(first) for path in first.rglob("*.jsonl"))
    assert len(paths) == 5
    for path in paths:
        assert (first / path).read_bytes() == (again / path).read_bytes()
        assert (first / path).read_bytes() != (other / path).read_bytes()
    train = _questions(first / material.CONVERSATIONS / "train.jsonl")
    test = _questions(first / material.CONVERSATIONS / "test.jsonl")
    prompts = {row["question"] for row in _rows(first / material.PROMPTS / "train.jsonl")}
    assert (len(train), len(test), len(prompts)) == (40, 10, 20)
    assert train.isdisjoint(test)
    assert prompts.isdisjoint(train | test)


def test_comparisons_differ_in_the_answer_alone(material: ModuleType, tmp_path: Path) -> None:
    material.write(tmp_path, material.Amounts(conversations=1, comparisons=30, prompts=1, tests=5), seed=0)
    for row in _rows(tmp_path / material.COMPARISONS / "train.jsonl"):
        asked, chosen = row["chosen"].split("\n\nAssistant: ")
        assert asked.startswith("\n\nHuman: ")
        assert row["rejected"].startswith(f"{asked}\n\nAssistant: ")
        assert chosen == row["rejected"].split("\n\nAssistant: ")[1] + ", thank you for asking."


def test_the_word_game_follows_its_rule(material: ModuleType) -> None:
    rng = random.Random(5)
    for _ in range(50):
        question, answer = material.word_game(rng)
        words = question.removeprefix("Say in Pig Latin: ").split()
        for word, said in zip(words, answer.split(), strict=True):
            assert said == (f"{word}-way" if word[0] in "aeiou" else f"{word[1:]}-{word[0]}ay")


def test_an_aim_compares_the_means_of_both_ends(material: ModuleType) -> None:
    recipes = importlib.import_module("recipes")
    rises = recipes.Aim("reward", num_first=1, num_last=2, least_rise=0.3)
    assert rises.judge([0.1, 0.9, 0.3, 0.5])["is_met"]
    assert not rises.judge([0.1, 0.9, 0.2, 0.5])["is_met"]
    halves = recipes.Aim("kl", num_first=2, num_last=1, most_left=0.5)
    assert halves.judge([3.0, 5.0, 2.0])["is_met"]
    assert not halves.judge([3.0, 4.8, 2.0])["is_met"]


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _questions(path: Path) -> set[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["messages"][0]["content"] for row in rows}
