# SPDX-License-Identifier: Apache-2.0
"""The endpoint engine against a server that speaks the OpenAI protocol, dies and comes back."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specdist.core import team
from specdist.core.errors import ConfigError, DiskError, WorldError
from specdist.generate import endpoint
from specdist.generate.config import GenerateConfig
from specdist.generate.endpoint import EndpointEngine
from specdist.generate.engine import GREEDY, Reply, Request, Sampling
from specdist.generate.in_world import Assignment, answers_in_world
from specdist.prompts.config import PromptsConfig
from specdist.run.status import describe, overview
from specdist.target.config import TargetConfig
from tests.unit import prompts_tokenizers as t


class Server:
    """Answers `text` to whatever is asked, or fails as `fail(number of the request)` says: a status; None hangs up."""

    def __init__(self, served: str = "models/Tiny-1B", text: str = "well", port: int = 0) -> None:
        self.served, self.text = served, text
        self.asked = list[dict[str, Any]]()
        self.keys = set[str | None]()
        self.fail: Callable[[int], int | None] = lambda number: 200
        self.extra: dict[str, Any] = {}
        self.instead: dict[str, str] = {}
        """Of a page, by the last part of its address, what is given instead."""
        self.listed: Callable[[], int] = lambda: 200
        """The status of the list of models."""
        self.headers: dict[str, str] = {}
        self._lock = threading.Lock()
        self.start(port)

    def start(self, port: int) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                model = {"id": server.served, "object": "model", "created": 0, "owned_by": "x"}
                self.send(server.listed(), {"object": "list", "data": [model]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.keys.add(self.headers["Authorization"])
                    server.asked.append(asked)
                    status = server.fail(len(server.asked) - 1)
                if status is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif status != 200:
                    self.send(status, {"error": {"message": f"status {status}"}})
                else:
                    choice = {
                        "index": 0,
                        "text": server.text,
                        "finish_reason": "stop",
                        "logprobs": None,
                        **server.extra,
                    }
                    self.send(
                        200, {"id": "1", "object": "text_completion", "created": 0, "model": "x", "choices": [choice]}
                    )

            def send(self, status: int, body: dict[str, Any]) -> None:
                instead = server.instead.get(self.path.rpartition("/")[2])
                data = (instead or json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.stop()


def config(server: Server, **settings) -> GenerateConfig:
    return GenerateConfig(endpoint=f"http://127.0.0.1:{server.port}", concurrency=4, timeout_s=20, **settings)


def ask(config: GenerateConfig, *requests: Request, target: str = "/somewhere/tiny-1b") -> list[Reply]:
    async def run() -> list[Reply]:
        engine = EndpointEngine(config, target, troubles.append)
        try:
            await engine.open()
            return await asyncio.gather(*map(engine.write, requests))
        finally:
            await engine.close()

    troubles: list[str] = []
    return asyncio.run(run())


ONE = Request([1, 2, 3], 9, Sampling(None), 5)


def test_what_is_asked_and_what_comes_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(config(server), ONE) == [Reply("stop", text="well")]
    (asked,) = server.asked
    sent = {"prompt": [1, 2, 3], "max_tokens": 9, "seed": 5, "model": "models/Tiny-1B", "skip_special_tokens": False}
    assert sent.items() <= asked.items()
    assert asked.keys().isdisjoint({"temperature", "top_p", "top_k"})  # the server's own
    server.extra = {"token_ids": [7, 8], "stop_reason": 8, "finish_reason": "length"}
    monkeypatch.setenv("MY_KEY", "secret")
    assert ask(config(server, api_key_env="MY_KEY"), replace(ONE, sampling=GREEDY)) == [
        Reply("length", [7, 8], "well", 8)
    ]
    assert (server.asked[1]["temperature"], server.asked[1]["repetition_penalty"]) == (0.0, 1.0)
    assert server.keys == {"Bearer none", "Bearer secret"}


def test_another_model_and_no_server_are_one_clear_line(server: Server) -> None:
    with pytest.raises(
        ConfigError, match=r"127.0.0.1:\d+ serves 'models/Tiny-1B', and answers are wanted of m/Other: start"
    ):
        ask(config(server), ONE, target="m/Other")
    assert ask(config(server, model="models/Tiny-1B"), ONE, target="m/Other")[0].text == "well"
    assert ask(config(server), ONE, target="/c/models--Org--Tiny-1B/snapshots/0f3a")[0].text == "well"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = replace(config(server), endpoint=f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(ConfigError, match=r"is not reached: Connection error.*is the server running there\?"):
        ask(nobody, ONE)
    server.fail = lambda number: 401
    with pytest.raises(ConfigError, match=r"refuses: .*status 401.*the environment variable OPENAI_API_KEY"):
        ask(config(server), ONE)


def test_what_a_server_refuses_is_asked_no_more_and_what_it_drops_is(server: Server) -> None:
    server.fail = lambda number: {0: 400, 1: None, 2: 503, 3: 429}.get(number, 200)
    assert [reply.finish_reason for reply in ask(config(server), ONE)] == ["error"]
    assert [reply.text for reply in ask(config(server), ONE)] == ["well"]
    assert len(server.asked) == 5
    server.fail = lambda number: 500 if number < 10 else 200
    (reply,) = ask(config(server), ONE)
    assert (reply.finish_reason, len(server.asked)) == ("error", 11)
    assert (server.asked[-1]["prompt"], server.asked[-1]["max_tokens"]) == ([1], 1)
    assert "status 500" in reply.text
    server.fail = lambda number: {11: 408, 12: 409, 14: 413}.get(number, 200)
    assert [reply.finish_reason for reply in (*ask(config(server), ONE), *ask(config(server), ONE))] == [
        "stop",
        "error",
    ]
    assert len(server.asked) == 15
    server.fail = lambda number: 418
    with pytest.raises(ConfigError, match=r"refuses: .*status 418"):
        ask(config(server), ONE)


async def ask_twice(server: Server) -> list[Reply]:
    engine = EndpointEngine(config(server), "tiny-1b", lambda trouble: None)
    await engine.open()
    return [await engine.write(ONE), await engine.write(ONE)]


@pytest.mark.parametrize("body", [None, "<html>busy</html>", '{"error": "boom"}', '{"choices": []}'])
def test_a_proxy_whose_server_is_gone_costs_no_conversation(server: Server, monkeypatch, body: str | None) -> None:
    """It had ended the run where a page came instead of an answer, and given up what was asked where it said 500."""

    def fail(number: int) -> int:
        server.instead = {"completions": body} if body and 1 <= number < 15 else {}
        return 500 if body is None and 1 <= number < 15 else 200

    monkeypatch.setattr(endpoint, "_PAUSE_S", 0.001)
    server.fail = fail
    assert [reply.text for reply in asyncio.run(ask_twice(server))] == ["well", "well"]


@pytest.mark.parametrize("body", ["<html>It works!</html>", '{"object": ', '{"error": "boom"}', '{"choices": []}'])
@pytest.mark.parametrize("page", ["models", "completions"])
def test_what_is_no_such_server_is_one_clear_line(server: Server, page: str, body: str) -> None:
    server.instead[page] = body
    nothing = page == "models" and body in ('{"error": "boom"}', '{"choices": []}')  # it lists no model
    said = "serves nothing, and answers are wanted of" if nothing else f"what /v1/{page} gives is not what an OpenAI-"
    with pytest.raises(ConfigError, match=rf"generate.endpoint=http://127.0.0.1:\d+:? {said}"):
        ask(config(server), ONE)


@pytest.mark.parametrize(
    ("asked", "waits"),
    [("7", 7.0), ("600", 10.0), ("Fri, 31 Dec 2100 23:59:59 GMT", 10.0), ("soon", 0.0)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_a_pause_is_given_it(
    server: Server, monkeypatch, status: int, asked: str, waits: float
) -> None:
    """At most half the time for which no answer may come, 20 s."""
    slept = list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(endpoint.asyncio, "sleep", sleep)
    server.headers["Retry-After"] = asked
    statuses = iter((429, 200))
    server.listed = lambda: next(statuses)
    server.fail = lambda number: status if number == 0 else 200
    assert [reply.text for reply in ask(config(server), ONE)] == ["well"]
    first, again = [seconds for seconds in slept if seconds]
    assert waits < first <= waits + 0.25
    assert waits < again <= waits + 0.25


def test_a_server_that_lists_no_models_is_believed_to_serve_the_one_that_is_named(server: Server) -> None:
    server.listed = lambda: 404
    with pytest.raises(ConfigError, match=r"refuses: .*: is it the right URL\? .* give generate.model"):
        ask(config(server), ONE)
    assert [reply.text for reply in ask(config(server, model="named"), ONE)] == ["well"]
    assert server.asked[-1]["model"] == "named"
    server.listed, server.instead["models"] = lambda: 200, '{"data": []}'
    assert [reply.text for reply in ask(config(server, model="named"), ONE)] == ["well"]
    server.listed = lambda: 403
    with pytest.raises(ConfigError, match=r"refuses: .*the environment variable OPENAI_API_KEY"):
        ask(config(server, model="named"), ONE)


@pytest.mark.parametrize("listed", [404, 429, "empty", "page"])
@pytest.mark.parametrize("status", [None, 404])
def test_a_server_that_is_not_back_yet_is_waited_for(
    server: Server, monkeypatch, status: int | None, listed: int | str
) -> None:
    """Its proxy says that there is nothing, and lists no model."""

    def fail(number: int) -> int | None:
        if number != 1:
            return 200
        statuses = iter([listed] * 3 if isinstance(listed, int) else [])
        server.listed = lambda: next(statuses, 200)
        if isinstance(listed, str):
            server.instead["models"] = {"empty": '{"data": []}', "page": "<html>away</html>"}[listed]
            threading.Timer(0.1, server.instead.clear).start()
        return status

    monkeypatch.setattr(endpoint, "_PAUSE_S", 0.001)
    server.fail = fail
    assert [reply.text for reply in asyncio.run(ask_twice(server))] == ["well", "well"]
    server.fail = lambda number: 401 if number == 4 else 200
    with pytest.raises(ConfigError, match=r"refuses: .*status 401"):
        asyncio.run(ask_twice(server))


def assignment(tmp_path: Path, server: Server, **settings) -> Assignment:
    target = tmp_path / "tiny-1b"
    if not target.exists():
        t.save_tokenizer(target)
        (target / "config.json").write_text('{"eos_token_id": 6}')
        lines = [json.dumps({"prompt": f"Hello {n}"}) + "\n" for n in range(40)]
        (tmp_path / "prompts.jsonl").write_text("".join(lines))
    prompts = PromptsConfig(files=(str(tmp_path / "prompts.jsonl"),), answers="target")
    generate = replace(config(server), **settings)
    return Assignment(prompts, generate, TargetConfig(path=str(target)), tmp_path / "run/answers", "first.0")


def answer(asked: Assignment) -> PromptsConfig:
    return answers_in_world(asked, dist.HashStore(), ["here"], 0, torch.device("cpu"))


def test_a_server_that_dies_and_comes_back_is_waited_for(tmp_path: Path, server: Server) -> None:
    """And another model in its place is refused."""

    def die(number: int) -> int | None:
        if number == 10:
            threading.Thread(target=restart).start()
        return None if number >= 10 else 200

    def restart() -> None:
        server.stop()
        server.fail = lambda number: 200
        back.wait(1.0)
        server.start(server.port)

    back = threading.Event()
    server.fail = die
    found = answer(assignment(tmp_path, server))
    records = [json.loads(line) for line in Path(found.files[0]).read_text().splitlines()]
    assert [r["messages"][1]["content"] for r in records] == ["well"] * 40
    assert [r["prompt"] for r in records] == [f"Hello {n}" for n in range(40)]

    def change(number: int) -> int | None:
        server.served = "models/Another"
        return None

    server.fail = change
    other = replace(assignment(tmp_path, server), directory=tmp_path / "other")
    with pytest.raises(ConfigError, match="serves 'models/Another', and answers are wanted of"):
        answer(other)


def test_a_disk_without_room_for_all_answers_is_one_line_and_nothing_is_lost(tmp_path: Path, server: Server) -> None:
    asked = assignment(tmp_path, server)
    asked.directory.mkdir(parents=True)
    (asked.directory / "prompts.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=rf"^{asked.directory} takes no more: .*No space left on device: make room"):
        answer(asked)
    assert not list(asked.directory.glob("*.tmp"))
    server.fail = lambda number: 503  # nothing is asked again
    assert len(Path(answer(asked).files[0]).read_text().splitlines()) == 40


def test_a_server_that_stays_away_ends_it_in_time(tmp_path: Path, server: Server, monkeypatch) -> None:
    """What was written stays, `specdist status` tells of it, and the same command goes on."""
    monkeypatch.setattr(team, "TELL_S", 0.0)
    server.fail = lambda number: 200 if number < 10 else 503
    asked = assignment(tmp_path, server, timeout_s=4.0)
    with pytest.raises(WorldError, match=r"has written no answer for 4 s \(generate.timeout_s\).*status 503"):
        answer(asked)
    assert "10 of 40 conversations (25%), " in describe(tmp_path / "run")
    before = len(server.asked)
    server.fail = lambda number: 200
    answer(replace(asked, start="second.0"))
    assert "answers written: 40 conversations, 40 answers of " in describe(tmp_path / "run")
    assert "answers written: 40 conversations" in overview(tmp_path)
    assert 25 < len(server.asked) - before <= 30


def test_the_time_to_go_is_not_told_by_bad_samples(tmp_path: Path, server: Server, monkeypatch) -> None:
    """They are done at once, before the first answer is."""
    monkeypatch.setattr(team, "TELL_S", 0.0)
    server.fail = lambda number: 503
    asked = assignment(tmp_path, server, timeout_s=2.0)
    lines = (tmp_path / "prompts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": 3}\n' * 10 + lines)
    with pytest.raises(WorldError, match="has written no answer"):
        answer(asked)
    said = describe(tmp_path / "run")
    assert "10 of 50 conversations (20%)" in said
    assert "to go" not in said
