"""Options in a bucket's URL are honoured or refused, and credentials come from a file that is read again."""

from __future__ import annotations

from pathlib import Path

import pytest
from s3_stub import S3Stub

from treadle.blobs import open_blobs
from treadle.blobs.bucket_urls import parse_bucket_url, read_credentials
from treadle.errors import ConfigError

CREDENTIALS = "[default]\naws_access_key_id = key\naws_secret_access_key = se%cret\n"


def test_everything_but_credentials_is_in_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "s3"
    file.write_text(CREDENTIALS)
    with S3Stub() as bucket:
        blobs = open_blobs(f"s3://bucket/some/prefix?endpoint={bucket.url}&region=anywhere&credentials_file={file}")
        blobs.write("a/b", b"bytes")
        assert bucket.objects == {"some/prefix/a/b": b"bytes"}
        assert blobs.read("a/b") == b"bytes"


def test_changed_file_is_what_the_next_look_finds(tmp_path: Path) -> None:
    file = tmp_path / "s3"
    file.write_text(CREDENTIALS)
    assert read_credentials(file)["secret_access_key"] == "se%cret"
    file.write_text(CREDENTIALS.replace("se%cret", "other") + "aws_session_token = token\n")
    again = read_credentials(file)
    assert (again["access_key_id"], again["secret_access_key"], again["token"]) == ("key", "other", "token")


@pytest.mark.parametrize(
    "options",
    [
        "access_key_id=AKIA",
        "secret_access_key=hidden-word",
        "endpoint=",
        "endpoint=minio:9000",
        "endpoint=http://user:hidden-word@minio:9000",
        "endpiont=http://minio:9000",
    ],
)
def test_option_that_would_be_dropped_or_shown_is_refused(options: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bucket_url(f"s3://bucket/prefix?{options}")
    assert "hidden-word" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_google_takes_no_options_and_a_bucket_no_user() -> None:
    with pytest.raises(ConfigError, match="gs:// nothing"):
        parse_bucket_url("gs://bucket/prefix?endpoint=http://minio:9000")
    with pytest.raises(ConfigError) as caught:
        parse_bucket_url("s3://user:hidden-word@bucket/prefix")
    assert "hidden-word" not in str(caught.value)
    assert parse_bucket_url("gs://bucket/prefix").bare == "gs://bucket/prefix"


@pytest.mark.parametrize("text", ["", "[default]\naws_access_key_id = hidden-word\n", "hidden-word", "[other]\n"])
def test_file_without_credentials_is_refused_without_its_content(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s3"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"holds no credentials: a section \[default\]") as caught:
        open_blobs(f"s3://bucket/prefix?credentials_file={file}")
    assert "hidden-word" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        open_blobs(f"s3://bucket/prefix?credentials_file={file}.missing")
