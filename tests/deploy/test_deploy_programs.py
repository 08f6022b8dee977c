"""The small programs of the images (docker/bin), by themselves. What they do together: test_deploy_live.py."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_files import ROOT

BIN = ROOT / "docker/bin"
PATH = f"{BIN}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def run(*command: object, path: str = PATH) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


def test_secrets_are_made_once_and_are_not_shown(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("postgres", "s3", "ray")]
    for folder in folders:
        folder.mkdir()
    first = run("treadle-make-secrets", *folders)
    assert first.returncode == 0, first.stderr
    made = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in made.items()}
    assert modes == {
        "postgres/password": 0o444,
        "postgres/pgpass": 0o600,
        "s3/user": 0o444,
        "s3/password": 0o444,
        "s3/credentials": 0o600,
        "ray/token": 0o600,
    }
    texts = {name: path.read_text() for name, path in made.items()}
    assert texts["postgres/pgpass"] == f"*:*:*:treadle:{texts['postgres/password']}\n"
    assert texts["s3/password"] in texts["s3/credentials"]
    for name in ("postgres/password", "s3/password", "ray/token"):
        assert len(texts[name]) >= 43
        assert texts[name] not in first.stdout + first.stderr
    # One that is lost comes back as it was, and none changes under those who use it.
    made["postgres/pgpass"].unlink()
    assert run("treadle-make-secrets", *folders).returncode == 0
    assert {name: path.read_text() for name, path in made.items()} == texts


def test_first_key_is_shown_once(tmp_path: Path) -> None:
    file = tmp_path / "admin"
    early = run("treadle-first-key", file)
    assert (early.returncode, early.stdout) == (1, "")
    file.write_text("tml-key\n")
    shown = run("treadle-first-key", file)
    assert (shown.returncode, shown.stdout) == (0, "tml-key\n")
    assert not file.exists()
    assert run("treadle-first-key", file).returncode == 1


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/healthz", "tcp://127.0.0.1:1", "ftp://127.0.0.1:1", "http://127.0.0.1"]
)
def test_probe_says_what_is_wrong(url: str) -> None:
    done = run("treadle-probe", url)
    assert done.returncode == 1
    assert url.partition("?")[0] in done.stderr


def test_server_beside_ray_ends_with_the_servers_status_and_ends_its_node(tmp_path: Path) -> None:
    """With stand-ins for `ray` and `treadle`: the real ones are in test_deploy_live.py."""
    node = tmp_path / "ray"
    node.write_text(
        f"#!/bin/sh\necho $$ >>{tmp_path}/nodes\necho 'Ray runtime started.'\n"
        f"trap 'echo gone >>{tmp_path}/nodes; exit 0' TERM\n"
        f"[ $(wc -l <{tmp_path}/nodes) -gt 1 ] || exit 1\n"
        "while :; do sleep 0.05; done\n"
    )
    server = tmp_path / "treadle"
    server.write_text(
        f"#!/bin/sh\necho ready \"$@\"\ntrap 'echo drained; exit 7' TERM\n"
        f"while :; do sleep 0.05; [ $(wc -l <{tmp_path}/nodes) -lt 2 ] || echo again; done\n"
    )
    for program in (node, server):
        program.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, BIN / "treadle-serve-on-ray", "head:6379", "--config", "x"],
        env={**os.environ, "PATH": f"{tmp_path}:{PATH}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready serve --config x\n", "only the server speaks on standard output"
    # The node has ended once, as at a restart of the head, and was started again.
    assert process.stdout.readline() == "again\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert out.splitlines()[-1] == "drained"
    assert process.returncode == 7
    assert "the Ray node ended with 1" in err
    assert (tmp_path / "nodes").read_text().splitlines()[-1] == "gone"
