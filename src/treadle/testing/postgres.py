"""A throw-away PostgreSQL for tests and benchmarks: a cluster of its own in a temporary directory, gone at the end.

It is reached through a Unix socket only, and refuses to touch a cluster that is there already. Invariant: no server
outlives the process that started it, however that ends: it is stopped when the pipe to that process closes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg

# Packages put the server's programs where no PATH leads.
_PACKAGED = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt", "/usr/local/opt")
# PostgreSQL refuses to run as root; the first of these that exists runs it then.
_UNPRIVILEGED = ("postgres", "nobody")
_SUPERUSER = "treadle"
_START_S = 30.0
# Runs the server until standard input ends: the pipe that whoever started it holds.
# TERM ends one that is still starting, INT one that has clients.
_GUARD = '"$0" "$@" & server=$!; cat >/dev/null; kill -TERM $server; kill -INT $server; wait $server'
_STOP_S = 20.0


def find_programs() -> Path | None:
    """The directory with `initdb` and `postgres`, of the newest version there is; None without one."""
    on_path = shutil.which("initdb")
    if on_path is not None and (Path(on_path).resolve().parent / "postgres").exists():
        return Path(on_path).resolve().parent
    found = [path.parent for root in _PACKAGED for path in Path(root).parent.glob(f"{Path(root).name}*/**/bin/initdb")]
    found = [folder for folder in found if (folder / "postgres").exists()]
    return max(found, key=_version_of, default=None)


def why_not() -> str | None:
    """Why no PostgreSQL can be started here; None when one can."""
    if find_programs() is None:
        return "PostgreSQL's server programs (initdb, postgres) are not installed"
    if os.geteuid() == 0 and _unprivileged_user() is None:
        return f"PostgreSQL does not run as root, and none of the users {', '.join(_UNPRIVILEGED)} exists"
    return None


class ThrowAwayPostgres:
    """One cluster. Entering starts it, leaving removes it; `stop` and `start` in between keep its data.

    is_durable: commits reach the disk, which a benchmark wants and a test does not.
    """

    def __init__(self, *, is_durable: bool = False) -> None:
        reason = why_not()
        assert reason is None, reason
        programs = find_programs()
        assert programs is not None
        self._programs = programs
        self._is_durable = is_durable
        # Short: the path of a Unix socket may have 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="treadle-pg-", dir="/tmp"))
        self._server: subprocess.Popen[bytes] | None = None
        self._owner: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _unprivileged_user()
            assert user is not None
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._owner = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def __enter__(self) -> ThrowAwayPostgres:
        try:
            options = ["--auth=trust", f"--username={_SUPERUSER}", "--encoding=UTF8", "--locale=C", "--no-sync"]
            self._run("initdb", *options, f"--pgdata={self._folder / 'data'}")
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, as `store.url` takes it."""
        return f"postgresql+psycopg://{_SUPERUSER}@/{database}?host={self._folder}"

    def create(self, database: str, *, template: str = "template1") -> str:
        """A new database, a copy of `template`, to which nobody may be connected; its URL."""
        self.execute(f'CREATE DATABASE "{database}" TEMPLATE "{template}"')
        return self.url(database)

    def drop(self, database: str) -> None:
        """Remove a database and end its connections."""
        self.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')

    def execute(self, statement: str) -> None:
        """Run one statement as superuser, outside of a transaction."""
        with psycopg.connect(self.url().replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(statement.encode())

    def start(self) -> None:
        """Start the server and return once it answers."""
        assert self._server is None, "it runs already"
        sync = "on" if self._is_durable else "off"
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._folder),
            "max_connections": "100",
            "fsync": sync,
            "full_page_writes": sync,
            "log_min_messages": "fatal",
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = ["sh", "-c", _GUARD, str(self._programs / "postgres"), "-D", str(self._folder / "data"), *flags]
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, **self._owner
            )
        deadline = time.monotonic() + _START_S
        while subprocess.run([self._programs / "pg_isready", "-q", *self._address()], check=False).returncode != 0:
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop the server, ending every connection. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def close(self) -> None:
        """Stop the server and remove its data. Idempotent."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _address(self) -> tuple[str, ...]:
        return ("-h", str(self._folder), "-U", _SUPERUSER)

    def _run(self, program: str, *args: str) -> None:
        command = [str(self._programs / program), *args]
        # Not where the caller stands, which the other user may not see.
        done = subprocess.run(command, capture_output=True, text=True, cwd=self._folder, check=False, **self._owner)
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stderr[-2000:]}")


def _version_of(programs: Path) -> tuple[int, ...]:
    numbers = [part for part in str(programs).replace("@", "/").replace("-", "/").split("/") if part]
    return tuple(int(part) for part in numbers if part.isdecimal())


def _unprivileged_user() -> pwd.struct_passwd | None:
    for name in _UNPRIVILEGED:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None
