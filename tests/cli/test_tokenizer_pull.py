"""`treadle tokenizer pull`: what is written, and what is refused, whatever a server sends."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from treadle.cli.app import main
from treadle.cli.tokenizer import checked_target, unpack
from treadle.errors import InvalidRequest, ServerError


def tar_of(files: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if change is not None:
                change(info)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@contextmanager
def server(answer: bytes, seen: list[tuple[str, str | None]], status: int = 200) -> Iterator[str]:
    """A server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["X-API-Key"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the parent's name)
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def test_pull_writes_the_files_where_transformers_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-mine")
    seen: list[tuple[str, str | None]] = []
    with server(tar_of({"tokenizer.json": b"{}", "sub/x": b"y"}), seen) as url:
        main_ok(["tokenizer", "pull", f"{url}/", "treadle/tiny", "--out", str(tmp_path)])
    assert seen == [("/api/v1/tokenizers/treadle/tiny", "tml-mine")]
    assert (tmp_path / "treadle" / "tiny" / "tokenizer.json").read_bytes() == b"{}"
    assert (tmp_path / "treadle" / "tiny" / "sub" / "x").read_bytes() == b"y"
    assert [path.name for path in (tmp_path / "treadle").iterdir()] == ["tiny"]


@pytest.mark.parametrize(("status", "hint"), [(404, "no tokenizer"), (401, "does not accept"), (500, "answered 500")])
def test_a_refusal_is_explained_and_writes_nothing(
    tmp_path: Path, status: int, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(b"{}", [], status) as url, pytest.raises(SystemExit) as caught:
        main(["tokenizer", "pull", url, "treadle/tiny", "--out", str(tmp_path)])
    assert caught.value.code != 0
    assert hint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def as_link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


@pytest.mark.parametrize(
    "payload",
    [
        tar_of({"../evil": b"x"}),
        tar_of({"ok": b"x", "a/../../evil": b"x"}),
        tar_of({"link": b""}, as_link),
        b"not a tar at all",
        b"",
        tar_of({}),
    ],
)
def test_an_unsafe_or_broken_archive_is_refused_whole(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(ServerError):
        unpack(payload, tmp_path / "in" / "name")
    assert [path for path in tmp_path.rglob("*") if path.name != "in"] == []


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "/etc", "a//b", "a\\b", "."])
def test_a_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        checked_target(tmp_path, name)


def main_ok(args: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 0
