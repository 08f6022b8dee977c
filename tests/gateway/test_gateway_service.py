"""Flags, capabilities, health, metrics, tokenizers, and what is not there."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from gateway_support import KEY, MAX_CONTEXT, OTHER_POOL, POOL, Harness, facts, ok, refused
from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.keys import key_digest
from treadle.gateway import GatewaySettings, Readiness


async def test_flags_turn_on_what_this_server_does(gateway: Harness) -> None:
    flags = ok(await gateway.post("client/config", {"sdk_version": "0.38.0"}))

    assert flags["sample_use_retrieve_futures"] is True
    assert flags["sample_join_sampling_session"] is True
    assert flags["parallel_fwdbwd_chunks"] is True
    assert flags["custom_loss_server_side"] is True
    assert flags["pjwt_auth_enabled"] is True


@pytest.mark.parametrize(
    ("sdk_version", "expected"),
    [("0.38.0", True), ("0.22.1", True), ("0.22.0", False), ("0.9", False), ("", False), ("1.0.dev", False)],
)
async def test_compression_is_for_sdks_that_know_it(gateway: Harness, sdk_version: str, expected: bool) -> None:
    flags = ok(await gateway.post("client/config", {"sdk_version": sdk_version}))

    assert flags["proto_compress_fwdbwd"] is expected


async def test_chunks_fit_the_limit_of_the_server(gateway: Harness) -> None:
    assert ok(await gateway.post("client/config"))["fwdbwd_max_chunk_len"] == 1024


async def test_dynamic_config_says_that_samples_can_be_cancelled(gateway: Harness) -> None:
    assert ok(await gateway.post("client/dynamic_config"))["sample_cancel_enabled"] is True


async def test_capabilities_list_names_and_local_directories(gateway: Harness) -> None:
    models = ok(await gateway.get("get_server_capabilities"))["supported_models"]

    assert [model["model_name"] for model in models] == [POOL, "/models/base", OTHER_POOL]
    assert all(model["max_context_length"] == MAX_CONTEXT for model in models)
    assert all(model["trainable"] and model["sampleable"] for model in models)


async def test_capabilities_of_a_loading_pool_have_no_context_length(gateway: Harness) -> None:
    gateway.pools[:] = [replace(gateway.pools[0], facts=None, is_ready=False, reason="loading")]

    assert "max_context_length" not in ok(await gateway.get("get_server_capabilities"))["supported_models"][0]


async def test_health_needs_no_key(gateway: Harness) -> None:
    assert ok(await gateway.client.get("/api/v1/healthz")) == {"status": "ok"}


async def test_readiness_gives_the_reasons_when_not(gateway: Harness) -> None:
    assert ok(await gateway.client.get("/readyz")) == {"status": "ready"}

    gateway.readiness = Readiness(is_ready=False, reasons=("pool fake/base is loading",))
    answer = await gateway.client.get("/readyz")

    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["pool fake/base is loading"]


async def test_telemetry_of_any_shape_is_accepted(gateway: Harness) -> None:
    assert ok(await gateway.post("telemetry", {"events": [{"event": "X"}], "platform": 3})) == {"status": "accepted"}
    assert ok(await gateway.post("telemetry", content=b"not json")) == {"status": "accepted"}


@pytest.mark.parametrize(("method", "path"), [("POST", "no/such"), ("GET", "billing/usage/forecast"), ("DELETE", "x")])
async def test_an_endpoint_that_is_not_there_says_so(gateway: Harness, method: str, path: str) -> None:
    answer = await gateway.client.request(method, f"/api/v1/{path}", headers={"X-API-Key": KEY})

    assert f"{method} /api/v1/{path} is not an endpoint" in refused(answer, 404)


async def test_a_wrong_method_is_json_too(gateway: Harness) -> None:
    assert "does not take GET" in refused(await gateway.get("asample"), 405)


async def test_metrics_count_route_templates_and_never_ids(gateway: Harness) -> None:
    await gateway.get("training_runs/secret-id")
    await gateway.get("no-such-thing/secret-id")
    text = (await gateway.client.get("/metrics")).text

    assert 'treadle_http_requests_total{route="/api/v1/training_runs/{model_id}",status="404"} 1.0' in text
    assert 'route="unmatched",status="404"' in text
    assert "secret-id" not in text


async def test_an_unexpected_error_shows_an_id_and_nothing_else(
    gateway: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: Request) -> Response:
        raise RuntimeError("secret /etc/path")

    gateway.app.add_route("/api/v1/broken", broken)
    answer = await gateway.get("broken")

    assert answer.status_code == 500
    assert set(answer.json()) == {"detail", "category", "error_id"}
    assert "secret" not in answer.text
    [record] = [record for record in caplog.records if record.exc_info]
    assert answer.json()["error_id"] == record.__dict__["treadle_fields"]["error_id"]


async def test_tokenizer_files_come_as_a_plain_tar(gateway: Harness, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("tokenizer.json", "config.json", "model.safetensors", ".secret"):
        (directory / name).write_text(name)
    gateway.pools[0] = replace(gateway.pools[0], facts=facts(directory=directory))

    answer = await gateway.get(f"tokenizers/{POOL}")

    with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:") as tar:
        assert tar.getnames() == ["config.json", "tokenizer.json"]
        member = tar.extractfile("tokenizer.json")
        assert member is not None
        assert member.read() == b"tokenizer.json"


async def test_tokenizers_need_a_key_and_a_known_model(gateway: Harness) -> None:
    refused(await gateway.client.get(f"/api/v1/tokenizers/{POOL}"), 401)
    assert "served: fake/base, fake/other" in refused(await gateway.get("tokenizers/no/such"), 404)
    assert "no tokenizer" in refused(await gateway.get(f"tokenizers/{POOL}"), 404)


class TestOnANetworkAddress:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=False, hold_s=0.1)

    async def test_metrics_need_an_admin_key(self, gateway: Harness) -> None:
        await gateway.store.keys.add("root", key_digest("tml-admin"), True)
        await gateway.store.keys.add("joe", key_digest("tml-joe"), False)

        async def metrics(key: str) -> httpx.Response:
            return await gateway.client.get("/metrics", headers={"Authorization": f"Bearer {key}"})

        refused(await gateway.client.get("/metrics"), 401)
        refused(await metrics("tml-joe"), 403)
        assert "treadle_http_requests_total" in (await metrics("tml-admin")).text

    async def test_directories_of_the_server_are_not_shown(self, gateway: Harness) -> None:
        await gateway.store.keys.add("joe", key_digest(KEY), False)
        models = ok(await gateway.get("get_server_capabilities"))["supported_models"]

        assert [model["model_name"] for model in models] == [POOL, OTHER_POOL]
