"""`treadle demo`: the quickstart against a server of its own, or against one that runs already."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.config import BUNDLED_MODEL

EXAMPLES = (
    "[bold]Examples[/]\n\ntreadle demo\n\ntreadle demo --url http://127.0.0.1:8000 --model Qwen/Qwen3-0.6B --steps 20"
)


def demo(
    url: Annotated[
        str | None, typer.Option(help="A running server to use; without it one is started and stopped.")
    ] = None,
    model: Annotated[str, typer.Option(help="The base model to fine-tune.")] = BUNDLED_MODEL,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Optimiser steps to train.")] = 40,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Learning rate of every step.")] = 6e-3,
) -> None:
    """Teach a model pig latin through the official SDK, sample from it, save it, restore it.

    Exits with an error unless the loss falls below a stated bound, greedy sampling reproduces every trained phrase, and
    the restored run has the same loss.
    """
    # Imported here: the SDK takes seconds to load, and `--help` needs none of it.
    from treadle.demo.report import Plan
    from treadle.demo.run import run_demo

    raise typer.Exit(run_demo(url=url, plan=Plan(model=model, steps=steps, learning_rate=learning_rate)))
