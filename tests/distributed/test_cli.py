# SPDX-License-Identifier: Apache-2.0
"""The command line as a user goes through it: train, evaluate, export, and a bad word at each of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from specdist.core.files import to_json
from specdist.evaluate.replay import ReplayReport
from specdist.export import load_exported
from specdist.generate.files import Manifest, Source, Tally
from specdist_launch.cli import main
from tests.distributed.worlds import ROOT, specdist, torchrun
from tests.tiny import make_config, make_conversations, make_target


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one draft rank that has one conversation: of two shards one would be empty."""
    directory = tmp_path_factory.mktemp("cli")
    target, prompts = make_target(directory / "target"), make_conversations(directory / "prompts.jsonl", count=1)
    held = make_conversations(directory / "held.jsonl", count=2, seed=1)
    evaluation = {"prompts__holdout": f"[{held}]", "evaluate__max_new_tokens": 12, "checkpoint__every": 2}
    words = make_config(directory, target, prompts, world__mode="colocated", draft__dp=1, **evaluation)
    done = specdist("train", *words)
    assert done.returncode == 0, done.stderr
    return directory, words, done.stderr


def test_train_says_what_came_of_it(trained):
    directory, _, said = trained
    summary = json.loads((directory / "run/summary.json").read_text())
    assert summary["finished"]
    assert {"launching", "importing", "prompts", "evaluating", "the first step"} <= summary["start_up"].keys()
    assert summary["evaluation"]["after"]["step"] == 4
    for part in (
        "Trained 4 steps",
        "acceptance length",
        "before training",
        "draft side",
        "bottleneck",
        "export/sglang",
    ):
        assert part in said


def test_eval_takes_the_checkpoint_or_an_export(trained, tmp_path, capsys):
    _, words, _ = trained
    directory, report = Path(words[0].partition("=")[2]), tmp_path / "report.json"
    # fp32, so that the export is the checkpoint bit for bit
    assert main(["export", *words, "export.dtype=float32", "--output", str(tmp_path / "out")]) == 0
    prompts = f"evaluate.prompts=[{directory.parent / 'held.jsonl'}]"
    assert main(["eval", "--decode", *words, prompts, "--output", str(report)]) == 0
    of_checkpoint = json.loads(report.read_text())
    for name in ("sglang", "speculators"):
        draft = ["--draft", str(tmp_path / "out" / name)]
        assert main(["eval", "--decode", *draft, *words, prompts, "--output", str(report)]) == 0
        of_export = json.loads(report.read_text())
        assert of_export["accepted"] == of_checkpoint["accepted"]
        assert load_exported(tmp_path / "out" / name).captured_layers == (0, 2, 4)
    assert "acceptance length" in capsys.readouterr().out
    done = specdist("eval", *draft, *words, "--output", str(report))
    assert done.returncode == 0, done.stderr
    during = json.loads((directory / "evaluations/step-00000004.json").read_text())
    assert json.loads(report.read_text())["labels"] == during["labels"]
    assert "by replay of held-out text" in done.stderr


def test_an_export_says_what_it_is(trained, capsys):
    directory, words, _ = trained
    exports = directory / "run/export"
    for folder in (exports / "sglang", exports / "speculators"):
        ours = json.loads((folder / "config.json").read_text())["specdist"]
        assert (ours["run"], ours["step"], ours["data"]) == ("run", 4, [str(directory / "prompts.jsonl")])
        assert ours["configuration"]["draft.eagle3.layers"] == [0, 2, 4]
        assert len(ours["evaluation"]["acceptance_length"]) == len(ours["evaluation"]["accepted"])
        card = (folder / "README.md").read_text()
        for part in ('license: "unknown"', "| step | 4 |", f"| 1 | {ours['evaluation']['acceptance_length'][0]:.2f} |"):
            assert part in card
        assert f'"model": "{folder}"' in card
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask()}
    before = (exports / "sglang/config.json").read_text()
    assert main(["export", *words, "--checkpoint", "2"]) == 0
    said = capsys.readouterr()
    assert f"specdist: checkpoint {directory / 'run/checkpoints/step-00000002'}\n" in said.err
    written, *_ = said.out.splitlines()
    assert Path(written) == exports / "step-00000002/sglang"
    assert json.loads((Path(written) / "config.json").read_text())["specdist"]["step"] == 2
    assert (exports / "sglang/config.json").read_text() == before
    for missing in ("3", str(directory / "run/checkpoints/step-00000003")):
        assert main(["export", *words, "--checkpoint", missing]) == 2
        said = capsys.readouterr().err
        assert "is no complete checkpoint, by directory or by step; " in said
        assert "run/checkpoints has step-00000002, step-00000004" in said


def test_of_a_damaged_checkpoint_the_one_before_is_exported_and_evaluated(trained, tmp_path, capsys):
    directory, words, _ = trained
    newest = directory / "run/checkpoints/step-00000004"
    data = next(newest.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        for command in (["export", "--output", str(tmp_path)], ["eval", "--decode"]):
            assert main([*command[:1], *words, *command[1:]]) == 0
            said = capsys.readouterr().err
            assert f"specdist: the checkpoint {newest} is damaged: {data.name} has other contents" in said
        assert json.loads((tmp_path / "sglang/config.json").read_text())["specdist"]["step"] == 2
    finally:
        data.write_bytes(whole)


def umask():
    os.umask(found := os.umask(0))
    return found


def test_an_empty_shard_trains_as_if_it_were_not_there(trained, tmp_path):
    directory, words, _ = trained
    changed = [w for w in words if not w.startswith(("run.dir", "draft.dp", "world.mode", "prompts.holdout"))]
    done = specdist("train", *changed, f"run.dir={tmp_path / 'run'}", "draft.dp=2")
    assert done.returncode == 0, done.stderr
    one, two = (
        [r["loss"] for r in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
        for path in (directory / "run", tmp_path / "run")
    )
    assert two == pytest.approx(one, rel=1e-6)


def test_a_prompt_that_cannot_be_decoded_is_told(trained, tmp_path, capsys):
    _, words, _ = trained
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "good night"}\n{"prompt": 3}\n')
    assert main(["eval", "--decode", *words, f"evaluate.prompts=[{held}]"]) == 2
    assert f"evaluate.prompts: {held}:2: not text: the prompt is 3" in capsys.readouterr().err


def test_another_draft_than_the_trained_one_is_neither_exported_nor_evaluated(trained, tmp_path, capsys):
    _, words, _ = trained
    for command in ("export", "eval"):
        assert main([command, *words, "draft.eagle3.layers=[1,2,3]"]) == 2
        assert "was trained with other values of draft.eagle3.layers: give those" in capsys.readouterr().err
    assert main(["eval", "--decode", *words, "--output", str(tmp_path / "nowhere/report.json")]) == 2
    assert "--output" in capsys.readouterr().err


def test_a_finished_run_keeps_its_figures(trained):
    directory, words, _ = trained
    summary = directory / "run/summary.json"
    before = json.loads(summary.read_text())
    done = specdist("train", *words)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 steps are done, nothing to train" in done.stderr
    assert "nothing was left to train" in done.stderr
    assert "tokens/s trained" not in done.stderr
    after = json.loads(summary.read_text())
    assert (after["training"], after["sides"]) == (before["training"], before["sides"])
    assert after["training"]["steps"] == 4


def test_an_export_asks_for_the_drafts_that_are_forecast_fastest(trained):
    directory, _, said = trained
    found = ReplayReport.from_dict(json.loads((directory / "run/evaluations/step-00000004.json").read_text()))
    config = json.loads((directory / "run/export/sglang/config.json").read_text())
    assert config["specdist"]["draft_tokens"] == found.fastest == found.speedups.index(max(found.speedups)) + 1
    assert f"--speculative-num-steps {found.fastest} " in said


def test_a_job_is_checked_without_being_started(trained, tmp_path, capsys):
    _, words, _ = trained
    new = [*words, f"run.dir={tmp_path / 'run'}"]
    assert main(["check", *new]) == 0
    assert "ok      prompts: 1 files, about " in capsys.readouterr().out
    assert main(["check", *new, f"prompts.files=[{tmp_path}/none.jsonl]"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  prompts: prompts.files" in said
    assert said.count("ok  ") == 5
    assert main(["check", *new, f"prompts.holdout=[{tmp_path}/none.jsonl]"]) == 1
    assert "FAILED  held out: prompts.holdout: no file matches" in capsys.readouterr().out
    (asked := tmp_path / "asked.jsonl").write_text('{"prompt": "Hi"}\n{"turns": ["Hi", "And?"]}\n{"a": 1}\n')
    records = ({"prompt": "Hi", "response": text} for text in ("Ho", "Ho " * 3000))
    (lengths := tmp_path / "lengths.jsonl").write_text("\n".join(map(json.dumps, records)))
    skipped = [f"prompts.files=[{lengths}]", "prompts.overlong=skip", "prompts.max_bad_fraction=0.1"]
    assert main(["check", *new, *skipped, "prompts.holdout=null"]) == 0, "what is too long is not bad"
    capsys.readouterr()
    answered = [*new, f"prompts.files=[{asked}]", "prompts.answers=target", "prompts.max_bad_fraction=0.5"]
    assert main(["check", *answered]) == 0
    assert "1 files; of the first records the target can answer 2, 1 cannot" in capsys.readouterr().out
    assert main(["plan", *answered, "train.steps=null"]) == 0
    assert "steps: not estimated, for the prompts have no answers yet" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    (answers := tmp_path / "run/answers").mkdir(parents=True)
    written = Manifest({}, (Source(str(asked), "jsonl", False, "asked.jsonl", ""),), Tally(1))
    (answers / "manifest.json").write_text(to_json(written))
    (answers / "asked.jsonl").write_text('{"prompt": "Hi", "response": "Ho"}\n')
    assert main(["plan", *answered, "train.steps=null"]) == 0
    assert "steps: about 1 of " in capsys.readouterr().out, "of the answers, once they are there"


def test_a_run_directory_belongs_to_one_job(trained, capsys):
    _, words, _ = trained
    assert main(["train", *words, "draft.eagle3.ttt_length=2", "run.seed=5"]) == 2
    assert "holds a run with other values of run.seed, draft.eagle3.ttt_length" in capsys.readouterr().err


def test_a_cache_of_compiled_code_that_cannot_be_is_an_error_of_the_input(trained, tmp_path, capsys):
    directory, words, _ = trained
    wrong = [f"run.dir={tmp_path / 'run'}", f"run.compile_cache={directory / 'prompts.jsonl'}/compiled"]
    assert main(["train", *words, *wrong]) == 2
    assert "run.compile_cache=" in capsys.readouterr().err
    assert not (tmp_path / "run/logs").exists()  # no rank was started
    files = [part for word in words if "=" not in word for part in ("--config", word)]
    keys = [word for word in words if "=" in word]
    done = torchrun(1, ["-m", "specdist.train", *files, *keys, *wrong])
    (record,) = (tmp_path / "run/logs").glob("*/failure.json")
    failure = json.loads(record.read_text())
    assert (failure["kind"], failure["exception"]) == ("input", "ConfigError"), done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["plan", "configs/quickstart.yaml", "draft.eagle3.ttt=3"], "did you mean 'draft.eagle3.ttt_length'?"),
        (["eval", "configs/quickstart.yaml", "prompts.holdout=null"], "prompts.holdout is not set"),
        (["export", "configs/quickstart.yaml", "run.dir=nowhere/run"], "there is no complete checkpoint in"),
        (
            ["export", "configs/quickstart.yaml", "--checkpoint", "nowhere"],
            "is no complete checkpoint, by directory or by step",
        ),
        (["eval", "configs/quickstart.yaml", "--output", "nowhere/a.json"], "cannot be written: No such file"),
        (["eval", "configs/quickstart.yaml", "--output", "configs"], "--output configs is a directory: give a file"),
        (["export", "configs/quickstart.yaml", "--output", "a\udcff"], r"/a\udcff' is not UTF-8: choose another"),
        (["export", "configs/quickstart.yaml", "--output", "/proc/x"], "--output /proc/x: /proc cannot be written: "),
        (["doctor", "configs/quickstart.yaml", "--json", "/proc/x"], "--json /proc/x: /proc cannot be written: "),
    ],
)
def test_bad_words_get_one_clear_line(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("specdist: ")
    assert error.count("\n") == 1
