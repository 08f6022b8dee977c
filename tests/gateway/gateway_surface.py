"""Every endpoint as it is called, by whom and about whose things; for tests that go through the whole surface.

A route without an entry in CALLS fails those tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import httpx
from gateway_support import KEY, POOL, Harness, facts, ok, open_tenant, sample_body
from test_gateway_custom_losses import body_of as loss_body
from test_gateway_legacy import json_pass
from test_gateway_openai import BUNDLED, HELLO, result_of

from treadle.domain.archive import pack_files
from treadle.domain.ids import (
    PROJECT_PREFIX,
    CheckpointKind,
    ModelId,
    SessionId,
    custom_loss_id,
    sampler_id,
    training_model_id,
)
from treadle.gateway import PoolView
from treadle.testing.builders import datum, pass_op
from treadle.wire import treadle_pb2 as pb
from treadle.wire.passes import encode_pass
from treadle.wire.results import PROTOBUF


@dataclass(frozen=True)
class Estate:
    """One thing of every kind, all of one tenant. Their ids follow from the session's.

    number: of what the session made. seq_id: the next free one of its run, its sampler and its losses.
    """

    session_id: SessionId
    number: int = 0
    seq_id: int = 2

    @property
    def model_id(self) -> ModelId:
        return training_model_id(self.session_id, self.number)

    @property
    def sampler_id(self) -> str:
        return sampler_id(self.session_id, self.number)

    @property
    def loss_id(self) -> str:
        return custom_loss_id(self.session_id, self.number)

    @property
    def sample_id(self) -> str:
        """A sample that is done."""
        return f"{self.sampler_id}:1"

    @property
    def op_id(self) -> str:
        """A step that waits."""
        return f"{self.model_id}:1"

    @property
    def project(self) -> str:
        return f"project-{self.session_id}-{self.number}"

    @property
    def shared_project(self) -> str:
        """A shared project that nobody else is in; the session is not in it."""
        return f"{PROJECT_PREFIX}{self.session_id}-{self.number}"

    def name(self, kind: CheckpointKind) -> str:
        """Of a checkpoint of this kind."""
        return f"{kind.value[0]}-{self.session_id}"

    def path(self, kind: CheckpointKind = CheckpointKind.TRAINING) -> str:
        return f"tinker://{self.model_id}/{kind.value}/{self.name(kind)}"

    def url(self, kind: CheckpointKind = CheckpointKind.TRAINING) -> str:
        return f"/api/v1/training_runs/{self.model_id}/checkpoints/{kind.value}/{self.name(kind)}"


@dataclass(frozen=True)
class Call:
    """One request. is_sampled: it is answered when a sampler has done its part."""

    method: str
    path: str
    body: object = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_sampled: bool = False

    def names(self, estate: Estate) -> bool:
        """Whether it names something of an estate."""
        return estate.session_id in f"{self.path} {self.body} {(self.content or b'').decode('latin-1')}"


# What is called: (the caller's own estate, the estate that it is about).
Calls = Callable[[Estate, Estate], list[Call]]


def serve_text(gateway: Harness) -> None:
    """The gateway's pool has a tokenizer from now on."""
    real = replace(facts(), vocab_size=1280, tokenizer_dir=str(BUNDLED))
    gateway.pools = [PoolView(POOL, aliases=("/models/base",), facts=real, is_ready=True)]


async def new_estate(gateway: Harness, *, key: str = KEY, public: bool = False) -> Estate:
    """An estate that is there."""
    session_id = await gateway.new_session(key=key)
    estate = Estate(SessionId(session_id))
    headers = {"X-API-Key": key}
    project = {"project_id": estate.project}
    ok(await gateway.client.put(f"/api/v1/sessions/{session_id}/project", json=project, headers=headers))
    await gateway.store.projects.create(estate.shared_project, open_tenant(key), name="ours")
    assert await gateway.new_model(session_id, key=key) == estate.model_id
    assert await gateway.new_sampler(session_id, key=key) == estate.sampler_id
    ok(await gateway.post("optim_step", {"model_id": estate.model_id, "seq_id": 1}, key=key))
    ok(await gateway.post("asample", sample_body(estate.sampler_id), key=key))
    await gateway.finish(estate.sample_id, result_of("Hi", "Ho"), content_type=PROTOBUF)
    ok(await gateway.post("create_custom_loss", loss_body(session_id), key=key))
    for kind in CheckpointKind:
        record = await gateway.publish(estate.model_id, estate.name(kind), kind=kind, key=key, public=public)
        gateway.blobs.write(record.blob_key, pack_files({"adapter_config.json": b"{}"}))
    return estate


async def send(gateway: Harness, call: Call, *, key: str) -> httpx.Response:
    """The answer to a call with this key."""
    options: dict[str, Any] = {}
    if call.content is not None:
        options["content"] = call.content
    elif call.body is not None:
        options["json"] = call.body
    headers = {"X-API-Key": key, **call.headers}
    return await gateway.client.request(call.method, call.path, headers=headers, **options)


def _post(path: str, make: Callable[[Estate], object]) -> tuple[str, Calls]:
    """A call that is about one estate and nothing of the caller's."""
    return f"POST /api/v1/{path}", lambda mine, theirs: [Call("POST", f"/api/v1/{path}", make(theirs))]


def _on(method: str, template: str, make: Callable[[Estate], str], body: object = None) -> tuple[str, Calls]:
    """A call whose path says what it is about."""
    return f"{method} {template}", lambda mine, theirs: [Call(method, make(theirs), body)]


def _plain(method: str, path: str, body: object = None) -> tuple[str, Calls]:
    """A call that is about the caller, or nobody."""
    return f"{method} {path}", lambda mine, theirs: [Call(method, path, body)]


def _op(estate: Estate) -> dict[str, object]:
    return {"model_id": estate.model_id, "seq_id": estate.seq_id}


def _checkpoint(method: str, action: str, body: object = None) -> tuple[str, Calls]:
    return (
        f"{method} /api/v1/training_runs/{{model_id}}/checkpoints/{{kind}}/{{name}}{action}",
        lambda mine, theirs: [Call(method, theirs.url(kind) + action, body) for kind in CheckpointKind],
    )


def _pass(model: Estate, seq_id: int, loss: Estate | None = None) -> Call:
    message = pb.PassRequest()
    message.ParseFromString(encode_pass(pass_op(seq_id, model_id=model.model_id, datums=[datum(5)])))
    if loss is not None:
        message.loss_fn = "custom"
        message.loss_fn_settings["loss_id"].text = loss.loss_id
    content = message.SerializeToString()
    return Call("POST", "/api/v1/forward_backward", content=content, headers={"Content-Type": PROTOBUF})


def _passes(mine: Estate, theirs: Estate) -> list[Call]:
    as_json = json_pass(pass_op(theirs.seq_id + 1, model_id=theirs.model_id))
    return [
        _pass(theirs, theirs.seq_id),
        Call("POST", "/api/v1/forward_backward", as_json),
        _pass(mine, mine.seq_id, loss=theirs),
    ]


def _loads(mine: Estate, theirs: Estate) -> list[Call]:
    load = partial(Call, "POST", "/api/v1/load_weights")
    source = {"path": theirs.path(), "optimizer": True}
    return [
        load({"path": mine.path(), "optimizer": True, **_op(theirs)}),
        load({**source, **_op(replace(mine, seq_id=mine.seq_id + 1))}),
        load({"path": mine.path(), "optimizer": True, "session_id": theirs.session_id, "model_seq_id": theirs.seq_id}),
        load({**source, "session_id": mine.session_id, "model_seq_id": mine.seq_id + 1}),
    ]


def _samplers(mine: Estate, theirs: Estate) -> list[Call]:
    create = partial(Call, "POST", "/api/v1/create_sampling_session")
    own = {"session_id": mine.session_id, "sampling_session_seq_id": mine.seq_id}
    return [
        create({"session_id": theirs.session_id, "sampling_session_seq_id": theirs.seq_id, "base_model": POOL}),
        create({**own, "model_path": theirs.path()}),
        create({**own, "model_path": theirs.path(CheckpointKind.SAMPLER)}),
    ]


def _samples(mine: Estate, theirs: Estate) -> list[Call]:
    named = sample_body(mine.sampler_id, mine.seq_id, model_path=theirs.path())
    return [
        Call("POST", "/api/v1/asample", sample_body(theirs.sampler_id, theirs.seq_id)),
        Call("POST", "/api/v1/asample", named),
    ]


def _completions_of(mine: Estate, theirs: Estate) -> list[Call]:
    acknowledge = {"target": {"sampling_session_id": mine.sampler_id}, "timeout": 0}
    return [
        Call("POST", "/api/v1/retrieve_futures", {"target": {"sampling_session_id": theirs.sampler_id}}),
        Call("POST", "/api/v1/retrieve_futures", {**acknowledge, "retrieved_request_ids": [theirs.sample_id]}),
    ]


def _searches(mine: Estate, theirs: Estate) -> list[Call]:
    accessible = {"owner": {"type": "accessible"}}
    filters: list[dict[str, object]] = [
        {"session_id": theirs.session_id},
        {"project_ids": [theirs.project]},
        {"session_id": theirs.session_id, **accessible},
        {"project_ids": [theirs.shared_project], **accessible},
    ]
    return [Call("POST", "/api/v1/sessions/search", one) for one in filters]


def _copies(mine: Estate, theirs: Estate) -> list[Call]:
    copy = partial(Call, "POST", "/api/v1/copy_weights")
    return [
        copy({"source_path": theirs.path(), "destination_project_id": "p"}),
        copy({"source_path": theirs.path(CheckpointKind.EXTERNAL), "destination_project_id": "p"}),
        copy({"source_path": mine.path(), "session_id": theirs.session_id, "model_seq_id": theirs.seq_id}),
        copy({"source_path": mine.path(), "destination_project_id": theirs.shared_project}),
    ]


def _moves(mine: Estate, theirs: Estate) -> list[Call]:
    return [
        Call("PUT", f"/api/v1/sessions/{session_id}/project", {"project_id": project_id})
        for session_id, project_id in ((theirs.session_id, "stolen"), (mine.session_id, theirs.shared_project))
    ]


def _scoped(template: str, make: Callable[[Estate], str]) -> tuple[str, Calls]:
    """A GET of one's own, and of what one may read."""
    return f"GET {template}", lambda mine, theirs: [
        Call("GET", make(theirs)),
        Call("GET", make(theirs) + "?access_scope=accessible"),
    ]


def _project(method: str, member: str = "") -> tuple[str, Calls]:
    """A call about a shared project, or a member of it."""
    path, end = ("/members/{user_or_tenant}", f"/members/{member}") if member else ("", "")
    return _on(
        method, f"/api/v1/projects/{{project_id}}{path}", lambda their: f"/api/v1/projects/{their.shared_project}{end}"
    )


def _texts(prefix: str, path: str, body: dict[str, object], *, is_sampled: bool = True) -> tuple[str, Calls]:
    def calls(mine: Estate, theirs: Estate) -> list[Call]:
        url = f"{prefix}/{path}"
        base = Call("POST", url, {"model": POOL, **body}, is_sampled=is_sampled)
        named = [theirs.path(kind) for kind in (CheckpointKind.SAMPLER, CheckpointKind.TRAINING)]
        return [base, *(replace(base, body={"model": name, **body}) for name in named)]

    return f"POST {prefix}/{path}", calls


CHAT: dict[str, object] = {"messages": HELLO, "max_tokens": 2}
CALLS: dict[str, Calls] = dict(
    [
        ("POST /api/v1/forward_backward", _passes),
        _post(
            "forward",
            lambda their: json_pass(
                pass_op(their.seq_id, model_id=their.model_id, forward_only=True), field="forward_input"
            ),
        ),
        _post("optim_step", lambda their: {**_op(their), "adam_params": {}}),
        _post("save_weights", lambda their: {**_op(their), "path": "new"}),
        _post("save_weights_for_sampler", lambda their: {**_op(their), "sampling_session_seq_id": 50 + their.seq_id}),
        _post("save_weights_external", lambda their: {**_op(their), "path": "new-e"}),
        ("POST /api/v1/load_weights", _loads),
        _post(
            "create_model",
            lambda their: {
                "session_id": their.session_id,
                "model_seq_id": their.seq_id,
                "base_model": POOL,
                "lora_config": {"rank": 8},
            },
        ),
        _post("get_info", lambda their: {"model_id": their.model_id}),
        _post("unload_model", lambda their: {"model_id": their.model_id}),
        _post("create_custom_loss", lambda their: loss_body(their.session_id, their.seq_id)),
        _post("retrieve_future", lambda their: {"request_id": their.sample_id}),
        ("POST /api/v1/retrieve_futures", _completions_of),
        _post("cancel_future", lambda their: {"request_id": their.sample_id}),
        (
            "POST /api/v1/create_session",
            lambda mine, theirs: [
                Call("POST", "/api/v1/create_session", {"tags": ["a"], "sdk_version": "0.38.0"}),
                Call("POST", "/api/v1/create_session", {"project_id": theirs.shared_project}),
            ],
        ),
        _post("session_heartbeat", lambda their: {"session_id": their.session_id}),
        _on(
            "POST", "/api/v1/sessions/{session_id}/finish", lambda their: f"/api/v1/sessions/{their.session_id}/finish"
        ),
        _plain("GET", "/api/v1/sessions"),
        ("POST /api/v1/sessions/search", _searches),
        _scoped("/api/v1/sessions/{session_id}", lambda their: f"/api/v1/sessions/{their.session_id}"),
        ("PUT /api/v1/sessions/{session_id}/project", _moves),
        _on(
            "GET",
            "/api/v1/sessions/{session_id}/trace_export",
            lambda their: f"/api/v1/sessions/{their.session_id}/trace_export",
        ),
        # Whoever has the URL may read it, so there is nothing to own: see the tests of traces and downloads.
        _plain("GET", "/api/v1/traces/{token}"),
        _plain("GET", "/external/{token}/{name}"),
        ("POST /api/v1/create_sampling_session", _samplers),
        _post("join_sampling_session", lambda their: {"sampling_session_id": their.sampler_id}),
        _on("GET", "/api/v1/samplers/{sampling_session_id}", lambda their: f"/api/v1/samplers/{their.sampler_id}"),
        ("POST /api/v1/asample", _samples),
        _plain("POST", "/api/v1/client/config", {"sdk_version": "0.38.0"}),
        _plain("POST", "/api/v1/client/dynamic_config", {"sdk_version": "0.38.0"}),
        _plain("GET", "/api/v1/get_server_capabilities"),
        _plain("POST", "/api/v1/telemetry", {"events": []}),
        _plain("GET", "/api/v1/healthz"),
        _plain("GET", "/healthz"),
        _plain("GET", "/readyz"),
        _plain("GET", "/metrics"),
        _checkpoint("POST", "/publish"),
        _checkpoint("DELETE", "/publish"),
        _checkpoint("PUT", "/ttl", {"ttl_seconds": 3_600}),
        _checkpoint("GET", "/archive"),
        _checkpoint("DELETE", ""),
        (
            "GET /api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/external_weights_urls",
            lambda mine, theirs: [Call("GET", f"{theirs.url(CheckpointKind.EXTERNAL)}/external_weights_urls")],
        ),
        ("POST /api/v1/copy_weights", _copies),
        (
            "GET /api/v1/training_runs",
            lambda mine, theirs: [
                Call("GET", f"/api/v1/training_runs?access_scope={scope}&project_id={project}")
                for scope in ("owned", "accessible")
                for project in (theirs.project, theirs.shared_project)
            ],
        ),
        _scoped("/api/v1/training_runs/{model_id}", lambda their: f"/api/v1/training_runs/{their.model_id}"),
        _on(
            "GET",
            "/api/v1/training_runs/{model_id}/checkpoints",
            lambda their: f"/api/v1/training_runs/{their.model_id}/checkpoints",
        ),
        _plain("GET", "/api/v1/checkpoints"),
        (
            "POST /api/v1/weights_info",
            lambda mine, theirs: [
                Call("POST", "/api/v1/weights_info", {"tinker_path": theirs.path(kind)}) for kind in CheckpointKind
            ],
        ),
        _plain("POST", "/api/v1/projects", {"name": "ours"}),
        _plain("GET", "/api/v1/projects"),
        _project("GET"),
        _project("PUT", open_tenant(KEY)),
        _project("DELETE", "user:nobody"),
        _project("DELETE"),
        _plain("GET", "/admin/v1/projects"),
        *(
            _on(
                method,
                "/admin/v1/projects/{project_id}",
                lambda their: f"/admin/v1/projects/{their.shared_project}",
            )
            for method in ("GET", "DELETE")
        ),
        _plain("GET", "/api/v1/losses"),
        _plain("GET", "/admin/v1/keys"),
        _plain("POST", "/admin/v1/keys", {"user": "new", "name": "laptop", "expires_in_s": 60}),
        _on("GET", "/admin/v1/keys/{key_id}", lambda their: "/admin/v1/keys/1"),
        _on("PUT", "/admin/v1/keys/{key_id}", lambda their: "/admin/v1/keys/1", {"name": "desktop"}),
        _on("DELETE", "/admin/v1/keys/{key_id}", lambda their: "/admin/v1/keys/1"),
        _plain("GET", "/admin/v1/tenants"),
        _on("GET", "/admin/v1/tenants/{tenant_id}", lambda their: f"/admin/v1/tenants/{open_tenant()}"),
        _on(
            "PUT", "/admin/v1/tenants/{tenant_id}", lambda their: "/admin/v1/tenants/user:new", {"weight_class": "bulk"}
        ),
        _plain("GET", "/admin/v1/organizations"),
        _on(
            "PUT", "/admin/v1/organizations/{name}", lambda their: "/admin/v1/organizations/acme", {"description": "d"}
        ),
        _on("GET", "/admin/v1/organizations/{name}", lambda their: "/admin/v1/organizations/acme"),
        _on("DELETE", "/admin/v1/organizations/{name}", lambda their: "/admin/v1/organizations/acme"),
        _plain("GET", "/api/v1/quotas"),
        _plain("GET", "/admin/v1/quotas"),
        *(
            _on(method, "/admin/v1/quotas/{scope}", lambda their: "/admin/v1/quotas/tenant:user:new", body)
            for method, body in (("PUT", {"max_models": 3}), ("GET", None), ("DELETE", None))
        ),
        _on(
            "GET",
            "/admin/v1/tenants/{tenant_id}/quotas",
            lambda their: f"/admin/v1/tenants/{open_tenant()}/quotas",
        ),
        _plain("GET", "/admin/v1/audit"),
        _plain("GET", "/admin/v1/usage"),
        _plain("GET", "/admin/v1/usage.csv"),
        _plain("GET", "/admin/v1/queue"),
        _plain("GET", "/admin/v1/slots"),
        _plain("GET", "/admin/v1/checkpoints"),
        (
            "POST /admin/v1/checkpoints/unpublish",
            lambda mine, theirs: [Call("POST", "/admin/v1/checkpoints/unpublish", {"path": theirs.path()})],
        ),
        (
            "POST /admin/v1/checkpoints/delete",
            lambda mine, theirs: [Call("POST", "/admin/v1/checkpoints/delete", {"path": theirs.path()})],
        ),
        _plain("GET", "/admin/v1/pools"),
        _plain("POST", "/admin/v1/pools", {"pool": "new/model", "source": "org/model"}),
        _plain("POST", "/admin/v1/pools/scale", {"pool": "fake/other", "workers": 2, "samplers": 1}),
        *(
            _plain("POST", f"/admin/v1/pools/{verb}", {"pool": "fake/other", "reason": "a test"})
            for verb in ("pause", "resume", "drain", "remove")
        ),
        _plain("GET", "/admin/v1/runs"),
        _on("GET", "/admin/v1/runs/{model_id}", lambda their: f"/admin/v1/runs/{their.model_id}"),
        _on("POST", "/admin/v1/runs/{model_id}/snapshot", lambda their: f"/admin/v1/runs/{their.model_id}/snapshot"),
        _on("POST", "/admin/v1/runs/{model_id}/evict", lambda their: f"/admin/v1/runs/{their.model_id}/evict"),
        _on("GET", "/admin/v1/commands/{command_id}", lambda their: "/admin/v1/commands/1"),
        _plain("GET", "/admin/v1/losses"),
        _on(
            "PUT",
            "/admin/v1/losses/rules/{scope}/{loss}",
            lambda their: "/admin/v1/losses/rules/default/dro",
            {"bounds": {"beta": [0, 1]}},
        ),
        _on(
            "DELETE",
            "/admin/v1/losses/rules/{scope}/{loss}",
            lambda their: "/admin/v1/losses/rules/default/dro",
        ),
        _plain("GET", "/admin/v1/losses/operations"),
        _plain("PUT", "/admin/v1/losses/operations", {"disabled": ["torch.sort"]}),
        _plain("POST", "/api/v1/losses", {"name": "doubled", "content": "def loss(logprobs): ..."}),
        _on("GET", "/api/v1/losses/{name}", lambda their: "/api/v1/losses/doubled"),
        _on("DELETE", "/api/v1/losses/{name}", lambda their: "/api/v1/losses/doubled"),
        _plain("GET", "/admin/v1/losses/named"),
        _plain("POST", "/admin/v1/losses/named", {"name": "tripled", "content": "def loss(logprobs): ..."}),
        _on("GET", "/admin/v1/losses/named/{named_loss_id}", lambda their: "/admin/v1/losses/named/1"),
        _on("DELETE", "/admin/v1/losses/named/{named_loss_id}", lambda their: "/admin/v1/losses/named/1"),
        *(
            _on(
                "POST",
                f"/admin/v1/losses/named/{{named_loss_id}}/{verb}",
                lambda their, verb=verb: f"/admin/v1/losses/named/1/{verb}",  # type: ignore[misc]
                {"reason": "a test"} if verb in ("reject", "revoke") else {},
            )
            for verb in ("review", "approve", "reject", "revoke")
        ),
        _plain("POST", "/api/v1/auth/token"),
        _plain("GET", "/api/v1/auth/apikey/me"),
        _plain("DELETE", "/api/v1/auth/apikey/me"),
        _plain("GET", "/api/v1/audit"),
        (
            "GET /api/v1/billing/usage/events",
            lambda mine, theirs: [
                Call(
                    "GET",
                    "/api/v1/billing/usage/events?starting_on=1970-01-01T00:00:00Z&ending_before=1970-01-08T00:00:00Z",
                )
            ],
        ),
        _on(
            "GET",
            "/api/v1/billing/usage/checkpoints/current",
            lambda their: f"/api/v1/billing/usage/checkpoints/current?project_id={their.project}",
        ),
        *(
            entry
            for prefix in ("/oai/api/v1", "/v1")
            for entry in (
                _texts(prefix, "chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1}),
                _texts(prefix, "completions", {"prompt": "a", "max_tokens": 2, "logprobs": 1}),
                _plain("GET", f"{prefix}/models"),
                (
                    f"GET {prefix}/models/{{model:path}}",
                    lambda mine, theirs, prefix=prefix: [
                        Call("GET", f"{prefix}/models/{POOL}"),
                        Call("GET", f"{prefix}/models/{theirs.path(CheckpointKind.SAMPLER)}"),
                    ],
                ),
            )
        ),
        *(
            entry
            for prefix in ("/anthropic/api/v1", "/v1")
            for entry in (
                _texts(prefix, "messages", CHAT),
                _texts(prefix, "messages/count_tokens", {"messages": HELLO}, is_sampled=False),
            )
        ),
        _on("GET", "/api/v1/treadle/requests/{request_id}", lambda their: f"/api/v1/treadle/requests/{their.op_id}"),
        _on(
            "GET",
            "/api/v1/treadle/runs/{model_id}/timing",
            lambda their: f"/api/v1/treadle/runs/{their.model_id}/timing",
        ),
        (
            "GET /api/v1/tokenizers/{name:path}",
            lambda mine, theirs: [Call("GET", f"/api/v1/tokenizers/{name}") for name in (POOL, theirs.path())],
        ),
    ]
)
