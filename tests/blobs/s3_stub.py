"""As much of S3's protocol on a loopback port as the blob store uses: objects, conditions, uploads in parts, listings.

Signatures are not checked. What it has seen is in `seen`, for tests that ask how something was sent.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

TIME = "2026-01-02T03:04:05.000Z"
HTTP_TIME = "Fri, 02 Jan 2026 03:04:05 GMT"


class S3Stub:
    """A bucket called "bucket" in memory, served until the end of the `with`; gone while `is_there` is False."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.seen: list[str] = []
        self.is_there = True
        self.lock = threading.Lock()
        stub = self

        class Handler(_Handler):
            bucket = stub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> S3Stub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: S3Stub

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Quiet."""

    def _address(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix("/bucket").lstrip("/")
        return key, {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_PUT(self) -> None:
        (key, query), body = self._address(), self._body()
        with self.bucket.lock:
            if not self.bucket.is_there:
                self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
                return
            if "partNumber" in query:
                self.bucket.seen.append("part")
                self.bucket.uploads[query["uploadId"]][int(query["partNumber"])] = body
            elif self.headers.get("if-none-match") == "*" and key in self.bucket.objects:
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            else:
                self.bucket.seen.append("put")
                self.bucket.objects[key] = body
        self._answer(200, etag=f'"{hashlib.md5(body).hexdigest()}"')

    def do_POST(self) -> None:
        (key, query), body = self._address(), self._body()
        with self.bucket.lock:
            if "uploads" in query:
                upload_id = uuid.uuid4().hex
                self.bucket.uploads[upload_id] = {}
                xml = f"<InitiateMultipartUploadResult><UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
            elif "uploadId" in query:
                parts = self.bucket.uploads.pop(query["uploadId"])
                self.bucket.objects[key] = b"".join(parts[number] for number in sorted(parts))
                xml = '<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>'
            else:
                assert "delete" in query, self.path
                (gone,) = (item.split("</Key>")[0] for item in body.decode().split("<Key>")[1:])
                self.bucket.objects.pop(gone, None)
                xml = f"<DeleteResult><Deleted><Key>{gone}</Key></Deleted></DeleteResult>"
        self._answer(200, xml.encode(), content_type="application/xml")

    def do_DELETE(self) -> None:
        key, _ = self._address()
        with self.bucket.lock:
            self.bucket.objects.pop(key, None)
        self._answer(204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        key, query = self._address()
        with self.bucket.lock:
            if not self.bucket.is_there:
                self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            elif not key:
                self._answer(200, self._listing(query.get("prefix", "")), content_type="application/xml")
            elif key in self.bucket.objects:
                body = self.bucket.objects[key]
                self._answer_object(body)
            else:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _answer_object(self, body: bytes) -> None:
        facts = {"etag": '"x"', "last_modified": HTTP_TIME}
        asked = self.headers.get("range")
        if asked is None:
            self._answer(200, body, **facts)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        part = body[int(first) : int(last) + 1]
        where = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        self._answer(206, part, content_range=where, **facts)

    def _listing(self, prefix: str) -> bytes:
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{TIME}</LastModified><ETag>x</ETag>"
            f"<Size>{len(body)}</Size></Contents>"
            for key, body in sorted(self.bucket.objects.items())
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode()
