"""`treadle doctor`: would a server start here, and with what? Looks only; changes nothing.

Each check is a function of the settings that answers in one line. Invariant: the exit status is 0 only when no check
failed; a warning does not fail.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import platform
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from treadle.cli.common import ConfigOption, DataOption, stdout
from treadle.config import ModelSettings, Settings, load_settings
from treadle.errors import ConfigError, TreadleError

EXAMPLES = "[bold]Example[/]\n\ntreadle doctor --model /models/my-finetune"

SDK_SERIES = "0.38."
# The bundled model's checkpoints are a few megabytes; below this even they soon do not fit.
MIN_FREE_BYTES = 2 * 2**30


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    verdict: Verdict
    text: str


def doctor(
    data: DataOption = None,
    port: Annotated[int | None, typer.Option(help="The port to look at.", show_default="8000")] = None,
    model: Annotated[list[str] | None, typer.Option(metavar="NAME_OR_PATH | NAME=PATH", help="As for serve.")] = None,
    config: ConfigOption = None,
) -> None:
    """Check this machine and the configuration; exit 1 if a server could not start."""
    settings = load_settings(config, {"data_dir": data, "server.port": port, "models": model or None})
    checks = all_checks(settings)
    table = Table("check", "", "what was found")
    style = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}
    for check in checks:
        table.add_row(check.name, Text(check.verdict.value, style[check.verdict]), Text(check.text, overflow="fold"))
    stdout().print(table)
    raise typer.Exit(1 if any(check.verdict is Verdict.FAIL for check in checks) else 0)


def all_checks(settings: Settings) -> list[Check]:
    """Every check, in the order in which a server would meet them."""
    single: tuple[Callable[[Settings], Check], ...] = (
        _python, _torch, _threads, _disk, _port, _data_lock, _schema, _sdk,
    )  # fmt: skip
    return [check(settings) for check in single] + [_model(model) for model in settings.models]


def _python(settings: Settings) -> Check:
    del settings
    return Check("python", Verdict.OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch(settings: Settings) -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("torch", Verdict.FAIL, f"cannot be imported: {error}")
    has_gpu = torch.cuda.is_available()
    found = f"GPU {torch.cuda.get_device_name(0)}" if has_gpu else "no GPU, the CPU is used"
    if settings.engine.device.startswith("cuda") and not has_gpu:
        asked = settings.engine.device
        return Check("torch", Verdict.FAIL, f"{torch.__version__}: engine.device is {asked!r}, but there is no GPU")
    return Check("torch", Verdict.OK, f"{torch.__version__}, {found}")


def _threads(settings: Settings) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    wanted = settings.engine.threads
    verdict = Verdict.WARN if wanted > cores else Verdict.OK
    return Check("threads", verdict, f"{cores} cores; engine.threads is {wanted or 'chosen from them'}")


def _disk(settings: Settings) -> Check:
    place = _nearest_existing(settings.data_dir)
    if not os.access(place, os.W_OK):
        return Check("disk", Verdict.FAIL, f"{settings.data_dir} cannot be written")
    free = shutil.disk_usage(place).free
    verdict = Verdict.OK if free >= MIN_FREE_BYTES else Verdict.WARN
    return Check("disk", verdict, f"{free / 2**30:.1f} GiB free for {settings.data_dir.resolve()}")


def _port(settings: Settings) -> Check:
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Check("port", Verdict.FAIL, f"{host}:{port}: {error.strerror}; choose another with --port")
    return Check("port", Verdict.OK, f"{host}:{port} is free" if port else f"a free port of {host} will be taken")


def _data_lock(settings: Settings) -> Check:
    """Looks at the lock that a running server holds (server.py) without keeping it."""
    path = settings.data_dir / "lock"
    if path.exists():
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Check("data directory", Verdict.FAIL, f"a server runs on {settings.data_dir}; stop it first")
    return Check("data directory", Verdict.OK, f"no server runs on {settings.data_dir}")


def _schema(settings: Settings) -> Check:
    if not settings.store.url and not settings.database_file.is_file():
        return Check("database", Verdict.OK, "none yet; the first start makes one")
    try:
        is_current = asyncio.run(_schema_is_current(settings.database_url))
    except TreadleError as error:
        return Check("database", Verdict.FAIL, error.message)
    return Check("database", Verdict.OK, "schema is current" if is_current else "the next start upgrades the schema")


async def _schema_is_current(url: str) -> bool:
    # Imported here: SQL takes a while to load, and `--help` needs none of it.
    from treadle.store import Store

    store = await Store.open(url, migrate=False)
    try:
        return await store.schema_is_current()
    finally:
        await store.close()


def _sdk(settings: Settings) -> Check:
    del settings
    try:
        version = metadata.version("tinker")
    except metadata.PackageNotFoundError:
        return Check("tinker SDK", Verdict.WARN, "not installed here; clients need it, the server does not")
    verdict = Verdict.OK if version.startswith(SDK_SERIES) else Verdict.WARN
    return Check("tinker SDK", verdict, f"{version}; treadle is tested with {SDK_SERIES}x")


def _model(model: ModelSettings) -> Check:
    name = f"model {model.name}"
    try:
        directory = model.local_dir()
    except ConfigError as error:
        return Check(name, Verdict.FAIL, error.message)
    if directory is None:
        return Check(name, Verdict.OK, f"the hub's {model.source}: transformers will look for it when serving")
    try:
        described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        architecture = ", ".join(described["architectures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Check(name, Verdict.FAIL, f"{directory}/config.json cannot be used: {error!r}")
    if not any(directory.glob("*.safetensors")):
        return Check(name, Verdict.FAIL, f"{directory} holds no *.safetensors")
    return Check(name, Verdict.OK, f"{architecture} in {directory}")


def _nearest_existing(path: Path) -> Path:
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.exists())
