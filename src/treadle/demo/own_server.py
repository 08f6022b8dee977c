"""A server of the demo's own: a real process on a free port and an empty data directory, stopped at the end.

It refuses to know the SDK, so that the SDK can be imported while the server starts.
Invariant: when `stop` has returned, nothing is left: no process, no directory.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from treadle.config import bypass_proxy_for, environment_for_child
from treadle.errors import ServerError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
READY_PREFIX = "treadle ready: "


class OwnServer:
    """A server that serves one model. The constructor starts it without waiting."""

    def __init__(self, model: str) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="treadle-demo-")
        directory = Path(self._scratch.name)
        self._log_path = directory / "server.log"
        self._last_lines = ""
        arguments = ["serve", "--port", "0", "--data", str(directory / "data"), "--model", model]
        with self._log_path.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "treadle.cli", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Nobody kills the demo's worker, and the spare's imports would slow the demo down.
                env=environment_for_child() | {"TREADLE_WORKER__SPARE": "false"},
            )

    def wait_until_ready(self) -> str:
        """The URL that the server prints, once /readyz answers 200.

        Raises ServerError with the end of its log when it ends or does not become ready in time.
        """
        assert self._process.stdout is not None
        # The line comes, or the pipe closes because the process ended: either way this does not hang.
        line = next((text for text in self._process.stdout if text.startswith(READY_PREFIX)), None)
        if line is None:
            raise ServerError(f"the server did not start:\n{self.log_tail()}")
        base_url = line.removeprefix(READY_PREFIX).strip()
        bypass_proxy_for(urlsplit(base_url).hostname or "127.0.0.1")
        deadline = time.monotonic() + START_TIMEOUT_S
        while httpx.get(f"{base_url}/readyz", timeout=10.0).status_code != 200:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the server did not become ready:\n{self.log_tail()}")
            time.sleep(0.1)
        return base_url

    def stop(self) -> int:
        """The exit status after SIGTERM; SIGKILL after a bounded wait. Removes the directory. Call it once."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._last_lines = self.log_tail()
        self._scratch.cleanup()
        return self._process.returncode

    def log_tail(self, num_lines: int = 30) -> str:
        """The last lines of the server's log, also after `stop`."""
        if not self._log_path.exists():
            return self._last_lines
        text = self._log_path.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-num_lines:])
