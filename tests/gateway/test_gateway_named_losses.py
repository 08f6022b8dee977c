"""Named losses over HTTP: submitted, reviewed once in a process of its own, decided; hubs that lie; files that harm."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from gateway_support import Harness, ok, refused
from loss_support import ALICE_KEY, BOB_KEY, add_users, admin
from test_gateway_custom_losses import body_of

from treadle.config import LossSettings
from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_NAMED_LOSS_BYTES
from treadle.errors import HubUnavailable, InvalidRequest
from treadle.gateway import GatewaySettings, hub_files, named_losses
from treadle.gateway.hub_files import HubFile, fetch
from treadle.gateway.named_losses import LossReviews, _object
from treadle.review.process import Answer
from treadle.store.audit import Author
from treadle.wire.answers_named_losses import NamedLossDetailAnswer, NamedLossesAnswer, SubmissionAnswer

GOOD = """\
import torch
INPUTS = {"logprobs": 1, "advantages": 1}

def loss(logprobs, advantages):
    return -(torch.exp(logprobs) * advantages).sum(), {"custom/ratio:mean": torch.exp(logprobs).mean()}
"""
OPERATOR = Author(TenantId("user:root"), "user:root")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def graph() -> str:
    body = body_of("session")
    return json.dumps({"inputs": body["inputs"], "graph": body["graph"]})


@pytest.fixture
def settings() -> GatewaySettings:
    """Reviews are waited for."""
    return GatewaySettings(is_loopback=True, hold_s=60.0)


@pytest.fixture
async def gateway(gateway: Harness) -> Harness:
    await add_users(gateway)
    return gateway


async def submit(gateway: Harness, name: str = "mine", *, key: str = ALICE_KEY, **fields: object) -> dict[str, Any]:
    body = {"name": name, "content": GOOD, **fields}
    return ok(await gateway.post("losses", {field: value for field, value in body.items() if value}, key=key))


async def named(gateway: Harness, verb: str, number: int, body: object = None) -> dict[str, Any]:
    return ok(await admin(gateway, "POST", f"losses/named/{number}/{verb}", body))


async def reason_of_review(gateway: Harness, content: str) -> str:
    """Why a file's review failed."""
    number = (await submit(gateway, f"mine_{sha(content)[:8]}", content=content))["named_loss_id"]
    review = (await named(gateway, "review", number))["review"]
    assert (review["state"], review["is_ok"]) == ("failed", False)
    refused(await admin(gateway, "POST", f"losses/named/{number}/approve", {}), 400)
    return str(review["reason"])


class TestSubmission:
    async def test_an_upload_waits_and_only_its_owner_sees_it(self, gateway: Harness) -> None:
        row = await submit(gateway, sha256=sha(GOOD))
        SubmissionAnswer.model_validate(row)
        assert (row["status"], row["review"], row["sha256"]) == ("pending", None, sha(GOOD))
        assert ok(await gateway.get("losses/mine", key=ALICE_KEY)) == row
        theirs = refused(await gateway.get("losses/mine", key=BOB_KEY), 404)
        assert theirs == refused(await gateway.get("losses/none", key=BOB_KEY), 404).replace("none", "mine")

    async def test_nothing_is_executed_nor_parsed_when_it_arrives(self, gateway: Harness) -> None:
        for index, content in enumerate(("import os; os._exit(3)", "(" * 10_000, "def loss(:")):
            assert (await submit(gateway, f"mine_{index}", content=content))["status"] == "pending"

    async def test_its_owner_withdraws_what_is_pending_and_nobody_else_does(self, gateway: Harness) -> None:
        await submit(gateway)
        headers = {"X-API-Key": BOB_KEY}
        refused(await gateway.client.delete("/api/v1/losses/mine", headers=headers), 404)
        headers = {"X-API-Key": ALICE_KEY}
        ok(await gateway.client.delete("/api/v1/losses/mine", headers=headers))
        refused(await gateway.get("losses/mine", key=ALICE_KEY), 404)
        number = (await submit(gateway))["named_loss_id"]
        await named(gateway, "reject", number, {"reason": "no"})
        assert "rejected" in refused(await gateway.client.delete("/api/v1/losses/mine", headers=headers), 400)
        assert ok(await gateway.get("losses/mine", key=ALICE_KEY))["reason"] == "no"

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"name": "ppo"}, "is taken"),
            ({"name": "custom"}, "is taken"),
            ({"name": "Mine"}, "not a lower-case identifier"),
            ({"name": "a-b"}, "not a lower-case identifier"),
            ({"name": "x" * 65}, "not a lower-case identifier"),
            ({"sha256": "0" * 64}, f"sha256 is {sha(GOOD)}, not 0000"),
            ({"content": None}, "with its content"),
            ({"revision": COMMIT}, "without a revision"),
            ({"content": "x = '\u202e'"}, "invisible character U+202E"),
            # Drawn as a new line where Python reads on, and as none where Python begins one.
            ({"content": "# see below\u2028x = 1"}, "invisible character U+2028"),
            ({"content": "# see below\rx = 1\r\n"}, "invisible character U+000D"),
            # A letter, for Python; nothing, for its reader.
            ({"content": "x\u3164 = 1"}, "invisible character U+3164"),
            ({"content": "x" * (MAX_NAMED_LOSS_BYTES + 1)}, "65536"),
            ({"content": "\u00e9" * (MAX_NAMED_LOSS_BYTES // 2 + 1)}, "65538 bytes; allowed are 65536"),
            ({"form": "graph"}, "not JSON"),
            ({"form": "graph", "content": "[]"}, "is an object of inputs and graph"),
            ({"form": "graph", "content": f'{{"inputs": {"[" * 300}{"]" * 300}}}'}, "graph is not an object"),
            (
                {"form": "graph", "content": f'{{"inputs": [], "graph": {"[" * 300}{"]" * 300}}}'},
                "graph is not an object",
            ),
            ({"form": "graph", "content": graph().replace("torch.exp", "os.system")}, "os.system"),
            ({"form": "cuda"}, "form"),
            ({"source": "ms://a/b/f.py", "content": None, "revision": COMMIT}, "with its sha256"),
            ({"source": "ms://a/b/f.py", "sha256": sha(GOOD), "revision": COMMIT}, "without content"),
            ({"source": "hf://a/b/f.py", "content": None, "sha256": sha(GOOD), "revision": "main"}, "hash of a commit"),
            ({"source": "hf://a/b/../../x", "content": None, "revision": COMMIT}, "is not upload"),
            ({"source": "https://example.org/f.py", "content": None}, "is not upload"),
            ({"source": "hf://a@evil.example/b/f.py", "content": None}, "is not upload"),
            ({"unknown": 1}, "unknown"),
        ],
    )
    async def test_what_cannot_be_a_loss_is_refused_at_once(
        self, gateway: Harness, fields: dict[str, object], reason: str
    ) -> None:
        body = {"name": "mine", "content": GOOD, **fields}
        sent = {field: value for field, value in body.items() if value is not None}
        assert reason in refused(await gateway.post("losses", sent, key=ALICE_KEY), 400)

    async def test_a_server_may_take_no_python(self, gateway: Harness) -> None:
        from treadle.gateway.named_losses import submission_of
        from treadle.wire.named_loss_bodies import SubmitLossBody

        body = SubmitLossBody(name="mine", content=GOOD)
        with pytest.raises(InvalidRequest, match="takes no Python files"):
            submission_of(body, TenantId("user:alice"), LossSettings(python_files="never"))


class TestReview:
    async def test_a_file_is_traced_tried_approved_and_used(self, gateway: Harness) -> None:
        number = (await submit(gateway))["named_loss_id"]
        assert ok(await admin(gateway, "GET", f"losses/named/{number}"))["content"] == GOOD
        seen = await named(gateway, "review", number)
        NamedLossDetailAnswer.model_validate(seen)
        review = seen["review"]
        assert review["is_ok"], review
        assert "limits" in review["isolation"]
        assert review["operations"]["torch.exp"] == 2
        assert review["dry_run"]["inputs"][0]["gradient"] == "agrees"
        assert seen["definition"]["inputs"][1] == {"name": "advantages", "rank": 1}
        owners = ok(await gateway.get("losses/mine", key=ALICE_KEY))
        assert owners["review"] == review
        assert "decided_by" not in owners
        again = refused(await admin(gateway, "POST", f"losses/named/{number}/review"), 400)
        assert "is passed already" in again
        bare = await admin(gateway, "POST", f"losses/named/{number}/approve", {"tenants": ["alice"]})
        assert "tenant:user:alice" in refused(bare, 400), "nobody is called so"
        approved = await named(gateway, "approve", number, {"tenants": ["user:alice"]})
        assert (approved["status"], approved["tenants"]) == ("approved", ["user:alice"])
        assert "user:root" in approved["decided_by"]
        assert [loss["name"] for loss in ok(await gateway.get("losses", key=ALICE_KEY))["named"]] == ["mine"]
        assert ok(await gateway.get("losses", key=BOB_KEY))["named"] == []
        await named(gateway, "revoke", number, {"reason": "enough"})
        assert ok(await gateway.get("losses", key=ALICE_KEY))["named"] == []
        assert approved["definition_sha256"] in gateway.app.state.gateway.policies.now.revoked_losses
        refused(await admin(gateway, "DELETE", f"losses/named/{number}"), 400)

    async def test_a_graph_is_tried_as_well(self, gateway: Harness) -> None:
        number = (await submit(gateway, form="graph", content=graph()))["named_loss_id"]
        assert "not begun" in refused(await admin(gateway, "POST", f"losses/named/{number}/approve"), 400)
        seen = await named(gateway, "review", number)
        assert (seen["review"]["is_ok"], seen["review"]["isolation"]) == (True, [])
        assert (await named(gateway, "approve", number))["tenants"] is None
        assert [loss["name"] for loss in ok(await gateway.get("losses", key=BOB_KEY))["named"]] == ["mine"]

    async def test_a_file_that_forges_an_answer_gets_no_more_than_a_graph_may(self, gateway: Harness) -> None:
        forged = json.dumps({"definition": json.loads(graph().replace("torch.exp", "os.system"))})
        write = f"import torch\ntorch.os.write(1, {forged.encode()!r})\ntorch.os._exit(0)\n"
        assert "os.system" in await reason_of_review(gateway, write)

    async def test_what_a_file_says_of_itself_is_shown_as_plain_text(self, gateway: Harness) -> None:
        answer = b'{"error": "no\\u0000\\u001b[2J"}'
        write = f"import torch\ntorch.os.write(1, {answer!r})\ntorch.os._exit(0)\n"
        assert await reason_of_review(gateway, write) == "no  [2J"

    @pytest.mark.parametrize("body", [b"\x00\xff", b"[]", b"3", b'{"a": 1}{', b"[" * 5_000])
    def test_an_answer_that_is_none_is_refused(self, body: bytes) -> None:
        with pytest.raises(InvalidRequest, match="something else than the answer"):
            _object(Answer((), body))

    async def test_a_loss_that_is_not_finite_is_not_approved(self, gateway: Harness) -> None:
        content = GOOD.replace("advantages).sum()", "advantages / (advantages - advantages)).sum()")
        assert "it works with no kind of made-up inputs" in await reason_of_review(gateway, content)

    async def test_others_are_served_while_it_runs_and_a_second_one_is_told_to_wait(self, gateway: Harness) -> None:
        first, second = [(await submit(gateway, name))["named_loss_id"] for name in ("mine", "other")]
        review = asyncio.create_task(named(gateway, "review", first))
        while ok(await admin(gateway, "GET", f"losses/named/{first}"))["review"] is None:
            pass
        busy = refused(await admin(gateway, "POST", f"losses/named/{second}/review"), 503)
        assert "another review runs" in busy
        num_served = 0
        while not review.done():
            ok(await gateway.get("healthz"))
            num_served += 1
            await asyncio.sleep(0.01)
        assert num_served > 5
        assert (await review)["review"]["is_ok"]

    @pytest.mark.parametrize("is_running", [False, True], ids=["at once", "while the file runs"])
    async def test_a_server_that_stops_ends_its_review_for_good(
        self, gateway: Harness, is_running: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(named_losses, "TRACE_S", 1_000.0)
        content = "import torch\ntorch.sys.modules['time'].sleep(1000)"
        number = (await submit(gateway, content=content))["named_loss_id"]
        reviews = LossReviews(store=gateway.store, settings=LossSettings())
        task = await reviews.begin(number, OPERATOR)
        while is_running and (reviews._process is None or reviews._process._process is None):
            await gateway.store.ping()
        await reviews.stop()
        assert task.done()
        row = await gateway.store.named_losses.get(number)
        assert row.review is not None
        assert (row.review["state"], "stopped during the review" in row.review["reason"]) == ("failed", True)
        with pytest.raises(InvalidRequest, match="failed already"):
            await reviews.begin(number, OPERATOR)

    async def test_of_two_servers_one_reviews(self, gateway: Harness) -> None:
        number = (await submit(gateway))["named_loss_id"]
        servers = [LossReviews(store=gateway.store, settings=LossSettings()) for _ in range(2)]
        begun = await asyncio.gather(*(server.begin(number, OPERATOR) for server in servers), return_exceptions=True)
        assert sorted(isinstance(begin, asyncio.Task) for begin in begun) == [False, True]
        assert any("already" in str(begin) for begin in begun)
        for server in servers:
            await server.stop()


class TestOperators:
    async def test_listings_have_pages_and_no_content(self, gateway: Harness) -> None:
        ids = [(await submit(gateway, f"mine_{index}"))["named_loss_id"] for index in range(3)]
        await named(gateway, "reject", ids[0], {"reason": "no"})
        page = ok(await admin(gateway, "GET", "losses/named?limit=2"))
        NamedLossesAnswer.model_validate(page)
        assert [row["named_loss_id"] for row in page["data"]] == [ids[2], ids[1]]
        assert "content" not in page["data"][0]
        rest = ok(await admin(gateway, "GET", f"losses/named?limit=2&before={page['next']}"))
        assert ([row["named_loss_id"] for row in rest["data"]], rest["next"]) == ([ids[0]], None)
        pending = ok(await admin(gateway, "GET", "losses/named?status=rejected"))["data"]
        assert [row["named_loss_id"] for row in pending] == [ids[0]]

    async def test_an_operator_submits_and_removes(self, gateway: Harness) -> None:
        row = ok(await admin(gateway, "POST", "losses/named", {"name": "ours", "content": GOOD}))
        assert row["tenant_id"] == "user:root"
        ok(await admin(gateway, "DELETE", f"losses/named/{row['named_loss_id']}"))
        refused(await admin(gateway, "GET", f"losses/named/{row['named_loss_id']}"), 404)

    @pytest.mark.parametrize("number", ["0", "99999999999999999999", "x", "-1", "1.5", "\u0663"])
    async def test_a_number_that_nobody_has_is_not_found(self, gateway: Harness, number: str) -> None:
        for verb, body in (("review", {}), ("approve", {}), ("reject", {"reason": "x"}), ("revoke", {"reason": "x"})):
            refused(await admin(gateway, "POST", f"losses/named/{number}/{verb}", body), 404)

    async def test_users_are_no_operators(self, gateway: Harness) -> None:
        number = (await submit(gateway))["named_loss_id"]
        for method, path in (("GET", ""), ("POST", ""), ("GET", f"/{number}"), ("DELETE", f"/{number}")):
            refused(await admin(gateway, method, f"losses/named{path}", {}, key=ALICE_KEY), 403)
        for verb in ("review", "approve", "reject", "revoke"):
            refused(await admin(gateway, "POST", f"losses/named/{number}/{verb}", {}, key=ALICE_KEY), 403)

    async def test_another_tenants_name_cannot_be_taken(self, gateway: Harness) -> None:
        number = (await submit(gateway, form="graph", content=graph()))["named_loss_id"]
        await named(gateway, "review", number)
        await named(gateway, "approve", number, {"tenants": ["user:alice"]})
        taken = await gateway.post("losses", {"name": "mine", "content": GOOD}, key=BOB_KEY)
        # Without a word about whose it is.
        assert refused(taken, 400) == "name 'mine' is taken; choose another"


@asynccontextmanager
async def hub(answer: bytes, *, pause_s: float = 0.0) -> AsyncIterator[tuple[str, list[str]]]:
    """A hub that says this to everybody, byte for byte: its URL, and what it was asked."""
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        try:
            for start in range(0, len(answer), 2**14):
                writer.write(answer[start : start + 2**14])
                await writer.drain()
                await asyncio.sleep(pause_s)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}", asked
    finally:
        server.close()
        await server.wait_closed()


def answer_of(content: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n{headers}\r\n".encode() + content


def redirect_to(url: str) -> bytes:
    return answer_of(b"", status="302 Found", headers=f"Location: {url}\r\n")


FILE = HubFile("ms", "org", "repo", "losses/mine.py", COMMIT)


class TestHubs:
    async def test_a_hub_is_asked_when_the_review_begins_and_not_before(
        self, gateway: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with hub(answer_of(GOOD.encode())) as (url, asked):
            reviews = gateway.app.state.gateway.loss_reviews
            monkeypatch.setattr(reviews, "_settings", LossSettings(modelscope_url=url, huggingface_url=url))
            source = "ms://org/repo/losses/mine.py"
            row = await submit(gateway, content=None, source=source, revision=COMMIT, sha256=sha(GOOD))
            number = row["named_loss_id"]
            assert ok(await admin(gateway, "GET", f"losses/named/{number}"))["content"] is None
            assert asked == []
            seen = await named(gateway, "review", number)
            assert (seen["review"]["is_ok"], seen["content"]) == (True, GOOD)
            assert await fetch(replace(FILE, hub="hf"), reviews._settings) == GOOD.encode()
            assert asked[0].startswith(
                f"GET /api/v1/models/org/repo/repo?Revision={COMMIT}&FilePath=losses%2Fmine.py HTTP/1.1"
            )
            assert asked[1].startswith(f"GET /org/repo/resolve/{COMMIT}/losses/mine.py HTTP/1.1")
            assert not any("authorization" in request.lower() or "cookie" in request.lower() for request in asked)

    async def test_another_file_than_was_announced_is_not_executed(
        self, gateway: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with hub(answer_of(b"raise SystemExit")) as (url, _):
            monkeypatch.setattr(gateway.app.state.gateway.loss_reviews, "_settings", LossSettings(modelscope_url=url))
            row = await submit(gateway, content=None, source="ms://a/b/f.py", revision=COMMIT, sha256=sha(GOOD))
            seen = await named(gateway, "review", row["named_loss_id"])
        assert (seen["review"]["state"], seen["content"]) == ("failed", None)
        assert seen["review"]["reason"] == f"sha256 is {sha('raise SystemExit')}, not {sha(GOOD)}"

    async def test_a_hub_that_is_down_costs_nobody_the_review(
        self, gateway: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reviews = gateway.app.state.gateway.loss_reviews
        row = await submit(gateway, content=None, source="ms://a/b/f.py", revision=COMMIT, sha256=sha(GOOD))
        number = row["named_loss_id"]
        async with hub(answer_of(b"", status="500 No")) as (url, _):
            monkeypatch.setattr(reviews, "_settings", LossSettings(modelscope_url=url))
            refused(await admin(gateway, "POST", f"losses/named/{number}/review"), 503)
        refused(await admin(gateway, "POST", f"losses/named/{number}/review"), 503)
        async with hub(answer_of(b"another file")) as (url, _):
            monkeypatch.setattr(reviews, "_settings", LossSettings(modelscope_url=url))
            assert (await named(gateway, "review", number))["review"]["state"] == "failed"
        assert "failed already" in refused(await admin(gateway, "POST", f"losses/named/{number}/review"), 400)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (redirect_to("http://169.254.169.254/latest/meta-data"), "redirects to http://169.254.169.254, where"),
            (redirect_to("https://169.254.169.254/"), "redirects to https://169.254.169.254, where"),
            (redirect_to("http://127.0.0.1:1/"), "redirects to http://127.0.0.1, where"),
            (redirect_to("file:///etc/passwd"), "redirects to file://"),
            (redirect_to("//cdn.example/x"), "redirects to http://cdn.example, where"),
            (redirect_to("/again"), "redirects over 5 times"),
            (answer_of(b"x" * (MAX_NAMED_LOSS_BYTES + 1)), "over 65536 bytes"),
            (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2**22, "over 65536 bytes"),
            (answer_of(b"", status="404 Not Found"), "answers 404"),
            (answer_of(b"", status="401 Unauthorized"), "answers 401"),
        ],
    )
    async def test_a_hub_that_leads_elsewhere_or_sends_too_much_is_refused(self, answer: bytes, reason: str) -> None:
        async with hub(answer) as (url, _):
            with pytest.raises(InvalidRequest, match=reason):
                await fetch(FILE, LossSettings(modelscope_url=url, redirect_hosts=("127.0.0.1", "cdn.example")))

    async def test_a_host_that_an_operator_names_may_be_led_to_by_https_alone(self) -> None:
        async with hub(redirect_to("https://localhost:1/file")) as (url, _):
            # It goes there, and finds nobody.
            with pytest.raises(HubUnavailable):
                await fetch(FILE, LossSettings(modelscope_url=url, redirect_hosts=("localhost",)))

    async def test_a_slow_hub_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub_files, "FETCH_S", 0.3)
        async with hub(answer_of(b"x" * 2**16), pause_s=0.2) as (url, _):
            with pytest.raises(HubUnavailable, match=r"did not send the file within 0\.3 s"):
                await fetch(FILE, LossSettings(modelscope_url=url))

    @pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", answer_of(b"", status="429 Later")])
    async def test_a_hub_that_speaks_no_http_or_is_busy_is_asked_again_later(self, answer: bytes) -> None:
        async with hub(answer) as (url, _):
            with pytest.raises(HubUnavailable):
                await fetch(FILE, LossSettings(modelscope_url=url))

    @pytest.mark.parametrize(
        "url", ["http://hub.example", "https://user:pass@hub.example", "https://hub.example/?x", "ftp://x", "https://"]
    )
    def test_a_hub_is_reached_by_https(self, url: str) -> None:
        with pytest.raises(ValueError, match="modelscope_url"):
            LossSettings(modelscope_url=url)
