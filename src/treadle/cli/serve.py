"""`treadle serve`: settings from flags, then the server until it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.common import ConfigOption, DataOption
from treadle.config import help_text, load_settings

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "treadle serve\n\n"
    "treadle serve --port 0 --data /tmp/try\n\n"
    "treadle serve --model Qwen/Qwen3-0.6B --model mine=/models/my-finetune\n\n"
    "treadle serve --workers 2 --samplers 1\n\n"
    "treadle keys create alice && treadle serve --host 0.0.0.0"
)


def serve(
    host: Annotated[str | None, typer.Option(help=help_text("server.host"), show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help=help_text("server.port"), show_default="8000")] = None,
    data: DataOption = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME_OR_PATH | NAME=PATH",
            help="A base model: a hub name, a local directory, or a directory with the name it gets. "
            "Repeat it for several models.",
            show_default="treadle/tiny, the bundled model",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help=help_text("engine.device"), show_default="auto")] = None,
    dtype: Annotated[str | None, typer.Option(help=help_text("engine.dtype"), show_default="auto")] = None,
    threads: Annotated[int | None, typer.Option(help=help_text("engine.threads"), show_default="0")] = None,
    workers: Annotated[int | None, typer.Option(help="Workers of each model: worker.count.", show_default="1")] = None,
    samplers: Annotated[
        int | None, typer.Option(help="Workers of each model that only sample: worker.samplers.", show_default="0")
    ] = None,
    executor: Annotated[
        str | None, typer.Option(metavar="local | ray", help=help_text("executor.kind"), show_default="local")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="builtin | vllm", help=help_text("sampler.kind"), show_default="builtin")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Start a server that the official [bold]tinker[/] SDK can train and sample on.

    Prints [bold]treadle ready: http://HOST:PORT[/] on standard output once it serves. SIGTERM or Ctrl-C drains it: new
    work is refused, the running cycle is finished and stored.
    """
    overrides = serve_overrides(host, port, data, model, device, dtype, threads)
    overrides |= worker_overrides(workers, samplers, executor, sampler)
    settings = load_settings(config, overrides)
    # Imported here: the server's modules take a second to load, and `--help` needs none of them.
    from treadle.server import run

    raise typer.Exit(run(settings))


def serve_overrides(
    host: str | None,
    port: int | None,
    data: Path | None,
    model: list[str] | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
) -> dict[str, object]:
    """The flags as settings; None for a flag that was not given."""
    return {
        "server.host": host,
        "server.port": port,
        "data_dir": data,
        "models": model or None,
        "engine.device": device,
        "engine.dtype": dtype,
        "engine.threads": threads,
    }


def worker_overrides(
    workers: int | None, samplers: int | None, executor: str | None, sampler: str | None
) -> dict[str, object]:
    """The flags about workers as settings; None for a flag that was not given."""
    return {
        "worker.count": workers,
        "worker.samplers": samplers,
        "executor.kind": executor,
        "sampler.kind": sampler,
    }
