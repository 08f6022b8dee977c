"""Runs the SDK's end-to-end tests once for each combination of executor, sampler and store, and prints a table.

It starts what a combination needs: a Ray cluster of this machine, a throw-away PostgreSQL. vLLM has to be there:
E2E_VLLM_PYTHON names the Python of its environment, and combinations with it are left out when that is not set.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from treadle.testing.postgres import ThrowAwayPostgres

ROOT = Path(__file__).parents[2]
COMBINATIONS = (
    "local-builtin-sqlite",
    "local-builtin-postgresql",
    "ray-builtin-sqlite",
    "ray-builtin-postgresql",
    "local-vllm-sqlite",
    "ray-vllm-postgresql",
)
# What speaks of no process, file or figure of one executor.
TESTS = (
    "test_quickstart.py",
    "test_sampling_features.py",
    "test_bad_input.py",
    "test_bad_datums.py",
    "test_custom_losses.py",
    "test_stable_reinforce.py",
    "test_many_samples.py",
    "test_cli_checkpoints.py",
    "test_openai_client.py",
)
RAY_PORT = 6399
START_S = 60.0


def main() -> int:
    """0 when every test of every combination passed."""
    arguments = _parsed()
    results = {name: _run(name, arguments.pytest) for name in arguments.combinations or COMBINATIONS}
    table = Table("executor", "sampler", "store", "result")
    for name, (_, said) in results.items():
        table.add_row(*name.split("-"), said)
    Console().print(table)
    return max(status for status, _ in results.values())


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("combinations", nargs="*", choices=[[], *COMBINATIONS], metavar="EXECUTOR-SAMPLER-STORE")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:end])
    arguments.pytest = given[end + 1 :]
    return arguments


def _run(name: str, pytest_arguments: list[str]) -> tuple[int, str]:
    """One combination: the exit status, and what pytest said at its end."""
    executor, sampler, store = name.split("-")
    if sampler == "vllm" and not os.environ.get("E2E_VLLM_PYTHON"):
        return 0, "left out: E2E_VLLM_PYTHON is not set"
    with contextlib.ExitStack() as stack:
        env = {"E2E_EXECUTOR": executor, "E2E_SAMPLER": sampler}
        if executor == "ray":
            env["E2E_RAY_ADDRESS"] = stack.enter_context(_ray())
        if store == "postgresql":
            env["E2E_POSTGRES"] = stack.enter_context(ThrowAwayPostgres()).url()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=300", *pytest_arguments]
        tests = [str(ROOT / "tests" / "e2e" / test) for test in TESTS]
        process = subprocess.Popen(
            [*command, *tests], cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            sys.stdout.write(f"{name}: {line}")
            if re.search(r"\d+ (passed|failed|error)", line):
                last = line.strip(" =\n")
        return process.wait(), last or "pytest said nothing"


@contextlib.contextmanager
def _ray() -> Iterator[str]:
    """A cluster of this machine, gone at the end with everything that it started; its address."""
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--block", f"--port={RAY_PORT}", "--include-dashboard=false", "--disable-usage-stats"]
    # Ray lets nobody in without a token; servers and their workers inherit it.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    cluster = subprocess.Popen([ray, "start", *options], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_for_port(cluster)
        yield f"127.0.0.1:{RAY_PORT}"
    finally:
        cluster.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            cluster.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(cluster.pid, signal.SIGKILL)
        cluster.wait()


def _wait_for_port(cluster: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while cluster.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", RAY_PORT), timeout=1):
            return
        time.sleep(0.2)
    raise SystemExit(f"Ray's head did not start within {START_S:.0f} s (status {cluster.poll()})")


if __name__ == "__main__":
    sys.exit(main())
