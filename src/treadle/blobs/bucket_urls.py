"""What the URL of a bucket says beside the bucket: where its service is, and which file has the credentials.

    s3://BUCKET/PREFIX?endpoint=http://minio:9000&region=us-east-1&credentials_file=/run/secrets/s3

The URL goes to every worker as it is, so all of them find the same bucket, and it is shown by `treadle config show`:
it refuses credentials themselves. Invariant: an option is honoured or refused, never dropped.
"""

from __future__ import annotations

import configparser
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypedDict
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from treadle.errors import ConfigError

_OPTIONS = ("endpoint", "region", "credentials_file")
_PROFILE = "default"
# The file is read again after so long: secrets that are mounted into a container change under it.
_CREDENTIALS_LIVE = timedelta(minutes=5)
_MAX_FILE_CHARS = 10_000


@dataclass(frozen=True, slots=True)
class BucketUrl:
    """A bucket's URL in its parts. `bare` has the scheme, the bucket and the prefix; None is the provider's default."""

    bare: str
    endpoint: str | None = None
    region: str | None = None
    credentials_file: Path | None = None


class Credential(TypedDict):
    """As obstore takes it. expires_at: when to ask again."""

    access_key_id: str
    secret_access_key: str
    token: str | None
    expires_at: datetime


def parse_bucket_url(url: str) -> BucketUrl:
    """The parts of s3://BUCKET/PREFIX?OPTIONS or gs://BUCKET/PREFIX. Raises ConfigError without secrets."""
    parts = urlsplit(url)
    bare = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown or (options and parts.scheme != "s3") or "@" in parts.netloc or parts.fragment:
        what = f"the option {unknown[0]!r}" if unknown else "what is in it"
        raise ConfigError(
            f"blobs cannot be kept at {bare.rpartition('@')[2]!r} with {what}: s3:// takes "
            f"{', '.join(_OPTIONS)}, gs:// nothing; credentials come from the environment or from a file"
        )
    for name, value in options.items():
        if not value:
            raise ConfigError(f"blobs cannot be kept at {bare!r}: its option {name} is empty")
    endpoint = options.get("endpoint")
    if endpoint is not None and not _is_http(endpoint):
        raise ConfigError(f"blobs cannot be kept at {bare!r}: endpoint is http://HOST:PORT or https://HOST:PORT")
    file = options.get("credentials_file")
    return BucketUrl(bare, endpoint, options.get("region"), None if file is None else Path(file))


def read_credentials(file: Path) -> Credential:
    """The credentials of the profile `default` in a file of the form that AWS's own tools read.

    Raises ConfigError, without a word of what is in it.
    """
    try:
        parser = configparser.ConfigParser(interpolation=None)
        with file.open(encoding="utf-8") as stream:
            parser.read_string(stream.read(_MAX_FILE_CHARS))
        profile = parser[_PROFILE]
        key_id, secret = profile["aws_access_key_id"], profile["aws_secret_access_key"]
    except OSError as error:
        raise ConfigError(f"credentials_file: {file} cannot be read: {error.strerror}") from None
    except (configparser.Error, KeyError, UnicodeDecodeError):
        raise ConfigError(
            f"credentials_file: {file} holds no credentials: a section [{_PROFILE}] with aws_access_key_id and "
            "aws_secret_access_key is wanted"
        ) from None
    return Credential(
        access_key_id=key_id,
        secret_access_key=secret,
        token=profile.get("aws_session_token"),
        expires_at=datetime.now(UTC) + _CREDENTIALS_LIVE,
    )


def _is_http(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
