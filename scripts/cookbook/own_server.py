"""A treadle server for the recipes: `treadle serve` of this work tree on a free port, and what it complained about.

Knows nothing of the cookbook. Invariant: leaving the block ends the server.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import TracebackType

READY_PREFIX = "treadle ready: "
STOP_TIMEOUT_S = 60.0


class OwnServer:
    """`treadle serve --model NAME=DIRECTORY` while the block runs. `url` is where it answers."""

    def __init__(self, data: Path, *, model: str, directory: Path) -> None:
        self.url = ""
        self._data = data
        self._log_path = data.with_suffix(".log")
        self._options = ["serve", "--port", "0", "--data", str(data), "--model", f"{model}={directory}"]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> OwnServer:
        with self._log_path.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "treadle.cli", *self._options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TREADLE_WORKER__SPARE": "false"},
            )
        assert self._process.stdout is not None
        line = next((text for text in self._process.stdout if text.startswith(READY_PREFIX)), None)
        if line is None:
            raise RuntimeError(f"the server did not start: {self._log_path.read_text()[-2000:]}")
        self.url = line.removeprefix(READY_PREFIX).strip()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def complaints(self) -> list[str]:
        """The log's lines of level warning and above, without their times; the one on open mode is no complaint."""
        lines = [line.split(" ", 1)[-1] for line in self._log_path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if not line.startswith("info ") and "open mode" not in line]

    def adapter_seed(self, model_id: str) -> int:
        """The seed of a run's adapter, which the server drew, as the cookbook sends none."""
        with closing(sqlite3.connect(f"file:{self._data / 'treadle.db'}?mode=ro", uri=True)) as database:
            (lora,) = database.execute("SELECT lora FROM models WHERE model_id = ?", (model_id,)).fetchone()
        return int(json.loads(lora)["seed"])
