"""Files that were written to harm: each is refused with a reason, within its limits, and this process goes on.

They go past what a file may import, as an attacker would: through the modules that torch has imported. What holds them
is the process that they run in, so these tests start real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from treadle.errors import InvalidRequest, ServerError
from treadle.review.process import MAX_ANSWER_BYTES, ReviewProcess

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="system calls are filtered on Linux")

HEAD = 'import torch\nos, sys = torch.os, torch.sys\nINPUTS = {"logprobs": 1}\n'


def outcome(body: str, *, timeout_s: float = 20.0) -> str:
    """What becomes of a file whose loss does this: the reason of a refusal."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    source = f"{HEAD}def loss(logprobs):\n{lines}\n    return logprobs.sum(), {{}}\n"
    try:
        answer = ReviewProcess("trace", timeout_s=timeout_s).ask(json.dumps({"name": "n", "source": source}).encode())
    except InvalidRequest as refusal:
        return refusal.message
    return str(json.loads(answer.body).get("error", "it was traced"))


# What a file tries, and what it gets for it.
ATTEMPTS = {
    "sys.modules['io'].open('/etc/hostname')": "PermissionError OSError",
    "os.open('here', os.O_CREAT | os.O_WRONLY)": "PermissionError OSError",
    "os.listdir('/')": "PermissionError OSError",
    "os.stat('/etc/hostname')": "PermissionError",
    "os.unlink('here')": "PermissionError",
    "os.mkdir('here')": "PermissionError",
    "os.pipe()": "PermissionError OSError",
    "sys.modules['_socket'].socket()": "PermissionError OSError KeyError",
    "os.fork()": "PermissionError BlockingIOError",
    "os.execv('/bin/true', ['true'])": "PermissionError",
    "os.posix_spawn('/bin/true', ['true'], {})": "PermissionError BlockingIOError",
    "sys.modules['_thread'].start_new_thread(len, ([],))": "RuntimeError",
    "os.kill(-1, 0)": "PermissionError",
    "os.kill(1, 0)": "PermissionError",
    "os.setuid(0)": "PermissionError",
    "os.setpriority(0, 0, 5)": "PermissionError",
    "sys.modules['resource'].setrlimit(0, (-1, -1))": "PermissionError ValueError OSError KeyError",
    "[b'x' * 2**20 for _ in range(10**6)]": "MemoryError",
    "bytearray(2**33)": "MemoryError",
    "torch.empty(2**31)": "RuntimeError",
}


def test_what_a_file_tries_is_refused_to_it() -> None:
    lines = ["said = []"]
    for attempt in ATTEMPTS:
        lines += ["try:", f"    {attempt}", "    said.append('done')"]
        lines += ["except BaseException as error:", "    said.append(type(error).__name__)"]
    lines.append("raise ValueError(' '.join(said))")
    reason = outcome("\n".join(lines))
    said = reason.partition("ValueError: ")[2].split()
    assert len(said) == len(ATTEMPTS), reason
    assert {what: got for (what, allowed), got in zip(ATTEMPTS.items(), said, strict=True) if got not in allowed} == {}


def test_the_reason_has_the_line() -> None:
    assert outcome("x = 1\nsys.modules['io'].open('/etc/hostname')").startswith("line 6: ")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("while True: os.write(1, b'x' * 2**16)", f"it wrote over {MAX_ANSWER_BYTES} bytes of output"),
        ("os._exit(0)", "its process ended itself without an answer (status 0)"),
        ("torch.ctypes.string_at(0)", "its process was ended by signal 11, without an answer"),
    ],
    ids=["floods", "ends", "crashes"],
)
def test_a_file_that_does_something_to_its_process_is_refused(body: str, reason: str) -> None:
    assert outcome(body) == reason


@pytest.mark.parametrize(
    "body",
    ["while True: pass", "sys.modules['time'].sleep(1000)", "os.close(1)\nwhile True: pass"],
    ids=["computes", "sleeps", "hangs up"],
)
def test_a_file_that_never_ends_is_ended(body: str) -> None:
    assert outcome(body, timeout_s=1.0) == "it took longer than 1 s"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_machine_code_reaches_no_more_than_python_does() -> None:
    calls = {
        "open": "2, b'/etc/hostname', 0",
        "socket": "41, 2, 1, 0",
        "clone": "56, 17, 0, 0, 0, 0",
        "vfork": "58",
        "kill": "62, 1, 0",
        "ptrace": "101, 0, 0, 0, 0",
        "prctl": "157, 22, 0, 0, 0, 0",
        "tgkill": "234, 1, 1, 0",
        "unshare": "272, 0x10000000",
        "process_vm_readv": "310, 1, 0, 0, 0, 0, 0",
        "seccomp": "317, 1, 0, 0",
        "memfd_create": "319, b'x', 0",
        "bpf": "321, 0, 0, 0",
        "io_uring_setup": "425, 8, ctypes.create_string_buffer(256)",
        "pidfd_open": "434, 1, 0",
        "openat2": "437, -100, b'/etc/hostname', 0, 0",
        "open of the x32 interface": "0x40000002, b'/etc/hostname', 0",
        "write elsewhere": "1, 2, b'x', 1",
    }
    lines = ["ctypes = torch.ctypes", "libc = ctypes.CDLL(None, use_errno=True)", "done = []"]
    for name, arguments in calls.items():
        lines.append(f"if libc.syscall({arguments}) != -1 or ctypes.get_errno() != 1: done.append({name!r})")
    lines.append("raise ValueError(done)")
    assert outcome("\n".join(lines)).endswith("ValueError: []")


def test_a_file_sees_nothing_of_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_STORE__URL", "postgresql://secret")
    seen = outcome("raise ValueError(sorted(os.environ))")
    assert "OMP_NUM_THREADS" in seen
    assert "TREADLE" not in seen
    assert "PATH" not in seen


def test_where_calls_cannot_be_filtered_nothing_is_asked() -> None:
    process = ReviewProcess("trace", timeout_s=5.0, needs=frozenset(("a part that nobody has",)))
    with pytest.raises(ServerError, match=r"it lacks a part that nobody has .* nothing was executed"):
        process.ask(b"this would be an error of its own")


def test_a_review_can_be_ended_from_elsewhere() -> None:
    process = ReviewProcess("trace", timeout_s=20.0)
    process.kill()
    with pytest.raises(ServerError, match="stopping"):
        process.ask(b"{}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_child_that_became_another_user_still_ends_with_the_server() -> None:
    """The kernel forgets whose end is a process's own when it changes its user."""
    script = (
        "import ctypes\n"
        "from treadle.review import confine\n"
        # The call that is asked below is not one that the filter lets through.
        "confine._filter_system_calls = lambda: False\n"
        "assert 'other user' in confine.lock(confine.Bounds(10, 2**30), has_namespaces=False)\n"
        "signal = ctypes.c_int()\n"
        "assert ctypes.CDLL(None).prctl(2, ctypes.byref(signal), 0, 0, 0) == 0\n"
        "print(signal.value)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "9\n"
