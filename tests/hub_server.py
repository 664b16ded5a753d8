"""A Hugging Face hub on loopback that records: as much of it as huggingface_hub asks for when files are uploaded."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

TOKEN = "hf_of_somebody"


class HubServer(ThreadingHTTPServer):
    """repositories: what was asked for when each was made. commits: message and files of each, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.repositories.setdefault(name, asked)
            return {"url": f"{self.url}/{name}", "name": name}
        name, kind = path.removeprefix("/api/models/").rsplit("/", 2)[:2]
        assert name in self.repositories, path
        if kind == "preupload":
            files = json.loads(body)["files"]
            return {"files": [file | {"uploadMode": "regular", "shouldIgnore": False} for file in files]}
        assert kind == "commit", path
        header, *lines = (json.loads(line)["value"] for line in body.splitlines())
        content = {line["path"]: base64.b64decode(line["content"]) for line in lines}
        self.commits.append((name, header["summary"], content))
        return {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say(401, {"error": "Invalid credentials in Authorization header"})
            return
        self._say(200, self.server.answer(self.path.partition("?")[0], body))

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub(token: str | None = TOKEN) -> Iterator[HubServer]:
    """A server that huggingface_hub talks to in this process, with a token or without."""
    from huggingface_hub import constants

    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_TOKEN": token or "", "HF_HUB_OFFLINE": "0"}
    try:
        with (
            mock.patch.object(constants, "ENDPOINT", server.url),
            mock.patch.object(constants, "HF_HUB_OFFLINE", False),
            mock.patch.object(constants, "HF_TOKEN_PATH", "/nowhere/token"),
            mock.patch.dict("os.environ", environment),
        ):
            yield server
    finally:
        server.shutdown()
        server.server_close()
