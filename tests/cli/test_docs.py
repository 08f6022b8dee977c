"""Docs that can be wrong are checked: made pages are current, examples parse, links and named files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.config import load_settings

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").rglob("*.md")])


def test_made_pages_are_current() -> None:
    script = REPOSITORY / "scripts" / "make_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_examples_can_be_started_with(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        file = tmp_path / "example.toml"
        file.write_text(example, encoding="utf-8")
        load_settings(file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_walk_through_names_code_that_exists() -> None:
    text = (REPOSITORY / "docs" / "structures.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+/[a-z_/]+\.py|[a-z_]+\.py)`(?:[^`\n]{0,3}`([A-Za-z_.]+)`)?", text)
    assert len(named) > 10
    for path, symbol in named:
        file = REPOSITORY / "src" / "treadle" / path
        assert file.is_file(), path
        if symbol:
            source = file.read_text(encoding="utf-8")
            assert re.search(rf"(def|class) {re.escape(symbol.split('.')[-1])}\b", source), f"{path} {symbol}"


def test_the_readme_opens_with_the_two_commands_and_a_picture() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.index("scripts/demo") < text.index("scripts/test") < text.index("```mermaid") < 1500
