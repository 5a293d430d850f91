# SPDX-License-Identifier: Apache-2.0
"""The cache: what it is keyed by, who prepares it, and that nothing wrong is left of a preparation that was killed."""

import errno
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
from filelock import FileLock

from specdist.core import files
from specdist.core.errors import ConfigError, DataError, WorldError
from specdist.core.team import Team
from specdist.prompts import prepare as prepare_module
from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import to_sample
from specdist.prompts.corpus import Corpus, make_corpus
from specdist.prompts.prepare import prepare, prepare_in_world
from specdist.prompts.read import find_files
from specdist.prompts.render import Renderer
from specdist.prompts.store import PromptStore
from specdist_launch.cli import main
from tests.tiny import make_config, make_conversations, make_target
from tests.unit import prompts_tokenizers as t

ANSWERS = ["Hello there", "I am well, thank you", "The answer is 42", "é 🎉"]


def record(number: int) -> dict[str, object]:
    answer = f"{ANSWERS[number % len(ANSWERS)]} {number}"
    return {
        "messages": [{"role": "user", "content": f"How are you {number}?"}, {"role": "assistant", "content": answer}]
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t.save_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path: Path) -> PromptsConfig:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record(i)) + "\n" for i in range(600)))
    return PromptsConfig(files=(str(path),), cache_dir=str(tmp_path / "cache"), workers=0)


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The preparations that really happen."""
    done: list[Path] = []
    original = prepare_module._prepare_into  # noqa: SLF001

    def counted(final: Path, *rest: object) -> None:
        done.append(final)
        original(final, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module, "_prepare_into", counted)
    return done


def add_lines(config: PromptsConfig, *lines: str) -> None:
    with open(config.files[0], "a") as file:
        file.write("".join(line + "\n" for line in lines))


def test_the_store_holds_what_the_renderer_says(config: PromptsConfig, model: Path) -> None:
    store = prepare(config, model, progress=False)
    renderer = Renderer.from_directory(model, config)
    expected = [renderer.render(to_sample(record(i), "", 1)).sequences[0] for i in range(600)]
    assert len(store) == 600
    assert store.lengths(np.arange(len(store))).tolist() == [len(s.tokens) for s in expected]
    assert store.supervised_counts.tolist() == [int(s.supervised.sum()) for s in expected]
    assert store.provenance(599) == (config.files[0], 600)
    assert store.max_token == max(int(s.tokens.max()) for s in expected)
    chosen = [7, 3, 599]
    corpus = make_corpus([store])
    packed = corpus.pack(chosen)
    assert packed.tokens.tolist() == [x for i in chosen for x in expected[i].tokens.tolist()]
    assert packed.supervised.tolist() == [x for i in chosen for x in expected[i].supervised.tolist()]
    assert packed.lengths == [len(expected[i].tokens) for i in chosen]
    assert packed.positions.tolist() == [p for i in chosen for p in range(len(expected[i].tokens))]
    assert [str(x.dtype) for x in (packed.tokens, packed.supervised, packed.cu_seqlens, packed.positions)] == [
        "torch.int64",
        "torch.bool",
        "torch.int32",
        "torch.int64",
    ]
    empty = corpus.pack([])
    assert (len(empty.tokens), empty.cu_seqlens.tolist()) == (0, [0])


def test_worker_processes_give_the_same_store(config: PromptsConfig, model: Path, tmp_path: Path) -> None:
    add_lines(config, "{", *[json.dumps(record(i)) for i in range(300)], '{"text": ""}')
    here = prepare(config, model, progress=False)
    there = prepare(replace(config, workers=2, cache_dir=str(tmp_path / "other")), model, progress=False)
    assert there.fingerprint == here.fingerprint
    assert there.directory.name == here.directory.name
    assert there.report == here.report
    assert [there.provenance(i) for i in range(len(there))] == [here.provenance(i) for i in range(len(here))]
    assert (there.directory / "bad.jsonl").read_text() == (here.directory / "bad.jsonl").read_text()


def test_the_cache_is_keyed_by_content(
    config: PromptsConfig, model: Path, tmp_path: Path, preparations: list[Path]
) -> None:
    first = prepare(config, model, progress=False)
    moved = tmp_path / "renamed.jsonl"
    os.rename(config.files[0], moved)
    config = replace(config, files=(str(moved),))
    assert prepare(replace(config, workers=1, max_bad_fraction=0.1), model, progress=False).directory == first.directory
    assert len(preparations) == 1
    t.save_tokenizer(tmp_path / "headers", t.HEADERS)
    (tmp_path / "own.jinja").write_text(t.CHATML + " ")
    for other, tokenizer in (
        (replace(config, supervise="last"), model),
        (replace(config, max_length=1000), model),
        (replace(config, template_kwargs={"a": 1}), model),
        (replace(config, chat_template=str(tmp_path / "own.jinja")), model),
        (config, tmp_path / "headers"),
    ):
        prepare(other, tokenizer, progress=False)
    add_lines(config, json.dumps(record(1)))
    prepare(config, model, progress=False)
    assert len(set(preparations)) == len(preparations) == 7
    assert sorted(p.name for p in first.directory.parent.iterdir()) == sorted(p.name for p in preparations)


def test_every_file_of_a_tokenizer_is_in_the_key(config: PromptsConfig, model: Path, tmp_path: Path) -> None:
    """That of Kimi is tiktoken.model alone, beside its settings, and Qwen's first one qwen.tiktoken."""
    model = shutil.copytree(model, tmp_path / "model")
    keys = [prepare_module.cache_key(config, find_files(config.files), model)]
    (model / "additional_chat_templates").mkdir()
    for name in ("tiktoken.model", "qwen.tiktoken", "tekken.json", "additional_chat_templates/tools.jinja"):
        for content in ("one", "other"):
            (model / name).write_text(content)
            keys.append(prepare_module.cache_key(config, find_files(config.files), model))
    (model / "README.md").write_text("no part of it")
    keys.append(prepare_module.cache_key(config, find_files(config.files), model))
    assert len(set(keys)) == len(keys) - 1 == 9


def test_bad_samples_are_counted_named_and_written_down(config: PromptsConfig, model: Path) -> None:
    add_lines(config, "{", '{"messages": []}', json.dumps(record(1)), "[]", "{}", "{}", "{}", "{}")
    store = prepare(config, model, progress=False)
    report = store.report
    assert (report.samples, report.kept, report.sequences) == (608, 601, 601)
    assert report.bad == {"malformed record": 1, "no answer": 1, "unknown format": 5}
    assert report.tokens == store.lengths(np.arange(len(store))).sum()
    assert report.supervised == store.supervised_counts.sum()
    path = config.files[0]
    assert report.examples["malformed record"][0].startswith(f"{path}:601: malformed record: ")
    assert len(report.examples["unknown format"]) == 3
    listed = [json.loads(line) for line in (store.directory / "bad.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in listed] == [
        (path, n) for n in (601, 602, 604, 605, 606, 607, 608)
    ]
    assert "601 of 608 samples kept" in str(report)
    assert f"{path}:602" in str(report)


def test_a_bad_sample_stops_if_it_is_to(config: PromptsConfig, model: Path) -> None:
    add_lines(config, '{"messages": []}', "{")
    stop = replace(config, on_bad="stop")
    with pytest.raises(DataError, match=r"train\.jsonl:601: no answer.*on_bad"):
        prepare(stop, model, progress=False)
    assert not list(Path(config.cache_dir or "").glob("prompts/*"))
    prepare(config, model, progress=False)
    found = r"train\.jsonl:601: no answer.*on_bad=stop.*All bad samples: .*bad\.jsonl"
    with pytest.raises(DataError, match=found):  # in the cache
        prepare(stop, model, progress=False)


def test_a_cache_that_cannot_be_written_is_named_with_its_key(config, model, tmp_path):
    (tmp_path / "file").touch()
    for where in (str(tmp_path / "file/cache"), "/proc/none"):
        said = rf"prompts.cache_dir: {where}/prompts cannot be written .*: set it to a dir"
        with pytest.raises(ConfigError, match=said):
            prepare(replace(config, cache_dir=where), model, progress=False)


def test_too_many_bad_samples_and_none_good(config: PromptsConfig, model: Path, tmp_path: Path) -> None:
    add_lines(config, *["{}"] * 100)
    with pytest.raises(DataError, match=r"100 of 700 samples are bad, more than prompts\.max_bad_fraction = 10%"):
        prepare(replace(config, max_bad_fraction=0.1), model, progress=False)
    (tmp_path / "none.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"not one usable sample in .*none\.jsonl(.|\n)*none\.jsonl:1: unknown format"):
        prepare(replace(config, files=(str(tmp_path / "none.jsonl"),)), model, progress=False)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Hi"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(DataError, match=r"^no sample of \S+asked\.jsonl has an answer: prompts\.answers=target"):
        prepare(replace(config, files=(str(tmp_path / "asked.jsonl"),)), model, progress=False)


def test_overlong_samples(config: PromptsConfig, model: Path) -> None:
    long = record(0) | {"messages": [*record(0)["messages"][:1], {"role": "assistant", "content": "well " * 500}]}  # type: ignore[index]
    add_lines(config, json.dumps(long))
    cut = prepare(replace(config, max_length=100), model, progress=False)
    assert (len(cut), cut.longest, cut.report.truncated) == (601, 100, 1)
    skip = replace(config, max_length=100, overlong="skip", on_bad="stop", max_bad_fraction=0.0)
    skipped = prepare(skip, model, progress=False)
    assert (len(skipped), skipped.report.bad) == (600, {"overlong": 1})
    with pytest.raises(
        DataError, match=r"train\.jsonl:601: overlong: \d+ tokens.*max_length = 100.*prompts\.overlong=stop"
    ):
        prepare(replace(config, max_length=100, overlong="stop"), model, progress=False)


def test_combinations_that_cannot_be() -> None:
    for wrong, key in (
        ({"max_length": 1}, "prompts.max_length"),
        ({"max_length": 4096, "tokens_per_rank": 2048}, "prompts.tokens_per_rank"),
        ({"max_bad_fraction": 1.5}, "prompts.max_bad_fraction"),
        ({"workers": -1}, "prompts.workers"),
        ({"template_kwargs": {"tools": []}}, "prompts.template_kwargs.tools"),
    ):
        with pytest.raises(ConfigError, match=key):
            PromptsConfig(**wrong)  # type: ignore[arg-type]


def test_a_store_is_taken_as_it_is(tmp_path: Path, model: Path, preparations: list[Path]) -> None:
    written = t.write_store(tmp_path / "a", [([1, 2, 3, 4], [False, True, True, True])])
    config = PromptsConfig(files=(str(tmp_path / "a"),), max_length=4)
    assert prepare(config, model, progress=False).fingerprint == written.fingerprint
    assert not preparations
    with pytest.raises(DataError, match=r"a sequence of 4 tokens, and is not cut: raise prompts.max_length from 3"):
        prepare(replace(config, max_length=3), model, progress=False)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    for added in ("groups", "labels"):  # format 1 had no such columns
        (tmp_path / "a" / f"{added}.bin").unlink()
    with pytest.raises(DataError, match=r"a is a prompt store of format 1; this is format 3"):
        prepare(config, model, progress=False)


def test_stores_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompt store"):
        PromptStore.open(tmp_path)
    store = t.write_store(tmp_path / "a", [([1, 2, 3], [False, True, True])])
    assert store.fingerprint != t.write_store(tmp_path / "b", [([1, 2, 3], [True, True, True])]).fingerprint
    (tmp_path / "a" / "tokens.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"4 bytes where the manifest says 12"):
        PromptStore.open(tmp_path / "a")
    (tmp_path / "b" / "lines.bin").unlink()
    with pytest.raises(DataError, match="incomplete"):
        PromptStore.open(tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(DataError, match="a prompt store of format 0"):
        PromptStore.open(tmp_path / "b")


# --- several processes


SLOW = """
import sys, time
from specdist.prompts import prepare as p
from specdist.prompts.config import PromptsConfig
if __name__ == "__main__":
    extend = p.StoreWriter.extend
    def slow(*sequences):
        extend(*sequences)
        print("working", flush=True)
        time.sleep(600)
    p.StoreWriter.extend = slow
    p.prepare(PromptsConfig(files=(sys.argv[1],), cache_dir=sys.argv[2], workers=int(sys.argv[3])), sys.argv[4], False)
"""


def start_slow(config: PromptsConfig, model: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A preparation with one worker process that stays at its first piece."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, str(script), config.files[0], str(config.cache_dir), "1", str(model)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    return process


def until(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_others_wait_a_bounded_time_and_a_killed_preparation_leaves_nothing_wrong(
    config: PromptsConfig, model: Path, tmp_path: Path
) -> None:
    process = start_slow(config, model, tmp_path)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    try:
        assert children
        name = f"process {process.pid} on {socket.gethostname().partition('.')[0]}"
        with pytest.raises(WorldError, match=rf"waited 1 s for {name} .*\.lock"):
            prepare(config, model, progress=False, timeout=1.0)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert until(lambda: not any(map(runs, children))), "workers outlive their parent"
    cache = Path(config.cache_dir or "") / "prompts"
    assert sorted(p.suffix for p in cache.iterdir()) == [".lock", ".tmp"]
    started = time.monotonic()
    store = prepare(config, model, progress=False)
    assert time.monotonic() - started < 120, "the lock of a dead process is free at once"
    assert len(store) == 600
    assert [p.name for p in cache.iterdir()] == [store.directory.name]


def test_waiting_for_another_process_is_progress(
    config: PromptsConfig, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a world the others give a rank up that comes no further: longer than that it may wait for another job."""
    cache, said, clock = Path(config.cache_dir or "") / "prompts", list[str](), itertools.count(0, 600)
    cache.mkdir(parents=True)
    key = prepare_module.cache_key(config, find_files(config.files), model)
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(files, "LOOK_S", 0.01)
    with FileLock(cache / f"{key}.lock"), pytest.raises(WorldError, match="waited 3600 s for another process"):
        prepare(config, model, progress=False, on_progress=said.append)
    waits = [text for text in said if "waiting" in text]
    assert len(waits) == len(set(waits)) == 6


def test_a_file_system_without_locks_serves(
    config: PromptsConfig, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not every shared one has them; what another process is at work on is left alone there."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    work = Path(config.cache_dir or "") / "prompts"
    work /= f"{prepare_module.cache_key(config, find_files(config.files), model)}.process 7 on b.0.tmp"
    work.mkdir(parents=True)
    assert len(prepare(config, model, progress=False)) == 600
    assert work.exists()
    assert "No locks available" in capsys.readouterr().err


def test_of_many_one_prepares(config: PromptsConfig, model: Path, preparations: list[Path]) -> None:
    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(lambda _: prepare(config, model, progress=False, timeout=60), range(4)))
    assert len(preparations) == 1
    assert {store.fingerprint for store in stores} == {stores[0].fingerprint}


HOSTS = ["a", "b", "a", "b"]


@pytest.mark.parametrize("shared", [True, False])
def test_in_a_world_one_rank_of_a_host_prepares(
    config: PromptsConfig, model: Path, preparations: list[Path], monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    store, of_thread = dist.HashStore(), threading.local()
    held = Path(config.files[0]).with_name("held.jsonl")
    held.write_text(json.dumps(record(7)) + "\n")
    config = replace(config, holdout=(str(held),))
    monkeypatch.setattr(prepare_module, "is_store", lambda path: path.is_relative_to(of_thread.cache))

    def of_rank(rank: int) -> Corpus:
        cache = of_thread.cache = Path(config.cache_dir or "") / ("" if shared else HOSTS[rank])
        return prepare_in_world(replace(config, cache_dir=str(cache)), model, store, HOSTS, rank)

    with ThreadPoolExecutor(4) as threads:
        corpora = list(threads.map(of_rank, [3, 2, 1, 0]))
    assert len(preparations) == (2 if shared else 4)
    assert {(len(corpus), corpus.training.fingerprint, corpus.provenance(599)) for corpus in corpora} == {
        (600, corpora[0].training.fingerprint, (str(held), 1))
    }
    stores = [corpus.training.store for corpus in corpora]
    assert [store.directory for store in stores[:2]] == [store.directory for store in stores[2:]]
    assert stores[0].provenance(599) == (config.files[0], 600)


def test_in_a_world_no_rank_goes_on_before_all_hosts_have_their_prompts(config: PromptsConfig, model: Path) -> None:
    store = dist.HashStore()
    with pytest.raises(WorldError, match=r"rank 1 \(host b\) prepares the prompts") as error:
        prepare_in_world(config, model, store, HOSTS, 0, silence_s=0.1)
    assert error.value.culprit == 1
    with pytest.raises(WorldError, match=r"rank 1 \(host b\) prepares the prompts"):
        prepare_in_world(config, model, store, HOSTS, 2)


def test_in_a_world_all_ranks_have_the_same_error(config: PromptsConfig, model: Path) -> None:
    store = dist.HashStore()
    add_lines(config, "{")
    for rank in (0, 2, 3):
        with pytest.raises(DataError, match=r"train\.jsonl:601: malformed record.*on_bad=stop") as error:
            prepare_in_world(replace(config, on_bad="stop"), model, store, HOSTS, rank)
        assert error.value.keys == "prompts.on_bad"


def test_in_a_world_hosts_of_different_prompts_are_named(config: PromptsConfig, model: Path) -> None:
    store = dist.HashStore()
    other = {"stores": [("/elsewhere", [])], "fingerprint": "other"}
    Team(store, "prompts", "prepares", 0, HOSTS).put("0", other)
    with pytest.raises(DataError, match=r"prompts\.files: hosts b and a have different ones: .* name the revision"):
        prepare_in_world(config, model, store, HOSTS, 1)


def test_in_a_world_a_rank_that_comes_no_further_is_named(config: PromptsConfig, model: Path) -> None:
    store = dist.HashStore()
    Team(store, "prompts", "prepares", 0, HOSTS).tell("42%: 7 sequences")
    with pytest.raises(WorldError, match=r"rank 0 \(host a\) .* no further for 0 s; its last word: 42%: 7") as error:
        prepare_in_world(config, model, store, HOSTS, 1, silence_s=0.1)
    assert error.value.culprit == 0


def test_a_moved_file_keeps_its_store_and_is_named_as_it_is_called_now(tmp_path: Path, model: Path) -> None:
    line = json.dumps(record(1))
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    before.write_text(f"{line}\n{{\n")
    cache = str(tmp_path / "cache")
    first = prepare(PromptsConfig(files=(str(before),), cache_dir=cache), model, progress=False)
    before.rename(after)
    second = prepare(PromptsConfig(files=(str(after),), cache_dir=cache), model, progress=False)
    assert second.directory == first.directory
    assert second.provenance(0) == (str(after), 1)
    assert second.report.examples["malformed record"][0].startswith(f"{after}:2: ")


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False)])
def test_samples_are_shown_in_colour_on_a_terminal_that_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_color, coloured: bool
) -> None:
    words = make_config(tmp_path, make_target(tmp_path / "target"), make_conversations(tmp_path / "p.jsonl"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    assert main(["prepare", *words, "--show", "1"]) == 0
    said = capsys.readouterr().out
    assert ("\x1b[32m" in said, "[[" in said) == (coloured, not coloured)
