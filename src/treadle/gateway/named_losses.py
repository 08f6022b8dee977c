"""Submissions of losses and their reviews: what is checked when one arrives, and what happens when an operator asks.

A review takes seconds and goes on when its caller is gone; this server runs one at a time, in processes of their own
(treadle.review), and does not wait for them on its event loop. A file is executed at most once: its review is claimed
in the database first. Invariant: nothing that a child answers is believed; its graph is checked as if a client had sent
it, and stored only then.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson

from treadle.config import LossSettings
from treadle.domain.custom_loss import CustomLoss, NodeOp
from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_CUSTOM_LOSS_BYTES
from treadle.domain.named_losses import (
    UPLOAD,
    NewSubmission,
    ReviewResult,
    ReviewState,
    Submission,
    check_name,
    check_size,
)
from treadle.errors import InvalidRequest, Overloaded, ServerError, UserError
from treadle.gateway.hub_files import fetch, hub_file
from treadle.review.process import FULL, Answer, Mode, ReviewProcess
from treadle.store import Store
from treadle.store.audit import Author
from treadle.telemetry.logs import get_logger
from treadle.wire.graphs import loss_of_fields, write_custom_loss
from treadle.wire.named_loss_bodies import SubmitLossBody

log = get_logger(__name__)

# Seconds for tracing a file, which takes tenths of one, and for the dry run.
TRACE_S = 20.0
DRY_RUN_S = 60.0
# Unicode's Default_Ignorable_Code_Point, beyond what its categories say: drawn as nothing, and some are letters.
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
_STOPPED = "the server was stopped during the review; submit the loss again"


def submission_of(body: SubmitLossBody, tenant_id: TenantId, settings: LossSettings) -> NewSubmission:
    """What a user submits, checked as far as that needs neither hub nor execution. Raises InvalidRequest."""
    check_name(body.name)
    if body.form == "python" and settings.python_files == "never":
        raise InvalidRequest("this server takes no Python files; submit the loss as a graph")
    if body.source != UPLOAD:
        hub_file(body.source, body.revision)
        if body.content is not None or body.sha256 is None:
            raise InvalidRequest("a file of a hub is submitted with its sha256, and without content")
        return NewSubmission(
            body.name, tenant_id, body.source, body.revision, body.sha256, form=body.form, content=None
        )
    if body.content is None or body.revision is not None:
        raise InvalidRequest("an upload is submitted with its content, and without a revision")
    content = body.content.encode()
    sha256 = check_content(content, body.sha256)
    definition = write_custom_loss(graph_of(body.name, content)) if body.form == "graph" else None
    return NewSubmission(
        body.name, tenant_id, UPLOAD, None, sha256, form=body.form, content=content, definition=definition
    )


def check_content(content: bytes, sha256: str | None) -> str:
    """The SHA-256 of a file. Raises InvalidRequest when it is not the one that was announced, the file is too large,
    or it is no text that shows all of itself to who reads it."""
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and sha256 != found:
        raise InvalidRequest(f"sha256 is {found}, not {sha256}")
    check_size(len(content))
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the file is not UTF-8") from None
    # Old line ends alone: Python begins a line there, and what shows the file to people does not.
    for character in text.replace("\r\n", "\n"):
        if character not in "\t\n" and _hides_something(character):
            raise InvalidRequest(f"the file has the invisible character U+{ord(character):04X}")
    return found


def _hides_something(character: str) -> bool:
    """Whether it makes a line look like another one, or like two."""
    is_unseen = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")
    return is_unseen or _IGNORABLE.match(character) is not None


def graph_of(name: str, content: bytes) -> CustomLoss:
    """The loss of a file that is a graph, under its name. Raises InvalidRequest."""
    try:
        fields = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise InvalidRequest("the file is not JSON") from None
    return _checked_loss(name, fields)


def _checked_loss(name: str, fields: object) -> CustomLoss:
    if not isinstance(fields, dict):
        raise InvalidRequest("a graph is an object of inputs and graph")
    loss = loss_of_fields(name, fields)
    size = len(write_custom_loss(loss))
    if size > MAX_CUSTOM_LOSS_BYTES:
        raise InvalidRequest(f"the graph has {size} bytes; allowed are {MAX_CUSTOM_LOSS_BYTES}")
    return loss


class LossReviews:
    """Runs reviews for one gateway, on its event loop."""

    def __init__(self, *, store: Store, settings: LossSettings) -> None:
        self._store = store
        self._settings = settings
        self._is_busy = False
        self._is_stopping = False
        self._running: asyncio.Task[None] | None = None
        self._process: ReviewProcess | None = None

    async def begin(self, named_loss_id: int, author: Author) -> asyncio.Task[None]:
        """The review, begun; it ends on its own. Raises NotFound, InvalidRequest when there was one already, Overloaded
        while another one runs here, and HubUnavailable."""
        if self._is_busy:
            raise Overloaded("another review runs on this server; ask again when it is done")
        self._is_busy = True
        try:
            self._running = asyncio.create_task(
                self._review(*await self._claimed(named_loss_id, author), author), name="loss review"
            )
        except BaseException:
            self._is_busy = False
            raise
        return self._running

    async def stop(self) -> None:
        """End the review that runs, for good. Idempotent."""
        self._is_stopping = True
        if self._process is not None:
            self._process.kill()
        if self._running is not None:
            await asyncio.wait({self._running})

    async def _claimed(self, named_loss_id: int, author: Author) -> tuple[Submission, bytes, str | None]:
        """What is to be reviewed, its file, and what is wrong with the file."""
        submission = await self._store.named_losses.get(named_loss_id)
        content, problem = submission.content, None
        if content is None and submission.is_reviewable:
            # Before the claim: a hub that does not answer costs nobody the one review.
            content, problem = await self._fetched(submission)
        claimed = await self._store.named_losses.begin_review(named_loss_id, author)
        return claimed, content or b"", problem

    async def _fetched(self, submission: Submission) -> tuple[bytes | None, str | None]:
        try:
            content = await fetch(hub_file(submission.source, submission.revision), self._settings)
            check_content(content, submission.sha256)
        except UserError as error:
            return None, error.message
        return content, None

    async def _review(self, submission: Submission, content: bytes, problem: str | None, author: Author) -> None:
        try:
            result = _failed(problem, content) if problem else await self._result(submission, content)
        except (UserError, ServerError) as error:
            result = _failed(error.message, content)
        except Exception as error:  # noqa: BLE001 (a background task: whatever it was, the review has ended)
            log.error("review failed unexpectedly", exc=error, named_loss_id=submission.named_loss_id)
            result = _failed("the server could not finish the review; submit the loss again", content)
        try:
            await self._finish(submission.named_loss_id, result, author)
        finally:
            self._is_busy = False

    async def _finish(self, named_loss_id: int, result: ReviewResult, author: Author) -> None:
        try:
            await self._store.named_losses.finish_review(named_loss_id, result, author)
        except ServerError as error:
            # It counts as ended by the death of its server, which is what it comes to.
            log.error("review lost", named_loss_id=named_loss_id, error=error.message)
        else:
            log.info("loss reviewed", named_loss_id=named_loss_id, state=result.report["state"])

    async def _result(self, submission: Submission, content: bytes) -> ReviewResult:
        isolation: tuple[str, ...] = ()
        if submission.form == "graph":
            loss = graph_of(submission.name, content)
        else:
            loss, isolation = await self._traced(submission.name, content)
        definition = write_custom_loss(loss)
        report: dict[str, Any] = {"isolation": list(isolation), "operations": _operations(loss)}
        try:
            dry_run = _object(await self._ask("dry_run", definition, timeout_s=DRY_RUN_S))
        except InvalidRequest as error:
            dry_run = {"is_ok": False, "reason": f"dry run: {error.message}"}
        is_ok = dry_run.get("is_ok") is True
        report |= {
            "state": (ReviewState.PASSED if is_ok else ReviewState.FAILED).value,
            "reason": None if is_ok else _printable(str(dry_run.get("reason"))),
            "dry_run": dry_run,
        }
        return ReviewResult(report, content=content, definition=definition)

    async def _traced(self, name: str, content: bytes) -> tuple[CustomLoss, tuple[str, ...]]:
        """The graph of a Python file, which is executed here, and what kept it from this machine."""
        if self._settings.python_files == "never":
            raise InvalidRequest("this server executes no Python files")
        request = orjson.dumps({"name": name, "source": content.decode()})
        answer = await self._ask("trace", request, timeout_s=TRACE_S)
        fields = _object(answer)
        if "error" in fields:
            raise InvalidRequest(str(fields["error"])[:1_000])
        return _checked_loss(name, fields.get("definition")), answer.isolation

    async def _ask(self, mode: Mode, request: bytes, *, timeout_s: float) -> Answer:
        needs = FULL if self._settings.python_files == "isolated" and mode == "trace" else frozenset[str]()
        self._process = ReviewProcess(mode, timeout_s=timeout_s, needs=needs)
        if self._is_stopping:
            raise ServerError(_STOPPED)
        try:
            return await asyncio.to_thread(self._process.ask, request)
        except (UserError, ServerError):
            if self._is_stopping:
                raise ServerError(_STOPPED) from None
            raise


def _object(answer: Answer) -> Mapping[str, Any]:
    try:
        fields = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise InvalidRequest("it wrote something else than the answer to its output")
    return fields


def _failed(reason: str, content: bytes) -> ReviewResult:
    return ReviewResult({"state": ReviewState.FAILED.value, "reason": _printable(reason)}, content=content or None)


def _operations(loss: CustomLoss) -> dict[str, int]:
    calls = (node.target for node in loss.nodes if node.op in (NodeOp.CALL_FUNCTION, NodeOp.CALL_METHOD))
    return dict(sorted(Counter(calls).items()))


def _printable(text: str) -> str:
    """What a stranger's code says, as a database and a terminal can hold it."""
    return "".join(character if character.isprintable() else " " for character in text)
