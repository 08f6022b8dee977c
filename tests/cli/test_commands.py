"""The command line as its users see it: which commands and options exist, how errors end, how fast help is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from treadle import __version__
from treadle.cli.app import app, main

# The frozen surface. A removed or renamed line breaks somebody's script: change it with an entry in CHANGELOG.md.
SURFACE = {
    "admin audit": [
        "--actor",
        "--before",
        "--event",
        "--json",
        "--key-file",
        "--limit",
        "--since",
        "--subject",
        "--url",
    ],
    "admin checkpoints delete": ["--json", "--key-file", "--url", "path"],
    "admin checkpoints list": ["--json", "--key-file", "--limit", "--public", "--tenant", "--url"],
    "admin checkpoints unpublish": ["--json", "--key-file", "--url", "path"],
    "admin keys create": ["--admin", "--expires", "--json", "--key-file", "--name", "--organization", "--url", "user"],
    "admin keys list": ["--json", "--key-file", "--limit", "--url", "--user"],
    "admin keys revoke": ["--json", "--key-file", "--url", "key_id"],
    "admin keys set": ["--expires-at", "--json", "--key-file", "--name", "--url", "key_id"],
    "admin keys show": ["--json", "--key-file", "--url", "key_id"],
    "admin losses list": ["--json", "--key-file", "--url"],
    "admin losses named approve": ["--json", "--key-file", "--tenant", "--url", "of"],
    "admin losses named delete": ["--json", "--key-file", "--url", "of"],
    "admin losses named list": ["--json", "--key-file", "--limit", "--status", "--url"],
    "admin losses named reject": ["--json", "--key-file", "--reason", "--url", "of"],
    "admin losses named review": ["--json", "--key-file", "--url", "of"],
    "admin losses named revoke": ["--json", "--key-file", "--reason", "--url", "of"],
    "admin losses named show": ["--json", "--key-file", "--url", "of"],
    "admin losses named submit": ["--form", "--json", "--key-file", "--url", "file", "name"],
    "admin losses operations": ["--disable", "--enable-all", "--json", "--key-file", "--url"],
    "admin losses set": ["--bound", "--json", "--key-file", "--on", "--url", "loss", "of"],
    "admin losses unset": ["--json", "--key-file", "--url", "loss", "of"],
    "admin organizations delete": ["--json", "--key-file", "--url", "name"],
    "admin organizations list": ["--json", "--key-file", "--limit", "--url"],
    "admin organizations set": ["--description", "--json", "--key-file", "--url", "name"],
    "admin organizations show": ["--json", "--key-file", "--url", "name"],
    "admin pools add": ["--json", "--key-file", "--revision", "--url", "pool", "source"],
    "admin pools drain": ["--json", "--key-file", "--reason", "--url", "pool"],
    "admin pools list": ["--json", "--key-file", "--url"],
    "admin pools pause": ["--json", "--key-file", "--reason", "--url", "pool"],
    "admin pools remove": ["--json", "--key-file", "--reason", "--url", "pool"],
    "admin pools resume": ["--json", "--key-file", "--url", "pool"],
    "admin pools scale": ["--json", "--key-file", "--samplers", "--url", "--workers", "pool"],
    "admin projects delete": ["--json", "--key-file", "--url", "project_id"],
    "admin projects list": ["--json", "--key-file", "--limit", "--tenant", "--url"],
    "admin projects show": ["--json", "--key-file", "--url", "project_id"],
    "admin queue": ["--json", "--key-file", "--limit", "--pool", "--url"],
    "admin quotas delete": ["--json", "--key-file", "--url", "of"],
    "admin quotas list": ["--json", "--key-file", "--url"],
    "admin quotas set": ["--json", "--key-file", "--url", "of", "values"],
    "admin quotas show": ["--json", "--key-file", "--url", "of"],
    "admin runs command": ["--json", "--key-file", "--url", "command_id"],
    "admin runs evict": ["--json", "--key-file", "--url", "--wait", "run_id"],
    "admin runs list": ["--json", "--key-file", "--limit", "--pool", "--state", "--tenant", "--url"],
    "admin runs show": ["--json", "--key-file", "--url", "run_id"],
    "admin runs snapshot": ["--json", "--key-file", "--url", "--wait", "run_id"],
    "admin slots": ["--json", "--key-file", "--limit", "--pool", "--url"],
    "admin tenants list": ["--json", "--key-file", "--limit", "--name", "--organization", "--url"],
    "admin tenants quotas": ["--json", "--key-file", "--url", "tenant"],
    "admin tenants resume": ["--json", "--key-file", "--url", "tenant"],
    "admin tenants set": ["--class", "--json", "--key-file", "--organization", "--url", "tenant"],
    "admin tenants show": ["--json", "--key-file", "--url", "tenant"],
    "admin tenants suspend": ["--json", "--key-file", "--reason", "--url", "tenant"],
    "admin usage": ["--before", "--by", "--csv", "--json", "--key-file", "--limit", "--since", "--tenant", "--url"],
    "config show": ["--config"],
    "db backup": ["--config", "--data", "target"],
    "db check": ["--config", "--data"],
    "db upgrade": ["--config", "--data"],
    "demo": ["--learning-rate", "--model", "--steps", "--url"],
    "doctor": ["--config", "--data", "--model", "--port"],
    "keys create": ["--admin", "--config", "--data", "--expires", "--name", "--organization", "user"],
    "keys list": ["--config", "--data"],
    "keys revoke": ["--config", "--data", "key_id"],
    "runs list": ["--config", "--data"],
    "runs show": ["--config", "--data", "run_id"],
    "serve": [
        "--config",
        "--data",
        "--device",
        "--dtype",
        "--executor",
        "--host",
        "--model",
        "--port",
        "--sampler",
        "--samplers",
        "--threads",
        "--workers",
    ],
    "tokenizer pull": ["--out", "name", "url"],
    "version": [],
}


def surface() -> dict[str, list[str]]:
    """Every command with its options and arguments, as typer registered them."""
    found: dict[str, list[str]] = {}

    def walk(command: object, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children is not None:
            for name, child in children.items():
                walk(child, (*path, name))
            return
        names = []
        for parameter in command.params:  # type: ignore[attr-defined]
            long = [option for option in parameter.opts if option.startswith("--")]
            if "--help" not in long:
                names.append(long[0] if long else parameter.name)
        found[" ".join(path)] = sorted(names)

    walk(typer.main.get_command(app), ())
    return found


def test_commands_and_options_are_frozen() -> None:
    assert surface() == SURFACE


@pytest.mark.parametrize("command", sorted(SURFACE))
def test_every_command_teaches(command: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    if command != "version":
        assert "Example" in result.output


def test_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["version"]).output == f"{__version__}\n"


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["serve", "--model", "a/b/c"], "exactly two slashes"),
        (["serve", "--dtype", "float16"], "flag engine.dtype: input should be"),
        (["serve", "--port", "70000"], "flag server.port: input should be"),
        (["serve", "--config", "/nowhere.toml"], "cannot read the configuration file"),
        (["keys", "create", "a/b"], "user 'a/b' is not allowed"),
        (["keys", "list", "--data", "/nowhere"], "there is no database in /nowhere"),
        (["runs", "list", "--data", "/nowhere"], "there is no database in /nowhere"),
        (["tokenizer", "pull", "http://127.0.0.1:1", "../x"], "cannot be a directory"),
    ],
)
def test_what_the_caller_can_fix_is_one_line_and_exit_2(
    args: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert hint in captured.err


def test_a_server_that_cannot_be_reached_is_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["tokenizer", "pull", "http://127.0.0.1:1", "treadle/tiny", "--out", str(tmp_path)])
    assert caught.value.code == 1
    assert "cannot reach http://127.0.0.1:1/" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from treadle.cli.app import app; "
        "heavy = {'torch', 'transformers', 'tinker', 'sqlalchemy', 'fastapi', 'numpy', 'httpx'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_config_show_says_where_values_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[server]\nport = 9001\n", encoding="utf-8")
    monkeypatch.setenv("TREADLE_STORE__URL", "postgresql+asyncpg://me:hunter2@db/treadle")
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["config", "show", "--config", str(file)])
    assert result.exit_code == 0
    (port,) = [line for line in result.output.splitlines() if "server.port" in line]
    assert "9001" in port
    assert "server.port" in port
    assert "my.toml" in port
    assert "environment TREADLE_STORE__URL" in result.output
    assert "hunter2" not in result.output
