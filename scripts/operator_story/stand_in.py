"""A ModelScope of the story's own: the two calls that treadle makes of it, over real HTTP on this machine.

It knows three people by their tokens: a member of the organisation, somebody who is none, and nobody.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ORGANIZATION = "twinkle-explorers"
MEMBER, OUTSIDER = "ms-story-0001-member", "ms-story-0002-outsider"
_NAMES = {MEMBER: "mei", OUTSIDER: "otto"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """The login: a token in the body, a user name in the answer."""
        sent = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        name = _NAMES.get(sent.get("AccessToken", ""))
        if name is None:
            self._answer(400, {"Code": 10010205001, "Message": "invalid token", "Success": False})
        else:
            self._answer(
                200, {"Code": 200, "Success": True, "Data": {"Username": name, "Email": f"{name}@example.org"}}
            )

    def do_GET(self) -> None:
        """Whether a user is a member of the organisation."""
        is_member = self.path.rstrip("/").endswith(f"/{_NAMES[MEMBER]}") and f"/{ORGANIZATION}/" in self.path
        self._answer(200, {"Code": 200, "Success": True, "Data": {"IsMember": is_member}})

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def modelscope() -> Iterator[str]:
    """The URL of one that answers until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
