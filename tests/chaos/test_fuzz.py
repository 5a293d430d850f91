# SPDX-License-Identifier: Apache-2.0
"""A thousand damaged and strange inputs of every kind that a run reads: each is read, or refused in words of ours."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from specdist.core.attempts import Failure, Started
from specdist.core.errors import UserError
from specdist.core.files import to_json
from specdist.core.progress import read_progress
from specdist.core.stop import StopReason
from specdist.run.drafts import load_state
from specdist.run.status import describe
from specdist.scheduler.messages import Computed, Heartbeat, Hello, Ready, Released, StopRequest, encode
from specdist_launch import words
from specdist_launch.ssh import read_hostfile
from tests.unit.test_checkpoint import CheckpointConfig, Checkpointer, committed, progress, state
from tests.unit.test_control import Office, failed, make_scheduler
from tests.unit.test_prompts_read import read

TryOne = Callable[[random.Random], None]

SOON_S = 10.0
STRANGE = (
    *("null", "-1", "1e400", "NaN", '""', "[]", "{}", "[[[", "\x00", "\ud83d", "true", "9" * 400),
    *("!!python/object:os.system", "&a *a", "${x}", "${oc.env:HOME}"),
)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "tool_calls": []}]
SAMPLES: list[dict[str, Any]] = [
    {"messages": TURNS, "tools": [{"type": "function"}]},
    {"conversations": [{"from": "human", "value": "Hi"}]},
    {"text": "Hi"},
]
STATUS = {
    "attempt": "7.0", "deadline": None, "hosts": ["a", "a", "a"], "started": True, "step": 40, "total_steps": 100,
    "statistics": {"elapsed_s": 1.0, "replicas": 1, "slots": 4}, "time": 1.0, "places": [["draft", "a"]],
    "phases": [{"role": "draft", "what": "training", "count": 2, "rank": 1, "host": "a", "seconds": 0.5}],
}  # fmt: skip
FIGURES = {"step": 40, "loss": 1.5, "tokens_per_s": 4.0, "step_s": 1.0, "draft_wait": 0.3, "target_wait": 0.0}
OTHERS = (None, -1, 0, 1e300, True, "", "x" * 5000, [], {}, [None], {"a": {}}, 2**70, "\ud83d")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """With a few bytes or words changed, a part missing, or doubled."""
    out = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        start = chance.randrange(len(out) + 1)
        part = slice(start, min(start + chance.randrange(1, 40), len(out)))
        match chance.randrange(5):
            case 0:
                out[part] = chance.randbytes(part.stop - part.start)
            case 1:
                del out[part]
            case 2:
                out[start:start] = out[part]
            case 3:
                out[part] = chance.choice(STRANGE).encode(errors="surrogatepass")
            case 4:
                del out[start:]
    return bytes(out)


def changed(value: Any, chance: random.Random) -> bytes:
    """As JSON: with one of its values replaced, or damaged."""
    if chance.random() < 0.5:
        return damaged(json.dumps(value).encode(), chance)

    def other(value: Any) -> Any:
        if isinstance(value, dict) and value and chance.random() < 0.8:
            key = chance.choice(sorted(value))
            return {**value, key: other(value[key])}
        if isinstance(value, list) and value and chance.random() < 0.8:
            place = chance.randrange(len(value))
            return [*value[:place], other(value[place]), *value[place + 1 :]]
        return chance.choice(OTHERS)

    return json.dumps(other(value)).encode()


def configuration(directory: Path) -> TryOne:
    text, file = (Path(__file__).parents[2] / "configs/quickstart.yaml").read_bytes(), directory / "job.yaml"

    def try_one(chance: random.Random) -> None:
        file.write_bytes(damaged(text, chance))
        words.load([str(file), *([f"train.steps={chance.choice(STRANGE)}"] if chance.random() < 0.2 else [])])

    return try_one


def conversations(directory: Path) -> TryOne:
    file = directory / "x.jsonl"

    def try_one(chance: random.Random) -> None:
        file.write_bytes(b"\n".join(changed(chance.choice(SAMPLES), chance) for _ in range(3)))
        list(read((str(file),)))

    return try_one


def checkpoints(directory: Path) -> TryOne:
    model, optimizer = state()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    saves = Checkpointer(directory, CheckpointConfig(asynchronous=False), dist.group.WORLD, 0)
    saves.save(model, optimizer, progress(1))
    saves.finish()
    dist.destroy_process_group()  # what is read needs none, and other tests make their own
    (path,) = committed(directory)
    files = {file: file.read_bytes() for file in sorted(path.iterdir())}

    def try_one(chance: random.Random) -> None:
        file = chance.choice(sorted(files))
        file.write_bytes(damaged(files[file], chance))
        try:
            read_progress(path)
            load_state(model, path)
        finally:
            file.write_bytes(files[file])

    return try_one


def hostfiles(directory: Path) -> TryOne:
    file = directory / "hosts"

    def try_one(chance: random.Random) -> None:
        file.write_bytes(damaged(b"node1 slots=8\n# a comment\nnode2\n\nnode3 slots=4 # four\n" * 3, chance))
        read_hostfile(str(file))

    return try_one


def status_files(directory: Path) -> TryOne:
    attempt = directory / "logs/7.0"
    attempt.mkdir(parents=True)
    (directory / "config.yaml").write_text("run: {}\n")
    whole = {
        directory / "status.json": STATUS,
        directory / "metrics.jsonl": FIGURES,
        attempt / "started.json": json.loads(to_json(Started("local", ("a",), 3))),
        attempt / "failure.json": json.loads(to_json(Failure("error", "bad", 1))),
        attempt / "outcome.json": {"state": "stopped", "step": 3, "reason": "SIGTERM", "detail": "", "time": 1.0},
    }

    def try_one(chance: random.Random) -> None:
        for file, value in whole.items():
            file.unlink(missing_ok=True)
            if chance.random() < 0.7:
                file.write_bytes(changed(value, chance) if chance.random() < 0.5 else json.dumps(value).encode())
        describe(directory)

    return try_one


def frames(directory: Path) -> TryOne:
    stop, computed = StopRequest(StopReason.TERMINATE), Computed(3, (1,))
    sent = (Hello(5, 1), Ready(), Heartbeat(1.0, 2, "x"), computed, Released(0), failed("x"), stop)
    office = Office(make_scheduler())

    def try_one(chance: random.Random) -> None:
        nonlocal office
        if office.coordinator.aborted is not None or not office.coordinator.peers.present:
            office = Office(make_scheduler())
            office.open()
        office.coordinator.receive(chance.randrange(7), damaged(encode(chance.choice(sent)), chance), 0.0)
        office.coordinator.advance(0.0)
        office.tick(0.0)

    return try_one


INPUTS = {configuration: 60, conversations: 300, checkpoints: 60, hostfiles: 180, status_files: 200, frames: 200}


@pytest.mark.parametrize("kind", INPUTS)
def test_what_cannot_be_read_is_refused_in_words_of_ours(tmp_path: Path, kind: Callable[[Path], TryOne]) -> None:
    try_one, strange = kind(tmp_path), []
    for seed in range(INPUTS[kind]):
        began = time.monotonic()
        try:
            try_one(random.Random(seed))
        except UserError as error:
            if not str(error):
                strange.append(f"{seed}: says nothing")
        except Exception as error:  # noqa: BLE001 - none is expected
            strange.append(f"{seed}: {type(error).__name__}: {error}")
        if time.monotonic() - began > SOON_S:
            strange.append(f"{seed}: took long")
    assert not strange, "\n".join(strange)
