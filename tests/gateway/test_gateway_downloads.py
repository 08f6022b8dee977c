"""External weights and archives: saved, signed, served, and refused when the URL is not what was given out."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from datetime import UTC, datetime

import httpx
import numpy as np
import orjson
import pyrage
import pytest
import safetensors.numpy
from gateway_support import KEY, OTHER_KEY, Harness, failed, ok, open_tenant, refused

from treadle.domain.archive import pack_files
from treadle.domain.ids import BlobKey, CheckpointKind, parse_tinker_path
from treadle.domain.limits import DOWNLOAD_CHUNK_BYTES, SIGNED_URL_LIFE_S
from treadle.domain.ops import SaveExternalOp
from treadle.domain.records import CheckpointRecord, FinishedCycle
from treadle.gateway import GatewaySettings, create_app

# Longer than a chunk, and no multiple of one.
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 6_000 + b"end"}
RECIPIENT = str(pyrage.x25519.Identity.generate().to_public())


@pytest.fixture
async def model_id(gateway: Harness) -> str:
    return await gateway.new_model(await gateway.new_session())


async def exported(gateway: Harness, model_id: str, name: str = "e", *, public: bool = False) -> CheckpointRecord:
    record = await gateway.publish(model_id, name, kind=CheckpointKind.EXTERNAL, public=public)
    gateway.blobs.write(record.blob_key, pack_files(FILES))
    return record


def urls_path(record: CheckpointRecord) -> str:
    return f"training_runs/{record.model_id}/checkpoints/external_weights/{record.name}/external_weights_urls"


async def urls_of(gateway: Harness, record: CheckpointRecord, *, key: str = KEY) -> dict[str, str]:
    urls = ok(await gateway.get(urls_path(record), key=key))["urls"]
    assert isinstance(urls, dict)
    return urls


async def redirect(gateway: Harness, record: CheckpointRecord) -> httpx.Response:
    path = f"training_runs/{record.model_id}/checkpoints/{record.kind.value}/{record.name}/archive"
    answer = await gateway.get(path, follow_redirects=False)
    assert answer.status_code == 302, answer.text
    assert answer.json()["url"] == answer.headers["location"]
    return answer


async def archive_url(gateway: Harness, record: CheckpointRecord) -> str:
    return (await redirect(gateway, record)).headers["location"]


def forbidden(answer: httpx.Response) -> bytes:
    """The body of an answer that says no, and nothing else."""
    refused(answer, 403)
    return answer.content


async def test_each_file_is_served_without_a_key(gateway: Harness, model_id: str) -> None:
    assert len(FILES["adapter_model.safetensors"]) > DOWNLOAD_CHUNK_BYTES
    record = await exported(gateway, model_id)
    body = ok(await gateway.get(urls_path(record)))
    assert body["urls"].keys() == FILES.keys()
    assert datetime.fromisoformat(body["expires"]).timestamp() == int(gateway.clock.now() + SIGNED_URL_LIFE_S)
    assert datetime.fromisoformat(body["expires"]).tzinfo is not None
    for name, url in body["urls"].items():
        assert url.startswith("http://gateway/external/")
        answer = await gateway.client.get(url)
        assert (answer.status_code, answer.content) == (200, FILES[name])
        assert answer.headers["content-length"] == str(len(FILES[name]))
        head = await gateway.client.head(url)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(FILES[name]))


async def test_urls_end_with_their_checkpoint(gateway: Harness, model_id: str) -> None:
    record = await exported(gateway, model_id)
    await gateway.store.checkpoints.set_expiry(
        parse_tinker_path(record.tinker_path), open_tenant(), expires_at=gateway.clock.now() + 100.0
    )
    body = ok(await gateway.get(urls_path(record)))
    assert datetime.fromisoformat(body["expires"]) == datetime.fromtimestamp(int(gateway.clock.now() + 100), tz=UTC)


async def test_whatever_is_wrong_with_a_url_is_answered_alike(gateway: Harness, model_id: str) -> None:
    record = await exported(gateway, model_id)
    urls = await urls_of(gateway, record)
    config, weights = urls["adapter_config.json"], urls["adapter_model.safetensors"]
    archive = await archive_url(gateway, record)
    token = config.split("/")[-2]
    turned = token[:-3] + ("AAA" if token[-3:] != "AAA" else "BBB")
    wrong = [
        config.replace(token, turned),
        config.replace(token, weights.split("/")[-2]),
        config.replace(token, archive.split("/")[-2]),
        archive.replace(archive.split("/")[-2], token),
        config.replace("adapter_config.json", "adapter_model.safetensors"),
        config.replace("adapter_config.json", ".."),
        "http://gateway/external/x/adapter_config.json",
        f"http://gateway/external/{'x' * 10_000}/adapter_config.json",
    ]
    words = {forbidden(await gateway.client.get(url)) for url in wrong if not url.endswith("/..")}
    assert (await gateway.client.get(wrong[5])).status_code in (403, 404)
    gateway.clock.advance(SIGNED_URL_LIFE_S + 1.0)
    words.add(forbidden(await gateway.client.get(config)))
    fresh = (await urls_of(gateway, record))["adapter_config.json"]
    path = parse_tinker_path(record.tinker_path)
    assert await gateway.store.checkpoints.delete_own(path, open_tenant())
    words.add(forbidden(await gateway.client.get(fresh)))
    gateway.blobs.write("checkpoints/other", pack_files(FILES))
    retaken = replace(record, blob_key=BlobKey("checkpoints/other"))
    await gateway.store.cycles.finish(await gateway.lease(), FinishedCycle(checkpoints=(retaken,)))
    words.add(forbidden(await gateway.client.get(fresh)))
    assert len(words) == 1, "nobody learns what was wrong"


async def test_urls_are_for_readers_only(gateway: Harness, model_id: str) -> None:
    record = await exported(gateway, model_id)
    refused(await gateway.get(urls_path(record), key=OTHER_KEY), 404)
    public = await exported(gateway, model_id, "p", public=True)
    url = (await urls_of(gateway, public, key=OTHER_KEY))["adapter_config.json"]
    assert (await gateway.client.get(url)).content == b"{}"
    weights = await gateway.publish(model_id, "w")
    path = f"training_runs/{model_id}/checkpoints/weights/{weights.name}/external_weights_urls"
    assert "external_weights" in refused(await gateway.get(path), 400)


async def test_a_damaged_archive_is_refused_before_a_url_is_given_out(gateway: Harness, model_id: str) -> None:
    record = await gateway.publish(model_id, "e", kind=CheckpointKind.EXTERNAL)
    gateway.blobs.write(record.blob_key, b"not a tar" * 100)
    assert "damaged" in refused(await gateway.get(urls_path(record)), 400)


class TestBehindAPrefix:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=True, hold_s=0.1, root_path="/twinkle")

    async def test_urls_keep_the_prefix(self, gateway: Harness) -> None:
        gateway.client.base_url = httpx.URL("http://gateway/twinkle/")
        model_id = await gateway.new_model(await gateway.new_session())
        record = await exported(gateway, model_id)
        url = (await urls_of(gateway, record))["adapter_config.json"]
        assert url.startswith("http://gateway/twinkle/external/")
        assert (await gateway.client.get(url)).content == b"{}"


class TestBehindAProxy:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=True, hold_s=0.1, public_url="https://train.example.org/twinkle/")

    async def test_urls_are_those_of_the_outside(self, gateway: Harness, model_id: str) -> None:
        record = await exported(gateway, model_id)
        url = (await urls_of(gateway, record))["adapter_config.json"]
        assert url.startswith("https://train.example.org/twinkle/external/")
        inside = url.replace("https://train.example.org/twinkle", "http://gateway")
        assert (await gateway.client.get(inside)).content == b"{}"


async def test_an_archive_is_a_tar_of_the_peft_directory(gateway: Harness, model_id: str) -> None:
    record = await exported(gateway, model_id)
    answer = await gateway.client.get(await archive_url(gateway, record))
    assert answer.headers["content-type"] == "application/gzip"
    with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:gz") as tar:
        assert tar.getnames() == [*FILES, "checkpoint_complete"]
        for name, data in FILES.items():
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == data


@pytest.mark.parametrize("kind", [CheckpointKind.TRAINING, CheckpointKind.SAMPLER])
async def test_an_archive_of_any_weights_leaves_the_optimizer_behind(
    gateway: Harness, model_id: str, kind: CheckpointKind
) -> None:
    record = await gateway.publish(model_id, "w", kind=kind)
    adapter = np.arange(12, dtype=np.float32).reshape(3, 4)
    header = orjson.dumps({"adapter_config": {"r": 8}}).decode()
    tensors = {"base_model.model.q.lora_A.weight": adapter, "treadle.exp_avg": np.ones(12, np.float32)}
    gateway.blobs.write(record.blob_key, safetensors.numpy.save(tensors, {"treadle": header}))
    answer = await gateway.client.get(await archive_url(gateway, record))
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        weights, config = tar.extractfile("adapter_model.safetensors"), tar.extractfile("adapter_config.json")
        assert weights is not None
        assert config is not None
        assert orjson.loads(config.read()) == {"r": 8}
        found = safetensors.numpy.load(weights.read())
    assert found.keys() == {"base_model.model.q.lora_A.weight"}
    np.testing.assert_array_equal(found["base_model.model.q.lora_A.weight"], adapter)


async def test_old_sdks_are_redirected_to_the_archive(gateway: Harness, model_id: str) -> None:
    answer = await redirect(gateway, await exported(gateway, model_id))
    expires = datetime.strptime(answer.headers["expires"], "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
    assert expires.timestamp() == int(gateway.clock.now() + SIGNED_URL_LIFE_S)
    assert (await gateway.client.get(answer.headers["location"])).status_code == 200


async def test_what_holds_no_adapter_has_no_archive(gateway: Harness, model_id: str) -> None:
    record = await gateway.publish(model_id, "w")
    path = f"training_runs/{model_id}/checkpoints/weights/w/archive"
    gateway.blobs.write(record.blob_key, b"\xff" * 64)
    assert "no adapter" in refused(await gateway.get(path), 400)
    refused(await gateway.get(path, key=OTHER_KEY), 404)


def external_body(model_id: str, seq_id: int = 1, **changes: object) -> dict[str, object]:
    return {"model_id": model_id, "seq_id": seq_id, "path": "final", "type": "save_weights_external", **changes}


async def test_an_export_is_an_op_of_its_run(gateway: Harness, model_id: str) -> None:
    body = external_body(model_id, ttl_seconds=3600, age_encryption_recipients=[RECIPIENT])
    answer = ok(await gateway.post("save_weights_external", body))
    assert answer == {"request_id": f"{model_id}:1", "model_id": model_id}
    assert await gateway.op(answer["request_id"]) == SaveExternalOp(
        model_id, 1, name="final", ttl_s=3600, recipients=(RECIPIENT,)
    )
    assert ok(await gateway.post("save_weights_external", body)) == answer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": None}, "path"),
        ({"path": "../x"}, "not allowed"),
        ({"path": "a\0b"}, "NUL"),
        ({"path": "x" * 10_000}, "path"),
        ({"path": "é"}, "not allowed"),
        ({"ttl_seconds": 60}, "ttl_seconds"),
        ({"age_encryption_recipients": []}, "age_encryption_recipients"),
        ({"age_encryption_recipients": [RECIPIENT] * 11}, "age_encryption_recipients"),
        ({"age_encryption_recipients": [RECIPIENT, "age1nothing"]}, "'age1nothing'"),
        ({"age_encryption_recipients": ["ssh-rsa AAAA"]}, "SSH"),
        ({"age_encryption_recipients": ["-o/etc/passwd"]}, "neither"),
    ],
)
async def test_a_bad_export_fails_in_its_future(
    gateway: Harness, model_id: str, changes: dict[str, object], words: str
) -> None:
    answer = ok(await gateway.post("save_weights_external", external_body(model_id, **changes)))
    assert words in failed(await gateway.future(answer["request_id"]))


async def test_the_secret_is_one_for_all_gateways(gateway: Harness, model_id: str) -> None:
    record = await exported(gateway, model_id)
    url = (await urls_of(gateway, record))["adapter_config.json"]
    other = create_app(gateway.deps())
    async with (
        other.router.lifespan_context(other),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=other)) as client,
    ):
        assert (await client.get(url)).content == b"{}"
