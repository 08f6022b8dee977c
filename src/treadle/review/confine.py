"""What a process that runs a stranger's file takes from itself, for good, before it is given the file.

Namespaces come first, while it has one thread; the rest when everything it needs is imported. The list of allowed
system calls is what holds: no file, socket, pipe, process, thread or signal to others can be had any more, whatever
Python code or machine code asks for it. Limits bound time and memory, and stand alone where there is no such filter.
It refuses to know what the process is for. Invariant: nothing here can be undone by the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

# Parts, by the names that reports have.
SYSTEM_CALLS = "system calls"
NAMESPACES = "namespaces"
LIMITS = "limits"
OTHER_USER = "other user"

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_NOBODY = 65_534

# Classic BPF, as seccomp(2) wants it.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_SECCOMP_SET_MODE_FILTER, _FILTER_FLAG_TSYNC = 1, 1


@dataclass(frozen=True, slots=True)
class _Machine:
    """Numbers of an architecture: its own, that of seccomp(2), and of the calls that stay."""

    audit_arch: int
    seccomp: int
    write: int
    allowed: tuple[int, ...]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split())


# Memory, clocks, waiting, random numbers, reading what is open, and the end. Of write, only the answer's descriptor.
_MACHINES: Mapping[str, _Machine] = {
    "x86_64": _Machine(
        audit_arch=0xC000003E,
        seccomp=317,
        write=1,
        # read close fstat lseek mmap mprotect munmap brk rt_sigprocmask rt_sigreturn sched_yield mremap madvise
        # nanosleep getpid exit getrusage times sigaltstack gettid futex sched_getaffinity restart_syscall
        # clock_gettime clock_getres clock_nanosleep exit_group set_robust_list getcpu getrandom membarrier rseq
        allowed=_numbers(
            "0 3 5 8 9 10 11 12 14 15 24 25 28 35 39 60 98 100 131 186 202 204 219 228 229 230 231 273 309 318 324 334"
        ),
    ),
    "aarch64": _Machine(
        audit_arch=0xC00000B7,
        seccomp=277,
        write=64,
        # The same, in the order of their numbers.
        allowed=_numbers(
            "57 62 63 80 93 94 98 99 101 113 114 115 123 124 128 132 135 139 153 165 168 172 178 214 215 216 222 226 "
            "233 278 283 293"
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """cpu_s: processor seconds from now on. memory_bytes: address space beyond what is mapped now."""

    cpu_s: int
    memory_bytes: int


def enter_namespaces() -> list[str]:
    """Leave the machine's network, and whatever else needs no privilege to leave. The parts that worked.

    For a process with one thread. Some machines allow no such thing to ordinary processes; the other parts stand alone.
    """
    if not sys.platform.startswith("linux"):
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWNS | _CLONE_NEWUTS
    parts = [NAMESPACES] if libc.unshare(flags) == 0 else []
    _end_with_the_server()
    return parts


def lock(bounds: Bounds, *, has_namespaces: bool) -> list[str]:
    """Give up everything that is not needed to compute. The parts that worked, LIMITS always."""
    _set_limits(bounds)
    parts = [LIMITS]
    if os.geteuid() == 0 and not has_namespaces:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
            # The kernel forgets it when a process becomes another user.
            _end_with_the_server()
            parts.append(OTHER_USER)
    if sys.platform.startswith("linux") and _filter_system_calls():
        parts.append(SYSTEM_CALLS)
    return parts


def _end_with_the_server() -> None:
    """When the server ends, however it does, so does this, also when it only sleeps."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _set_limits(bounds: Bounds) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit("RLIMIT_CPU", int(usage.ru_utime + usage.ru_stime) + 1 + bounds.cpu_s)
    _limit("RLIMIT_AS", _mapped_bytes() + bounds.memory_bytes)
    for name in ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"):
        _limit(name, 0)
    # Last: no descriptor can be opened from here on; those that are open still work.
    _limit("RLIMIT_NOFILE", 0)


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, name, None)
    if kind is not None:
        resource.setrlimit(kind, (value, value))


def _mapped_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        # No such file: a machine that does not say gets a bound that no import of ours is near.
        return 16 * 2**30


def _filter_system_calls() -> bool:
    machine = _MACHINES.get(os.uname().machine)
    if machine is None or sys.byteorder != "little":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    code = b"".join(_program(machine))
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
    # Of all threads: libraries may have started some.
    status: int = libc.syscall(machine.seccomp, _SECCOMP_SET_MODE_FILTER, _FILTER_FLAG_TSYNC, program)
    return status == 0


def _program(machine: _Machine) -> list[bytes]:
    """The filter. Jumps count instructions to leave out: from each comparison to the last but one, ALLOW."""
    calls = sorted(machine.allowed)
    body = [
        _instruction(_LOAD, _MACHINE_AT),
        _instruction(_JUMP_IF_EQUAL, machine.audit_arch, if_equal=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
    ]
    # Behind the comparisons: write's own check (3 instructions), ALLOW.
    body += [
        _instruction(_JUMP_IF_EQUAL, number, if_equal=len(calls) - index + 3) for index, number in enumerate(calls)
    ]
    return [
        *body,
        _instruction(_JUMP_IF_EQUAL, machine.write, if_not=1 + 1),
        _instruction(_LOAD, _FIRST_ARGUMENT_AT),
        _instruction(_JUMP_IF_EQUAL, 1, if_equal=1),
        _instruction(_RETURN, _REFUSE),
        _instruction(_RETURN, _ALLOW),
    ]


def _instruction(code: int, operand: int, *, if_equal: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_equal, if_not, operand)
