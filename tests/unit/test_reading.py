# SPDX-License-Identifier: Apache-2.0
"""The commands that read run directories and the reference of the configuration."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from specdist.core.attempts import AttemptRecord, Ending, Failure, Started
from specdist_launch.cli import main


def make_run(path: Path, lr: float, failed: bool = False) -> AttemptRecord:
    record = AttemptRecord(path / "logs/local-1.0")
    record.begin(Started("local", ("a",), 2))
    for role, rank in (("target", 0), ("draft", 1)):
        log = record.directory / role / f"a-rank{rank}.log"
        log.parent.mkdir(parents=True)
        log.write_text("".join(f"{role} {line}\n" for line in range(40)))
    (path / "config.yaml").write_text(f"run: {{dir: {path}}}\noptimizer: {{lr: {lr}}}\ntrain: {{steps: 9}}\n")
    step = {"step": 5, "loss": 3.25, "tokens_per_s": 1234.5, "step_s": 1.0, "draft_wait": 0.0, "target_wait": 0.5}
    figures = [step, {"step": 5, "held_out/acceptance_length": 2.5}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(figure) + "\n" for figure in figures))
    (path / "checkpoints").mkdir()
    (path / "checkpoints/weights").write_text("many")
    if failed:
        record.fail(Failure("error", "two ranks are lost:\n  rank 0", 0, "target replica 0", "a", 5))
    else:
        record.end(Ending("finished", 9))
    return record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "one", 0.1)
    make_run(tmp_path / "sweep/two", 0.2, failed=True)
    return tmp_path


def test_runs_and_sweeps_of_a_folder_are_listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    _, one, two = capsys.readouterr().out.splitlines()
    assert one.split() == [f"{runs}/one", "5", "2.50", "finished", "at", "step", "9"]
    assert "rank 0 (target replica 0, host a): two ranks are lost: rank 0 (see" in two, "no text ends at a colon"
    assert main(["runs", str(runs / "nowhere")]) == 2


def test_what_cannot_be_read_is_a_line_and_hides_no_other_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another version, or another user's."""
    (runs / "one/status.json").write_text("{}")
    (metrics := runs / "sweep/two/metrics.jsonl").unlink()
    metrics.mkdir()
    make_run(runs / "three", 0.1)
    capsys.readouterr()
    assert main(["runs", str(runs)]) == 0
    _, one, two, three = capsys.readouterr().out.splitlines()
    assert f"cannot be read: {runs}/one/status.json: not what specdist writes" in one
    assert f"cannot be read: [Errno 21] Is a directory: '{metrics}'" in two
    assert "finished at step 9" in three
    assert main(["compare", str(runs / "three"), str(runs / "sweep/two")]) == 2
    assert capsys.readouterr().err.startswith(f"specdist: {metrics} cannot be used: Is a directory")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.ENOENT, errno.EBADF])
def test_an_error_of_the_system_that_may_be_a_defect_is_shown_whole(number: int, monkeypatch, capsys) -> None:
    def fail(_: object) -> None:
        raise OSError(number, os.strerror(number), "/of/a/user")

    monkeypatch.setattr("specdist.run.status.overview", fail)
    if number in (errno.ENOENT, errno.EBADF):
        with pytest.raises(OSError, match="/of/a/user"):
            main(["runs"])
    else:
        assert main(["runs"]) == 2
        assert f"specdist: /of/a/user cannot be used: {os.strerror(number)}" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_a_command_quietly(monkeypatch, capfd) -> None:
    def leave(_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("specdist.run.status.overview", leave)
    with monkeypatch.context() as kept:
        kept.setattr(os, "dup2", lambda *_: None)
        assert main(["runs"]) == 141
    assert capfd.readouterr().err == ""


def test_runs_are_compared_by_figures_and_by_the_keys_that_differ(runs: Path, capsys) -> None:
    assert main(["compare", str(runs / "one"), str(runs / "sweep/two")]) == 0
    said = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert said["loss"] == ["3.25", "3.25"]
    assert said["optimizer.lr"] == ["0.1", "0.2"]
    assert not {"train.steps", "run.dir"} & said.keys()
    (runs / "sweep/two/config.yaml").unlink()  # it ended before it was accepted
    assert main(["compare", str(runs / "one"), str(runs / "sweep/two")]) == 0
    assert re.search(r"^optimizer.lr +0.1$", capsys.readouterr().out, re.MULTILINE)
    (runs / "one/config.yaml").write_text("run: [")
    assert main(["compare", str(runs / "one"), str(runs / "sweep/two")]) == 2


def test_the_log_that_is_shown_is_that_of_the_rank_that_matters(runs: Path, capsys) -> None:
    assert main(["logs", str(runs / "one")]) == 0
    said = capsys.readouterr().out
    assert "draft 39" in said
    assert "draft 9\n" not in said
    assert main(["logs", str(runs / "sweep/two")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("specdist: rank 0 (target replica 0, host a): two ranks are lost")
    assert "target 39" in said
    make_run(runs / "three", 0.1).fail(Failure("lost", "silent", 5, "target replica 3 tp 0", "far"))
    assert main(["logs", str(runs / "three")]) == 0, "the rank that failed is of another world, and has its log there"
    assert "draft 39" in capsys.readouterr().out
    assert main(["logs", str(runs / "one"), "--rank", "7"]) == 2
    assert "has logs of ranks 0, 1" in capsys.readouterr().err


def test_a_bundle_has_records_and_logs_and_no_weights(runs: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "report.tar.gz"
    make_run(runs / "one/targets/7", 0.1)
    assert main(["bundle", str(runs / "one"), "--output", str(output)]) == 0
    with tarfile.open(output) as archive:
        names = set(archive.getnames())
    assert {"one/versions.txt", "one/config.yaml", "one/metrics.jsonl"} <= names
    assert {"one/logs/local-1.0/outcome.json", "one/logs/local-1.0/draft/a-rank1.log"} <= names
    assert "one/targets/7/logs/local-1.0/target/a-rank0.log" in names, "a target world's"
    assert not any("checkpoints" in name for name in names)


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ([], "run.dir = (required)    (str)"),
        (["optimizer.lr"], "optimizer.lr = 0.0001    (float)"),
        (["learning_rate"], "optimizer.lr = 0.0001    (float)"),
        (["learning", "rate"], "optimizer.lr = 0.0001    (float)"),
        (["tokenised", "kept"], "prompts.cache_dir = None    (str | None)"),
    ],
)
def test_keys_are_found_by_name_by_other_names_and_by_meaning(words: list[str], first: str, capsys) -> None:
    assert main(["keys", *words]) == 0
    heading, line, *_ = capsys.readouterr().out.splitlines()
    assert heading.startswith("# ")
    assert line == first


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("learning_rate=1", "optimizer.lr"),
        ("optimizer.gradient_norm=1", "optimizer.clip_norm"),
        ("train.step=1", "train.steps"),
    ],
)
def test_a_wrong_key_names_the_one_that_is_meant(word: str, right: str, capsys) -> None:
    assert main(["train", "run.dir=x", word]) == 2
    assert f"did you mean '{right}'?" in capsys.readouterr().err


def test_a_shell_completes_commands_and_keys(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    found = []
    for line in ("specdist comp", "specdist train optimizer.l"):
        told = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        output = tmp_path / "completions"
        told["_ARGCOMPLETE_STDOUT_FILENAME"] = str(output)
        subprocess.run([sys.executable, "-m", "specdist_launch.cli"], env=os.environ | told, timeout=300)
        found.append(output.read_text().split("\n"))
    assert [[word.strip() for word in words] for words in found] == [["compare"], ["optimizer.lr="]]


@pytest.mark.parametrize("words", ["report RUN", "bundle RUN"])
def test_where_nothing_can_be_written_is_told_before_anything_is_done(words: str, runs: Path, capsys) -> None:
    command = words.replace("RUN", str(runs / "one")).split()
    for output, told in (("/proc/x", "/proc cannot be written: "), ("/dev/null/x", "/dev/null cannot be written: ")):
        assert main([*command, "--output", output]) == 2
        assert capsys.readouterr().err.startswith(f"specdist: --output {output}: {told}")
