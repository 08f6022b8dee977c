"""What a client asks first: flags, capabilities, health. And what it tells us: telemetry, which is let go."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.limits import MAX_DATUMS_PER_REQUEST
from treadle.errors import Forbidden
from treadle.gateway.answers import json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of, is_local_client
from treadle.gateway.deps import PoolView
from treadle.gateway.routing import Resource
from treadle.gateway.sdk_versions import parsed_version
from treadle.telemetry.metrics import METRICS_CONTENT_TYPE
from treadle.wire.answers import ErrorAnswer, StatusAnswer
from treadle.wire.answers_service import CapabilitiesAnswer, ClientConfigAnswer, DynamicConfigAnswer, ReadyAnswer
from treadle.wire.bodies import ClientConfigBody, TelemetryBody, parse_body

router = Resource()

# The first SDK that can compress passes.
ZSTD_SINCE = (0, 22, 1)
# What the SDK takes when the flag is absent (0.38).
SDK_CHUNK_DATUMS = 1_024
DYNAMIC_REFRESH_S = 300


@router.post("/api/v1/client/config", body=ClientConfigBody, answer=ClientConfigAnswer)
async def client_config(request: Request) -> Response:
    """The flags of this server for one SDK version. The SDK keeps them for the life of its clients."""
    gateway = gateway_of(request)
    await gateway.caller(request)
    body = parse_body(ClientConfigBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    max_datums = min(SDK_CHUNK_DATUMS, gateway.settings.max_datums_per_request, MAX_DATUMS_PER_REQUEST)
    return json_response(
        {
            # Known since 0.18, which is the first that asks for flags.
            "pjwt_auth_enabled": gateway.settings.has_jwt,
            "parallel_fwdbwd_chunks": True,
            "proto_compress_fwdbwd": parsed_version(body.sdk_version) >= ZSTD_SINCE,
            # Only read by 0.19 to 0.24.1, whose bodies are JSON without it; and by 0.24, whose forward is one of them.
            "proto_write_fwdbwd": True,
            "fwd_via_fwdbwd": True,
            # Only read by 0.24.1 to 0.36: one request instead of three, and the adapter's shape is the checkpoint's.
            "create_model_via_load_weights": True,
            "fwdbwd_max_chunk_len": max_datums,
            "sample_use_retrieve_futures": True,
            "sample_join_sampling_session": True,
            "custom_loss_server_side": True,
        }
    )


@router.post("/api/v1/client/dynamic_config", body=ClientConfigBody, answer=DynamicConfigAnswer)
async def dynamic_config(request: Request) -> Response:
    """The flags that the SDK asks for again now and then."""
    gateway = gateway_of(request)
    await gateway.caller(request)
    await read_body(request, limit_bytes=MAX_JSON_BYTES)
    return json_response({"refresh_interval_sec": DYNAMIC_REFRESH_S, "sample_cancel_enabled": True})


@router.get("/api/v1/get_server_capabilities", answer=CapabilitiesAnswer)
async def get_server_capabilities(request: Request) -> Response:
    """Every base model under its name; for clients on this machine also under the directory that they can load a
    tokenizer from."""
    gateway = gateway_of(request)
    await gateway.caller(request)
    is_local = is_local_client(gateway, request)
    models = [
        _supported(pool, name)
        for pool in gateway.deps.pools.all()
        for name in (pool.name, *(pool.aliases if is_local else ()))
    ]
    return json_response({"supported_models": models})


@router.post("/api/v1/telemetry", body=TelemetryBody, answer=StatusAnswer)
async def telemetry(request: Request) -> Response:
    """Accepted at once and dropped: a client whose telemetry is refused waits 30 s before it raises its own errors."""
    gateway = gateway_of(request)
    await gateway.caller(request)
    await read_body(request, limit_bytes=gateway.settings.max_body_bytes)
    return json_response({"status": "accepted"})


@router.get("/healthz", answer=StatusAnswer, is_public=True)
@router.get("/api/v1/healthz", answer=StatusAnswer, is_public=True)
async def healthz(_: Request) -> Response:
    """The process is alive. It says nothing about models: see /readyz."""
    return json_response({"status": "ok"})


@router.get("/readyz", answer=ReadyAnswer, is_public=True)
async def readyz(request: Request) -> Response:
    """Whether new work would run now; 503 with the reasons when not."""
    readiness = await gateway_of(request).deps.readiness()
    if readiness.is_ready:
        return json_response({"status": "ready"})
    return json_response({"status": "not ready", "reasons": readiness.reasons}, status=503)


@router.get("/metrics", answer_type="text/plain", others={403: ErrorAnswer})
async def metrics(request: Request) -> Response:
    """Prometheus text, for admin keys (send one as a bearer token). Clients on the machine of a loopback server need
    none, unless a proxy is in between."""
    gateway = gateway_of(request)
    if not is_local_client(gateway, request) and not (await gateway.caller(request)).is_admin:
        raise Forbidden("metrics need an admin key: create one with `treadle keys create USER --admin`")
    return Response(gateway.deps.metrics.render(), headers={"content-type": METRICS_CONTENT_TYPE})


def _supported(pool: PoolView, name: str) -> dict[str, object]:
    body: dict[str, object] = {"model_name": name, "trainable": True, "sampleable": True}
    if pool.facts is not None:
        body["max_context_length"] = pool.facts.max_context_length
    return body
