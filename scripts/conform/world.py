"""A fresh server, two users of it, and what most checks start from: a run that has learnt something.

It refuses to judge; checks do. Everything goes through the SDK.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tinker
from click.testing import CliRunner
from tinker import types
from tinker.cli.__main__ import main_cli

MODEL = "treadle/tiny"
TOKENS = (20, 31, 42, 53, 64, 75, 86, 97)
ADAM = types.AdamParams(learning_rate=1e-2)
FOREVER_S = 90.0


class World:
    """The server at `url`; `key` is the user's, `other_key` somebody else's; files go to `folder`."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.key = "tml-conformance-user"
        self.other_key = "tml-conformance-other"
        self._names = itertools.count(1)

    def name(self) -> str:
        """A name that nothing has yet."""
        return f"check-{next(self._names)}"

    def new_service(self, key: str | None = None, **options: Any) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=key or self.key, **options)

    @cached_property
    def service(self) -> tinker.ServiceClient:
        return self.new_service(user_metadata={"made_by": "conformance"})

    @cached_property
    def rest(self) -> tinker.RestClient:
        return self.service.create_rest_client()

    @cached_property
    def admin(self) -> tinker.AdminClient:
        return tinker.AdminClient(base_url=self.url, api_key=self.key)

    def new_run(self, **options: Any) -> tinker.TrainingClient:
        """A fresh run; the same seed each time."""
        given = {"base_model": MODEL, "rank": 4, "seed": 7, **options}
        return self.service.create_lora_training_client(**given).result(timeout=FOREVER_S)

    @cached_property
    def run(self) -> tinker.TrainingClient:
        """A run after one step; checks that change it make one of their own."""
        run = self.new_run()
        train(run)
        return run

    @cached_property
    def saved(self) -> str:
        """A training checkpoint of `run`."""
        return self.save(self.run)

    @cached_property
    def sampler_path(self) -> str:
        """Sampler weights of `run`."""
        return self.run.save_weights_for_sampler(self.name()).result(timeout=FOREVER_S).path

    def save(self, run: tinker.TrainingClient) -> str:
        return run.save_state(self.name()).result(timeout=FOREVER_S).path

    @cached_property
    def sampler(self) -> tinker.SamplingClient:
        return self.service.create_sampling_client(base_model=MODEL).result(timeout=FOREVER_S)

    def session_of(self, run: tinker.TrainingClient) -> str:
        return str(run.model_id).partition(":")[0]

    def cli(self, *arguments: str, is_json: bool = True, given: str | None = None) -> str:
        """What the SDK's command line prints, after reading `given`; raises when it ends badly."""
        line = ["-f", "json", *arguments] if is_json else list(arguments)
        with self.cli_environment():
            result = CliRunner().invoke(main_cli, line, input=given, catch_exceptions=True)
        if result.exit_code:
            raise RuntimeError(
                f"tinker {' '.join(arguments)}: exit {result.exit_code}: {result.exception or result.output}"
            )
        return result.stdout

    @contextlib.contextmanager
    def cli_environment(self) -> Iterator[None]:
        """A home of its own, so that nobody's credentials are read or written."""
        mine = {"TINKER_BASE_URL": self.url, "TINKER_API_KEY": self.key, "HOME": str(self.folder)}
        before = {name: os.environ.get(name) for name in mine}
        os.environ.update(mine)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def datum(tokens: Sequence[int] = TOKENS) -> types.Datum:
    """One sequence for cross_entropy, every target counted."""
    inputs = {"target_tokens": list(tokens[1:]), "weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=inputs)


def train(run: tinker.TrainingClient, steps: int = 1) -> None:
    for _ in range(steps):
        run.forward_backward([datum()], "cross_entropy")
        run.optim_step(ADAM).result(timeout=FOREVER_S)


def logprobs(run: tinker.TrainingClient) -> list[float]:
    """What the run gives the targets now: two runs with the same state agree to the bit."""
    output = run.forward([datum()], "cross_entropy").result(timeout=FOREVER_S)
    return [float(value) for value in output.loss_fn_outputs[0]["logprobs"].data]


def prompt() -> types.ModelInput:
    return types.ModelInput.from_ints(list(TOKENS))


def params(max_tokens: int = 6, **options: Any) -> types.SamplingParams:
    return types.SamplingParams(**{"max_tokens": max_tokens, "seed": 3, **options})
