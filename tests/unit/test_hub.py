# SPDX-License-Identifier: Apache-2.0
"""Repositories of the Hub in the place of directories, against a Hub on this machine and the real libraries."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from filelock import FileLock

from specdist.core import hub
from specdist.core.errors import ConfigError, DataError
from specdist.core.launch_env import RankFacts
from specdist.job.config import examine, load_job
from specdist.job.plan import make_plan, render
from specdist.run.runtime import fetch_target
from tests.hub_server import COMMIT, Hub, client_environment, serving, start
from tests.tiny import make_config, make_conversations, make_target

NOBODY = "http://127.0.0.1:1"
RESOLVE = """
import sys, time
from specdist.core import hub
from specdist.core.errors import UserError
from specdist.core.stop import leave
hub.SILENCE_S, hub.LOOK_S = float(sys.argv[3]), 0.1
for path in sys.argv[1].splitlines():
    began = time.monotonic()
    try:
        print(hub.resolve(path, "target.path", weights=sys.argv[2] == "weights"))
    except UserError as error:
        print(error)
    assert time.monotonic() - began < 30
leave(0)
"""
COMMAND = """
import sys
from specdist.core import hub
from specdist_launch.cli import main
hub.SILENCE_S, hub.LOOK_S = 1.0, 0.1
sys.exit(main(sys.argv[1:]))
"""
PUSH = """
import sys
from pathlib import Path
from specdist.core import hub
from specdist.core.errors import UserError
from specdist.core.stop import leave
from specdist.export.card import push
for name in sys.argv[2:]:
    hub.SILENCE_S = 2.0 if "hangs" in name else 60.0
    try:
        print(push(Path(sys.argv[1]), name))
    except UserError as error:
        print(error)
leave(0)
"""
DATASET = """
import sys
from specdist.core.errors import UserError
from specdist.prompts.read import find_files
for name in sys.argv[1:]:
    try:
        print(*(file.path for file in find_files((name,))))
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """org/tiny with weights in shards among others, org/draft, the data set org/chat of two splits."""
    directory = tmp_path_factory.mktemp("hub")
    tiny = make_target(directory / "models/org/tiny")
    index = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    shards = directory / "models/org/sharded"
    shutil.copytree(tiny, shards)
    (shards / "model.safetensors").rename(shards / "model-1-of-2.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-2-of-2.safetensors", "consolidated.safetensors", "pytorch_model.bin", "original.pth"):
        (shards / name).write_text(name)
    chat = directory / "datasets/org/chat"
    chat.mkdir(parents=True)
    for name, count in (("train", 30), ("test", 4)):
        make_conversations(chat / f"{name}.jsonl", count)
    files = [f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("train", "test")]
    (chat / "README.md").write_text(f"---\nconfigs:\n- config_name: short\n  data_files:\n{''.join(files)}---\n")
    return directory


@pytest.fixture
def server(repositories: Path) -> Any:
    with serving(repositories) as running:
        yield running


def resolve(
    path: str,
    home: Path,
    endpoint: str,
    weights: bool = False,
    cwd: Path | None = None,
    silence_s: float = 60.0,
    **more: str,
) -> str:
    words = ["-c", RESOLVE, path, "weights" if weights else "small", str(silence_s)]
    process = start(words, client_environment(endpoint, home, **more), cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


def names(directory: str) -> set[str]:
    return {path.name for path in Path(directory).iterdir()}


def test_a_model_is_fetched_in_two_steps_and_then_never_again(server: Hub, tmp_path: Path) -> None:
    small = resolve("org/sharded", tmp_path, server.endpoint)
    assert Path(small).name == COMMIT
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names(small)
    assert not server.fetched(".safetensors")
    assert resolve("org/sharded@main", tmp_path, server.endpoint, weights=True) == small
    # of the weights those that the index names, and nothing else; the small files were there
    weights = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    assert sorted(server.fetched(".safetensors")) == weights
    assert not {"consolidated.safetensors", "pytorch_model.bin", "original.pth"} & names(small)
    assert len(server.fetched("config.json")) == len({"config.json", "generation_config.json", "tokenizer_config.json"})
    asked = len(server.asked)
    for endpoint, offline in ((server.endpoint, ""), (NOBODY, ""), (server.endpoint, "1")):
        assert resolve("org/sharded", tmp_path, endpoint, weights=True, HF_HUB_OFFLINE=offline) == small
    assert len(server.asked) == asked


def test_what_another_program_has_left_in_the_cache_is_completed(server: Hub, tmp_path: Path) -> None:
    """transformers fetches config.json alone, and says nothing of what else there is."""
    environment = client_environment(server.endpoint, tmp_path)
    other = start(["-c", "from huggingface_hub import *; hf_hub_download('org/tiny', 'config.json')"], environment)
    assert other.wait() == 0
    assert "tokenizer.json" in names(resolve("org/tiny", tmp_path, server.endpoint))


def test_an_export_is_put_there_under_a_card_of_its_name(server: Hub, tmp_path: Path, repositories: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    data = ["hub:org/chat/short:train", str(tmp_path / "a.jsonl"), "private/b.jsonl", "../private/*.jsonl"]
    keys = {"prompts.files": data, "prompts.chat_template": "private/chat.jinja", "draft.eagle3.loss": "kl"}
    ours = {"target": "org/tiny", "draft_tokens": 3, "step": 7, "data": data, "configuration": keys}
    config = {"architectures": ["LlamaForCausalLMEagle3"], "torch_dtype": "bfloat16", "specdist": ours}
    files = {"config.json": json.dumps(config), "model.safetensors": "weights", "README.md": "of this machine"}
    for name, text in files.items():
        (draft / name).write_text(text)

    server.gated["others/new"] = 403
    server.silent = lambda asked: "org/hangs/commit" in asked
    words = ["-c", PUSH, str(draft), "org/new", "nowhere", "others/new", "org/hangs"]
    process = start(words, client_environment(server.endpoint, tmp_path))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    log_in = "log in with a token that may write there (`hf auth login`, or HF_TOKEN)"
    assert out.splitlines() == [
        f"{server.endpoint}/org/new",
        "--push nowhere: give ORG/NAME, a model repository on the Hugging Face Hub",
        f"--push others/new: {server.endpoint} refuses it: {log_in}",
        f"--push org/hangs: {server.endpoint} has not taken 0 MB in 2 s: what is there already is passed over when it "
        "is pushed again",
    ]
    there = {path.name: path.read_text() for path in (repositories / "models/org/new").iterdir()}
    card = there.pop("README.md")
    assert there["model.safetensors"] == "weights"
    said = json.loads(there["config.json"])["specdist"]
    assert said["data"] == ["hub:org/chat/short:train", "a.jsonl", "b.jsonl", "*.jsonl"]
    told = {"prompts.files": said["data"], "prompts.chat_template": "chat.jinja", "draft.eagle3.loss": "kl"}
    assert said["configuration"] == told
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"], front["datasets"]) == ("org/tiny", "unknown", ["org/chat"])
    assert "--speculative-draft-model-path org/new" in card
    assert str(tmp_path) not in card + there["config.json"]
    assert "private" not in card + there["config.json"]


def test_a_directory_wins(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "org/tiny").mkdir(parents=True)
    assert resolve("org/tiny", tmp_path / "home", server.endpoint, weights=True, cwd=tmp_path) == "org/tiny"
    assert not server.asked


def test_what_cannot_be_had_is_one_line_at_once(server: Hub, tmp_path: Path, repositories: Path) -> None:
    said = {
        "org/none": "target.path=org/none: there is no such directory, and {hub} has no such model, or it is private: ",
        "org/tiny@v9": "target.path=org/tiny@v9: there is no such directory, and {hub}/org/tiny has no revision v9",
        "gated/401": "is gated: ask for access at {hub}/gated/401 and log in (`hf auth login`, or HF_TOKEN)",
        "gated/403": "is gated: ask for access at {hub}/gated/403 and log in (`hf auth login`, or HF_TOKEN)",
        "nowhere": "target.path=nowhere: no such directory, nor the id of a model on the Hugging Face Hub (ORG/NAME",
        "/no/where": "target.path=/no/where: no such directory, nor the id of a model on the Hugging Face Hub (",
    }
    for status in (401, 403):
        server.gated[f"gated/{status}"] = status
        shutil.copytree(repositories / "models/org/tiny", repositories / f"models/gated/{status}")
    lines = resolve("\n".join(said), tmp_path, server.endpoint).splitlines()
    for line, part in zip(lines, said.values(), strict=True):
        assert part.format(hub=server.endpoint) in line
    found = resolve("org/tiny", tmp_path / "empty", NOBODY)
    assert f"does not have it whole, and {NOBODY} gives nothing ([Errno 111] Connection refused): run `hf down" in found
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = resolve("org/tiny", tmp_path / "empty", endpoint, HF_HUB_ETAG_TIMEOUT="1")
    assert f"{endpoint} gives nothing (timed out): run `hf download org/tiny`" in found
    found = resolve("org/tiny", tmp_path / "empty", server.endpoint, HF_HUB_OFFLINE="1")
    assert "and HF_HUB_OFFLINE is set: run `hf download org/tiny` where there is a network and copy the cache" in found


def test_of_the_processes_of_a_host_one_downloads(server: Hub, tmp_path: Path) -> None:
    server.delay_s = 1.0
    with ThreadPoolExecutor() as threads:
        found = [threads.submit(resolve, "org/tiny", tmp_path, server.endpoint, True) for _ in range(3)]
    assert len({future.result() for future in found}) == 1
    assert server.fetched(".safetensors") == ["model.safetensors"]
    assert sum("/tree/" in line for line in server.asked) == 1


def test_the_wait_for_a_process_that_hangs_is_bounded(server: Hub, tmp_path: Path) -> None:
    lock = tmp_path / "hub/.locks/models--org--tiny/specdist.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        found = resolve("org/tiny", tmp_path, server.endpoint, silence_s=2)
    assert f"org/tiny and has come no further for 2 s; its lock is {lock}" in found
    assert not server.asked


@pytest.mark.parametrize("part", ["/tree/", "GET org/tiny/resolve"])
def test_a_hub_that_falls_silent_is_named_in_time(part: str, server: Hub, tmp_path: Path) -> None:
    server.silent = lambda asked: part in asked
    found = resolve("org/tiny", tmp_path, server.endpoint, silence_s=2, HF_HUB_DOWNLOAD_TIMEOUT="60")
    assert f"download of org/tiny from {server.endpoint} has come no further for 2 s: that server is silent" in found


def test_the_command_ends_though_another_program_holds_a_file_of_the_cache(server: Hub, tmp_path: Path) -> None:
    server.silent = lambda asked: not asked.startswith("HEAD") and "/resolve/" in asked  # the other one's download
    tool = "from huggingface_hub import *; hf_hub_download('org/tiny', 'config.json')"
    environment = client_environment(server.endpoint, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="600")
    other = start(["-c", tool], environment)
    try:
        while not any(line.startswith("GET") and line.endswith("config.json") for line in server.asked):
            assert other.poll() is None, other.communicate()
            time.sleep(0.05)
        server.silent = lambda asked: False
        words = ["plan", "target.path=org/tiny", "prompts.files=[x]", "run.dir=x", "draft.dp=1"]
        process = start(["-c", COMMAND, *words], environment)
        _, err = process.communicate(timeout=300)
    finally:
        other.kill()
        other.communicate()
    assert process.returncode == 2
    assert f"or another program holds a lock under {tmp_path / 'hub/.locks'}" in err


def test_data_sets_are_the_arrow_files_of_a_split(server: Hub, tmp_path: Path) -> None:
    def read(*words: str, endpoint: str = server.endpoint, home: Path = tmp_path, **more: str) -> list[str]:
        process = start(["-c", DATASET, *words], client_environment(endpoint, home, **more))
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out.splitlines()

    bad = ("hub:org/chat:nope", "hub:org/chat/nope", "hub:org/none", "hub:org/chat@v9", "hub:chat")
    plain, test, *errors = read("hub:org/chat", "hub:org/chat/short:test@main", *bad)
    assert (Path(plain).name, Path(test).name) == ("chat-train.arrow", "chat-test.arrow")
    for said, part in zip(
        errors,
        (
            "prompts.files: org/chat has no split nope, but train, test: name one as hub:ORG/NAME[/CONFIG][:SPLIT]",
            "prompts.files: hub:org/chat/nope cannot be read: BuilderConfig 'nope' not found. Available: ['short']",
            f"prompts.files: hub:org/none: {server.endpoint} has no such dataset, or it is private",
            f"prompts.files: hub:org/chat@v9: {server.endpoint}/datasets/org/chat has no revision v9",
            "prompts.files: hub:chat is not of the form hub:ORG/NAME[/CONFIG][:SPLIT][@REVISION]",
        ),
        strict=True,
    ):
        assert said.startswith(part)
    began = time.monotonic()
    assert read("hub:org/chat", endpoint=NOBODY, HF_HUB_OFFLINE="1") == [plain]
    usual, began = time.monotonic() - began, time.monotonic()
    (said,) = read("hub:org/chat", endpoint=NOBODY, home=tmp_path / "empty")
    assert f"and {NOBODY} gives nothing" in said
    assert "`hf download org/chat --repo-type dataset`" in said
    assert time.monotonic() - began < 10 + 2 * usual


def test_config_json_alone_is_enough_for_a_plan(tmp_path: Path) -> None:
    whole, bare = make_target(tmp_path / "full"), tmp_path / "bare"  # as long: lines wrap
    bare.mkdir()
    shutil.copy(whole / "config.json", bare)
    plans = [make_plan(load_job([], make_config(tmp_path, path, tmp_path)), ["a"] * 3, 2**30) for path in (whole, bare)]
    texts = [render(plan) for plan in plans]
    assert texts[0].replace(str(whole), "") == texts[1].replace(str(bare), "")
    with pytest.raises(DataError, match="bare: no weights found"):
        examine(load_job([], make_config(tmp_path, bare, tmp_path)))
    sizes = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({key: value for key, value in sizes.items() if key != "dtype"}))
    with pytest.raises(
        ConfigError, match=r"target.dtype=auto: .*config.json does not say a dtype and there are no wei"
    ):
        examine(load_job([], [*make_config(tmp_path, bare, tmp_path), "world.device=auto"]), weights=False)


def test_the_first_rank_of_every_host_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def raised(fetched: Any) -> list[str | None]:
        hosts, store = ("a", "a", "b", "b"), dist.HashStore()
        calls.clear()

        def resolve(path: str, *_: Any, say: Any, **options: Any) -> Path:
            calls.append(rank := threading.current_thread().name)
            say(1, "some")
            if isinstance(found := fetched(rank), DataError):
                raise found
            return Path("snapshots", found)

        monkeypatch.setattr(hub, "resolve", resolve)

        def take_part(rank: int) -> None:
            threading.current_thread().name = str(rank)
            facts = RankFacts(rank, 4, rank % 2, 2, hosts[rank])
            fetch_target("org/x", SimpleNamespace(facts=facts, hosts=hosts, store=store), 5.0)  # type: ignore[arg-type]

        with ThreadPoolExecutor(4) as threads:
            parts = [threads.submit(take_part, rank) for rank in range(4)]
        assert sorted(calls) == ["0", "2"]
        return [part.exception() and str(part.exception()) for part in parts]

    assert raised(lambda rank: COMMIT) == [None] * 4
    assert raised(lambda rank: DataError("target.path=org/x: no", "target.path")) == ["target.path=org/x: no"] * 4
    other = "target.path=org/x: the hosts have different ones (a has 0, b has 2): name ORG/NAME@COMMIT"
    assert raised(lambda rank: rank) == [other] * 4
