"""A W&B server on loopback that records: as much of it as wandb asks for when a run is sent."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """posts: every history line that arrived, in order, also one that arrived again. lines: by run and offset, which is
    what W&B keeps. configs, summaries, exit_codes: of each run, as last heard; named: what a run was called, and its
    group. files: what was uploaded, by name. artifacts: the variables that created each; alerts: those of each alert.
    unknown: queries that nobody has answered."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.posts: list[dict[str, Any]] = []
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        self.summaries: dict[str, str] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.exit_codes: dict[str, int] = {}
        self.named: dict[str, tuple[str | None, str | None]] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """What has wandb talk to this server."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}", "WANDB_API_KEY": "0" * 40}

    def take(self, run: str, post: dict[str, Any]) -> None:
        """A post of the file stream."""
        with self.lock:
            if post.get("complete"):
                self.exit_codes[run] = post["exitcode"]
            for name, chunk in (post.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    found = [json.loads(line) for line in chunk["content"]]
                    self.posts += found
                    self.lines.setdefault(run, {}).update(enumerate(found, start=chunk["offset"]))
                elif name == "wandb-summary.json":
                    self.summaries[run] = chunk["content"][-1]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer; an empty one to what nobody needs."""
        project = {"id": "project", "name": variables.get("project"), "entity": {"id": "entity", "name": "somebody"}}
        name = str(variables.get("name"))
        if "upsertBucket" in query:
            if variables.get("config"):
                self.configs.setdefault(name, {}).update(json.loads(variables["config"]))
            if variables.get("displayName"):
                self.named[name] = (variables["displayName"], variables.get("groupName"))
            run = {"id": "run", "name": name, "displayName": variables.get("displayName"), "project": project}
            return {"upsertBucket": {"bucket": run, "inserted": name not in self.lines}}
        if "RunResumeStatus" in query:
            return {"model": project | {"bucket": self._resumed(name)}}
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": self._upload_url(file)} for file in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "viewer", "entity": "somebody", "username": "somebody", "flags": "{}"}}
        return self._answer_more(query, variables)

    def _answer_more(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Artifacts and alerts."""
        given = variables.get("input") or variables
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "createArtifactManifest(" in query:
            name = f"manifest-{len(self.artifacts)}.json"
            file = {"id": "file", "displayName": name, "uploadUrl": self._upload_url(name), "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}
        if "createArtifact(" in query:
            self.artifacts.append(given)
            artifact = {"id": "artifact", "state": "PENDING", "artifactSequence": {"id": "it", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "commitArtifact(" in query:
            return {"commitArtifact": {"artifact": {"id": "artifact", "digest": "digest"}}}
        if "notifyScriptableRunAlert(" in query:
            self.alerts.append(given)
            return {"notifyScriptableRunAlert": {"success": True}}
        self.unknown.append(query)
        return {}

    def _upload_url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/upload/{name}"

    def _resumed(self, name: str) -> dict[str, Any] | None:
        """What is known of a run, as the file stream has left it."""
        if name not in self.lines:
            return None
        lines = [line for _, line in sorted(self.lines[name].items())]
        return {
            "id": "run", "name": name, "displayName": "demo", "summaryMetrics": self.summaries.get(name, "{}"),
            "logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]), "eventsTail": "[]",
            "config": "{}", "tags": [], "notes": None, "wandbConfig": '{"t": {}}',
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionError):  # wandb leaves connections as they are
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            self._reply({"data": self.server.answer(request["query"], request.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            self.server.take(self.path.split("/")[-2], json.loads(body))
        self._reply({})

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/upload/")] = self._body()
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """The server, for as long as the test runs."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
