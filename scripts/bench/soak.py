"""Does a server under a steady load stop growing? Sizes of every table and blob directory over time.

    python scripts/bench/soak.py [--seconds 600] [--clients 4] [--json FILE]

Starts `treadle serve` on the bundled model with short retention times, and clients of the official SDK that train with
built-in and custom losses, publish and sample unnamed versions, on record and inflight, ask for text in OpenAI's form,
and finish their session every few steps; one client keeps its session to the end, and saves under one name over and
over. Two halves of the time behind the warm-up are compared: what is larger in the
second one by more than the margin has not stopped growing, and the run fails. Rows that are history and stay by design
(sessions, runs, the run log, the audit log, usage per hour) are counted apart; what they cost is the one figure that
grows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import httpx
import report
import tinker
import torch
from tinker import types

MODEL = "treadle/tiny"
TEXT = "/v1/completions"
RESULT_S = 120
CLOSE_S = 10
# Everything that is kept for a time is kept for seconds.
RETENTION = {
    "SWEEP_INTERVAL_S": 0.5,
    "SESSION_SILENCE_S": 15,
    "FINISHED_SESSION_S": 1,
    "DELIVERED_RESULTS_S": 1,
    "UNDELIVERED_RESULTS_S": 2,
    "REQUESTS_S": 2,
    "SAMPLER_VERSIONS": 2,
    "SAMPLER_VERSION_S": 1,
    "UNNAMED_BLOBS_S": 3,
    "STABILITY_RECORD_S": 2,
}
HISTORY = ("sessions", "models", "run_log", "audit_log", "usage_events")
STEPS_PER_SESSION = 8
# The second half may be this much larger, and never fails below these: sizes swing with the sweeps.
MARGIN = 0.35
SLACK = {"rows": 150, "bytes": 4 * 2**20}


class Server:
    """`treadle serve` with short retention times, on a directory of its own."""

    def __init__(self, data: Path) -> None:
        self.data = data
        command = [sys.executable, "-m", "treadle.cli", "serve", "--port", "0", "--data", str(data)]
        settings = {f"TREADLE_RETENTION__{name}": str(value) for name, value in RETENTION.items()}
        # Nobody kills the worker, and the imports of one in reserve are time that the load lacks.
        environment = {**os.environ, **settings, "TREADLE_WORKER__SPARE": "false"}
        self.log = (data / "log").open("w")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().removeprefix("treadle ready: ")
        assert self.url, (data / "log").read_text()[-2000:]

    def stop(self) -> int:
        """Drain; the exit status."""
        self.process.terminate()
        status = self.process.wait(timeout=60)
        self.log.close()
        return status


class Client(threading.Thread):
    """Trains, saves, publishes, samples; `keeps_session`: in one session, else in a new one every few steps."""

    def __init__(self, server: Server, *, keeps_session: bool, until: float) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._keeps_session = keeps_session
        self._until = until
        self.num_steps = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self._until:
                self._one_session()
        except BaseException as error:
            self.error = error

    def _one_session(self) -> None:
        service = tinker.ServiceClient(base_url=self._server.url, api_key="tml-soak")
        trainer = service.create_lora_training_client(base_model=MODEL, rank=8).result(timeout=RESULT_S)
        loss = service.create_custom_loss(_spread, {"logprobs": 1}).result(timeout=RESULT_S)
        for step in range(10**9 if self._keeps_session else STEPS_PER_SESSION):
            if time.monotonic() >= self._until:
                break
            self._one_step(trainer, step, loss)
        # The session is finished before the SDK (0.38) ends its own pollers, and there it may hang.
        with contextlib.suppress(TimeoutError):
            service.close("success").result(timeout=CLOSE_S)

    def _one_step(self, trainer: tinker.TrainingClient, step: int, loss: tinker.LossHandle) -> None:
        # Every fourth batch is too large for a row.
        data = [_datum(100, seed) for seed in range(44)] if step % 4 == 2 else [_datum(16, seed) for seed in range(2)]
        if step % 2:
            plain = [_datum(16, seed, weighted=False) for seed in range(2)]
            passed = trainer.forward_backward_custom(plain, loss)
        else:
            passed = trainer.forward_backward(data, "cross_entropy")
        stepped = trainer.optim_step(types.AdamParams(learning_rate=1e-4))
        passed.result(timeout=RESULT_S)
        stepped.result(timeout=RESULT_S)
        publishing = (
            trainer.save_weights_and_get_sampling_client(kind="inflight")
            if step % 3 == 1
            else trainer.save_weights_and_get_sampling_client(record_stability_info=True)
        )
        sampler = publishing.result(timeout=RESULT_S)
        prompt = types.ModelInput.from_ints([1, 2, 3])
        sampler.sample(prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=4)).result(
            timeout=RESULT_S
        )
        self._complete_text()
        if self._keeps_session and step % 3 == 0:
            trainer.save_state("newest", overwrite=True).result(timeout=RESULT_S)
        self.num_steps += 1

    def _complete_text(self) -> None:
        """One request in OpenAI's form."""
        body = {"model": MODEL, "prompt": "once", "max_tokens": 4}
        headers = {"Authorization": "Bearer tml-soak"}
        httpx.post(f"{self._server.url}{TEXT}", json=body, headers=headers, timeout=RESULT_S).raise_for_status()


def _spread(logprobs: torch.Tensor) -> Any:
    """A loss that no table has."""
    return -logprobs.mean() + 0.01 * (logprobs[:, None] - logprobs[None, :]).square().mean(), {}


def _datum(num_tokens: int, seed: int, *, weighted: bool = True) -> types.Datum:
    tokens = [(seed * 31 + index * 7) % 900 + 10 for index in range(num_tokens + 1)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], **({"weights": [1.0] * num_tokens} if weighted else {})},
    )


def sizes(data: Path) -> dict[str, int]:
    """Rows of every table, bytes of every blob directory, of the database file and of what is used of it."""
    found: dict[str, int] = {}
    with contextlib.closing(sqlite3.connect(f"file:{data / 'treadle.db'}?mode=ro", uri=True, timeout=10)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            (found[f"rows of {table}"],) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
        (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
        (num_pages,) = database.execute("PRAGMA page_count").fetchone()
        history = sum(_bytes_of(database, table) for table in HISTORY)
    found["bytes of history"] = history
    found["bytes of treadle.db"] = num_pages * page_bytes - history
    found["bytes of treadle.db-wal"] = _file_bytes(data / "treadle.db-wal")
    for kind in ("payloads", "snapshots", "states", ".incoming"):
        found[f"bytes of blobs/{kind}"] = sum(map(_file_bytes, (data / "blobs" / kind).rglob("*")))
    return found


def _bytes_of(database: sqlite3.Connection, table: str) -> int:
    """Of a table and its indexes."""
    query = (
        "SELECT coalesce(sum(pgsize), 0) FROM dbstat WHERE name IN (SELECT name FROM sqlite_master WHERE tbl_name = ?)"
    )
    return int(database.execute(query, (table,)).fetchone()[0])


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def grown(samples: Sequence[Mapping[str, int]]) -> dict[str, tuple[int, int]]:
    """What had not stopped growing: its maxima in the two halves of the samples behind the first quarter."""
    behind = samples[len(samples) // 4 :]
    first, second = behind[: len(behind) // 2], behind[len(behind) // 2 :]
    found = {}
    for name in second[-1]:
        before, after = (max(sample.get(name, 0) for sample in half) for half in (first, second))
        if after > before * (1 + MARGIN) + SLACK[name.split(" ")[0]] and not _is_history(name):
            found[name] = (before, after)
    return found


def _is_history(name: str) -> bool:
    return name == "bytes of history" or name.removeprefix("rows of ") in HISTORY


def soak(data: Path, *, seconds: float, num_clients: int) -> dict[str, Any]:
    """Run the load and watch; the samples and what clients did."""
    with _server(data) as server:
        until = time.monotonic() + seconds
        clients = [Client(server, keeps_session=index == 0, until=until) for index in range(num_clients)]
        for client in clients:
            client.start()
        samples = []
        while time.monotonic() < until and all(client.error is None for client in clients):
            time.sleep(min(1.0, seconds / 40))
            samples.append(sizes(data))
        for client in clients:
            client.join(timeout=RESULT_S)
    for client in clients:
        if client.error is not None:
            raise client.error
    return {"samples": samples, "steps": [client.num_steps for client in clients]}


@contextlib.contextmanager
def _server(data: Path) -> Iterator[Server]:
    server = Server(data)
    try:
        yield server
    finally:
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=4)
    report.add_arguments(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="treadle-soak-") as folder:
        measured = soak(Path(folder), seconds=args.seconds, num_clients=args.clients)
    samples = measured["samples"]
    failing = grown(samples)
    quarters = [samples[min(len(samples) - 1, len(samples) * part // 4)] for part in range(5)]
    rows = [
        [name, *(sample.get(name, 0) for sample in quarters), _verdict(name, failing)] for name in sorted(samples[-1])
    ]
    report.print_table(
        f"Sizes over {args.seconds:g} s, {args.clients} clients, {sum(measured['steps'])} steps",
        ["what", "start", "1/4", "1/2", "3/4", "end", ""],
        rows,
    )
    result = {**report.context(), "seconds": args.seconds, "clients": args.clients, **measured, "grown": failing}
    report.write(report.path_of(args, "soak"), result)
    return 1 if failing else 0


def _verdict(name: str, failing: Mapping[str, object]) -> str:
    if _is_history(name):
        return "history"
    return "GROWS" if name in failing else ""


if __name__ == "__main__":
    sys.exit(main())
