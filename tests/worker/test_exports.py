"""Weights for use elsewhere on a real worker: a PEFT directory in one blob, encrypted before it is written."""

from __future__ import annotations

import json

import pyrage
import pytest
import safetensors.numpy
from worker_support import Driver, MemoryBlobs, create, datums, item, model_id, new_driver, passed, save, step

from treadle.domain.archive import list_members, pack_files
from treadle.domain.ops import SaveExternalOp
from treadle.domain.outcome import BlobResult
from treadle.domain.states import Category
from treadle.engine.files import export_peft
from treadle.errors import NotSupported
from treadle.worker import encryption
from treadle.worker.encryption import encrypted

RUN = model_id(0)
# A key made for this test alone.
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN test"


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
def driver(blobs: MemoryBlobs) -> Driver:
    driver = new_driver(blobs)
    driver.run_ops(create(RUN), passed(RUN, 1, datums(2, 9)), step(RUN, 2))
    return driver


def unpack(data: bytes) -> dict[str, bytes]:
    members = list_members(lambda start, stop: data[start:stop])
    return {one.name: data[one.offset : one.offset + one.num_bytes] for one in members}


def test_export_holds_the_weights_of_its_moment(driver: Driver, blobs: MemoryBlobs) -> None:
    exported, saved = driver.run_ops(SaveExternalOp(RUN, 3, name="e"), save(RUN, 4))
    driver.run_ops(passed(RUN, 5, datums(2, 9)), step(RUN, 6))
    assert isinstance(exported.result, BlobResult)
    assert isinstance(saved.result, BlobResult)
    data = blobs.blobs[exported.result.blob_key]
    assert exported.result.num_bytes == len(data)
    assert data == pack_files(export_peft(blobs.blobs[saved.result.blob_key]))
    assert json.loads(unpack(data)["adapter_config.json"])["base_model_name_or_path"] == "treadle/tiny"
    assert exported.tag_after is not None
    assert exported.tag_after.applied_seq == 3


def test_encrypted_files_are_readable_to_each_recipient_alone(driver: Driver, blobs: MemoryBlobs) -> None:
    first, second, stranger = (pyrage.x25519.Identity.generate() for _ in range(3))
    recipients = (str(first.to_public()), str(second.to_public()), SSH_KEY)
    ops = (SaveExternalOp(RUN, 3, name="e", recipients=recipients), SaveExternalOp(RUN, 4, name="plain"))
    cipher, plain = (unpack(blobs.blobs[outcome.result.blob_key]) for outcome in driver.run_ops(*ops))  # type: ignore[union-attr]
    assert cipher.keys() == {"adapter_config.json.age", "adapter_model.safetensors.age"}
    assert not any(b"lora_A" in data or b"peft_type" in data for data in cipher.values())
    for name, data in plain.items():
        for identity in (first, second):
            assert pyrage.decrypt(cipher[f"{name}.age"], [identity]) == data
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(cipher[f"{name}.age"], [stranger])
    assert safetensors.numpy.load(plain["adapter_model.safetensors"])


def test_a_bad_recipient_fails_the_op_and_writes_nothing(driver: Driver, blobs: MemoryBlobs) -> None:
    before = dict(blobs.blobs)
    op = SaveExternalOp(RUN, 3, name="e", recipients=("age1nothing",))
    (outcome,) = driver.run([item(op)]).outcomes
    assert outcome.failure is not None
    assert outcome.failure.category is Category.USER
    assert "age1nothing" in outcome.failure.message
    assert blobs.blobs == before
    driver.run_ops(passed(RUN, 4, datums(2, 9)), step(RUN, 5))


def test_without_the_library_encryption_is_refused_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(encryption, "import_module", missing)
    assert encrypted({"a": b"1"}, ()) == {"a": b"1"}
    with pytest.raises(NotSupported, match=r"treadle\[age\]"):
        encrypted({"a": b"1"}, (SSH_KEY,))
