"""Names of processes that lead, and whether the process behind such a name still lives.

A name says on which machine its process runs and which one it is, so that a restart on the same machine need not wait
for the lease of its predecessor. It refuses to know leases. Invariant: a process is called dead only when this machine
knows that it is; of other machines, and of other containers of this one, nothing is ever said.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

_FIELDS = 5


@dataclass(frozen=True, slots=True)
class Holder:
    """machine: this boot of this machine, as one container of it sees processes. started: when the process began, in
    the machine's own unit. nonce: tells apart two leaders in one process."""

    host: str
    machine: str
    pid: int
    started: str
    nonce: str

    def __str__(self) -> str:
        return " ".join((self.host, self.machine, str(self.pid), self.started, self.nonce))


def this_process() -> str:
    """A fresh name for this process."""
    host = "".join(socket.gethostname().split()) or "host"
    pid = os.getpid()
    return str(Holder(host, _machine(), pid, _started(pid) or "-", secrets.token_hex(8)))


def is_dead_here(name: str) -> bool:
    """Whether `name` is of a process that ran where this one runs, and has ended."""
    holder = _parsed(name)
    if holder is None or holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's process lives, whichever it is
    started = _started(holder.pid)
    # Nothing to compare where there is no /proc. "" is a process that has ended and was not reaped yet.
    return started is not None and holder.started not in ("-", started)


def _parsed(name: str) -> Holder | None:
    fields = name.split(" ")
    if len(fields) != _FIELDS or not fields[2].isdecimal():
        return None
    host, machine, pid, started, nonce = fields
    return Holder(host, machine, int(pid), started, nonce)


def _machine() -> str:
    """Equal for two processes only if each can see whether the other lives."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.getfqdn()
    return f"{boot}/{namespace}"


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the boot; "" when it has ended, None when this machine cannot tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses, which may hold anything.
    fields = stat.rpartition(")")[2].split()
    state, ticks = fields[0], fields[19]
    return "" if state in "ZX" else ticks
