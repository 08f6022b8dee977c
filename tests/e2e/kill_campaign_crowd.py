"""The tenants of the kill campaign as the campaign sees them: a process whose every answer is compared at once.

It refuses to know who is killed and when.
Invariant: an answer that differs from the undisturbed one is a problem, and a problem ends the campaign.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

TENANTS = Path(__file__).with_name("kill_campaign_tenants.py")
# Every tenant gets its next answer within this time of a kill, or it hangs. The SDK alone waits up to 30 s between
# its tries.
MAX_PAUSE_S = 120.0
# How long tenants may take to end their rounds once they were told to.
MAX_ROUND_S = 240.0


class CampaignFailed(AssertionError):
    """Something was lost, or hangs. The message has the seed and where the log lies."""


@dataclass(slots=True)
class Diary:
    """One tenant's round: what it was told, in order, and the paths of what it left behind."""

    answers: list[tuple[str, object]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reference:
    """Undisturbed rounds by tenant, and the digests of the states they ended in."""

    diaries: tuple[Diary, ...]
    states: tuple[tuple[str, ...], ...]


class Crowd:
    """The tenants' process: compares what they are told, and knows who was told something when.

    log: where the SDK's own words go.
    """

    def __init__(self, url: str, *, seed: int, num_tenants: int, reference: Reference | None, log: Path) -> None:
        self._command = [sys.executable, str(TENANTS), url, str(seed), str(num_tenants)]
        self._reference = reference
        self._log = log
        self._condition = threading.Condition()
        self._current = [Diary() for _ in range(num_tenants)]
        self.rounds: list[list[Diary]] = [[] for _ in range(num_tenants)]
        self.told_at: list[float] = [0.0] * num_tenants
        self.problems: list[str] = []
        self.num_answers = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Crowd:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Let every tenant end its round. Raises CampaignFailed when one does not, or ended badly."""
        assert self._process is not None
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write("stop\n")
        try:
            status = self._process.wait(timeout=MAX_ROUND_S)
        except subprocess.TimeoutExpired:
            raise CampaignFailed(f"tenants hang: {self._late(since=time.monotonic() - 60)}") from None
        with self._condition:
            self._condition.wait_for(lambda: all(not diary.answers for diary in self._current), timeout=10)
        self.check()
        assert status == 0, status

    def check(self) -> None:
        """Raises CampaignFailed when anything was not as it should be."""
        if self.problems:
            raise CampaignFailed("\n".join(self.problems[:5]))

    def wait_for_answers(self, since: float) -> tuple[float, ...]:
        """Seconds from `since` until each tenant was told something. Raises CampaignFailed when one never is."""
        pauses: dict[int, float] = {}

        def is_done() -> bool:
            for tenant, at in enumerate(self.told_at):
                if at > since:
                    pauses.setdefault(tenant, at - since)
            return bool(self.problems) or len(pauses) == len(self.told_at)

        with self._condition:
            is_complete = self._condition.wait_for(is_done, timeout=MAX_PAUSE_S)
        self.check()
        if not is_complete:
            raise CampaignFailed(f"no answer for {MAX_PAUSE_S:.0f} s: {self._late(since)}")
        return tuple(pauses[tenant] for tenant in sorted(pauses))

    def _late(self, since: float) -> str:
        late = [tenant for tenant, at in enumerate(self.told_at) if at <= since]
        return ", ".join(f"tenant {tenant} behind answer {len(self._current[tenant].answers)}" for tenant in late)

    def _read(self, stdout: IO[str]) -> None:
        with stdout:
            for line in stdout:
                with self._condition:
                    self.book(json.loads(line))
                    self._condition.notify_all()

    def book(self, told: dict[str, Any]) -> None:
        """Take in one line of the tenants."""
        tenant, what, value = told["tenant"], told["what"], told["value"]
        self.told_at[tenant] = time.monotonic()
        if what == "error":
            self.problems.append(f"tenant {tenant}, round {told['round']}: {value}")
            return
        diary = self._current[tenant]
        if what == "round over":
            self._compare(tenant, len(diary.answers), None)
            self.rounds[tenant].append(diary)
            self._current[tenant] = Diary()
            return
        self._compare(tenant, len(diary.answers), (what, value))
        diary.answers.append((what, value))
        self.num_answers += 1
        if told["path"] is not None:
            diary.ends.append(told["path"])

    def _compare(self, tenant: int, index: int, answer: tuple[str, object] | None) -> None:
        """`answer` is what the undisturbed tenant was told at this point; None: its round was over."""
        if self._reference is None:
            return
        expected = self._reference.diaries[tenant].answers
        wanted = expected[index] if index < len(expected) else None
        if answer != wanted:
            self.problems.append(
                f"tenant {tenant}, round {len(self.rounds[tenant])}, answer {index}: {answer}, undisturbed: {wanted}"
            )
