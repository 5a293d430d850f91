# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on this machine, for HF_ENDPOINT: what huggingface_hub and datasets ask of one for a download, and
for a commit of small files."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGES = {"revision", "tree", "paths-info"}


class Hub(ThreadingHTTPServer):
    """Serves `directory`/models/ORG/NAME and `directory`/datasets/ORG/NAME.

    Attributes:
        asked: method and path of every request so far, without those that tell the Hub about the client.
        gated: repositories that it refuses with this status, or their files.
        delay_s: seconds that a weight file takes.
        silent: whether it leaves a request, by its method and path, without an answer.
    """

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.asked: list[str] = []
        self.gated: dict[str, int] = {}
        self.delay_s = 0.0
        self.silent: Callable[[str], bool] = lambda asked: False
        self.closed = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self, ending: str) -> list[str]:
        """The files of such names that were fetched, once for every time."""
        return [Path(line).name for line in self.asked if line.startswith("GET") and line.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[-1] != "agent-harnesses":
            self.server.asked.append(f"{self.command} {'/'.join(parts)}")
            if self.server.silent(self.server.asked[-1]):
                self.server.closed.wait()
        kind = "datasets" if "datasets" in parts[:2] else "models"
        parts = [part for part in parts if part not in ("api", "models", "datasets")]
        directory, rest = self.server.directory.joinpath(kind, *parts[:2]), parts[2:]
        if len(parts) < 2 or not directory.is_dir():
            self._answer(404, code="RepoNotFound")
        elif rest[1:2] not in ([], ["main"], [COMMIT]):
            self._answer(404, code="RevisionNotFound")
        elif rest[:1] == ["resolve"]:
            self._file(directory.joinpath(*rest[2:]), "/".join(parts[:2]))
        elif rest and rest[0] not in PAGES:
            self._answer(404)
        else:
            files = {str(f.relative_to(directory)): f for f in sorted(directory.rglob("*")) if f.is_file()}
            if rest[:1] == ["paths-info"]:
                asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
                files = {name: files[name] for name in asked if name in files}
            listed = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": _hash(f)} for n, f in files.items()]
            about = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self._answer(200, json.dumps(listed if rest and rest[0] != "revision" else about).encode())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        last = parts[-2] if parts[:2] == ["api", "models"] else parts[-1]
        if last not in ("create", "validate-yaml", "preupload", "commit"):
            return self.do_GET()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"POST {'/'.join(parts)}")
        if self.server.silent(self.server.asked[-1]):
            self.server.closed.wait()
        models = self.server.directory / "models"
        if last == "create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if status := self.server.gated.get(name):
                return self._answer(status)
            (models / name).mkdir(parents=True, exist_ok=True)
            self._answer(200, json.dumps({"url": f"{self.server.endpoint}/{name}"}).encode())
        elif last == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = models.joinpath(*parts[2:4], line["value"]["path"])
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.server.endpoint}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
            self._answer(200, json.dumps({"commitUrl": url, "commitOid": COMMIT, "success": True}).encode())
        else:
            files = [
                {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body).get("files", ())
            ]
            self._answer(200, json.dumps({"files": files, "errors": [], "warnings": []}).encode())

    def _file(self, file: Path, repository: str) -> None:
        if repository in self.server.gated:
            self._answer(self.server.gated[repository], code="GatedRepo")
        elif not file.is_file():
            self._answer(404, code="EntryNotFound")
        else:
            if self.command == "GET" and file.suffix == ".safetensors":
                time.sleep(self.server.delay_s)
            self._answer(200, file.read_bytes(), ETag=f'"{_hash(file)}"')

    def _answer(self, status: int, content: bytes = b"{}", code: str = "", **headers: str) -> None:
        self.send_response(status)
        headers |= {"X-Error-Code": code} if code else {}
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[Hub]:
    hub = Hub(directory)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


def client_environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """Of a process that takes `endpoint` for the Hub; the libraries read it when they are imported."""
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    return {**os.environ, **proxies, "HF_TOKEN": "", **own, **more}


def start(words: list[str], environment: dict[str, str], directory: Path | None = None) -> subprocess.Popen[str]:
    """Start `python WORDS`: a process of its own, and no fork of one that has imported the libraries."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words], env=environment, cwd=directory, stdout=pipe, stderr=pipe, text=True
    )
