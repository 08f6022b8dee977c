"""The files under test, read: compose.yaml, docker/ and deploy/kuberay."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose.yaml"
DOCKERFILE = ROOT / "docker/Dockerfile"
KUBERAY = ROOT / "deploy/kuberay"

_VARIABLE = re.compile(r"\$\{([A-Z_0-9]+):-([^}]*)\}")


@cache
def compose() -> dict[str, Any]:
    """compose.yaml with merge keys resolved and every variable at its default."""
    text = _VARIABLE.sub(lambda found: found[2], COMPOSE.read_text())
    assert "${" not in text, "every variable has a default"
    return dict(yaml.safe_load(text))


def services() -> dict[str, dict[str, Any]]:
    return dict(compose()["services"])


def command_of(name: str) -> list[str]:
    """What a service runs: entrypoint and command."""
    service = services()[name]
    return [*service.get("entrypoint", []), *service.get("command", [])]


def documents(folder: str = "base") -> Iterator[dict[str, Any]]:
    """All manifests of deploy/kuberay/FOLDER but what is kustomize's own."""
    for path in sorted((KUBERAY / folder).glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if "kind" in document and document["kind"] != "Kustomization":
                yield document


def manifest(kind: str, name: str) -> dict[str, Any]:
    [found] = [one for one in documents() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's stages by name: instructions with their arguments, continued lines joined. The last is ""."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            current = found.setdefault(name, [])
            rest = image
        current.append((word, " ".join(rest.split())))
    return found


def run(command: list[str], *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )


def compose_program() -> list[str] | None:
    """`docker compose`, or its plugin alone; None where neither is. No engine is needed to read a file."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and run([*command, "version"]).returncode == 0:
            return command
    return None
