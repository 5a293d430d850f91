# SPDX-License-Identifier: Apache-2.0
"""What is said before an engine starts, what engines tell of drafts, and the verdict."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdist.core.config import Sources
from specdist.core.errors import ConfigError, DataError
from specdist.core.run_lock import Claim
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.eagle3.config import Eagle3Config
from specdist.export import ExportConfig, Trained, export_draft
from specdist.export.card import model_card
from specdist.export.serving import serve_commands
from specdist.generate import sglang_process, vllm
from specdist.generate.engine import Drafted
from specdist.job.config import load_job
from specdist.run import serving
from specdist.run.offline import evaluation_words
from specdist.run.serve_check import ServeCheck, prepare
from specdist.run.serve_report import ALL, SAME, Compared, ServeReport
from specdist.target.description import describe
from specdist.target.sglang import versions
from specdist.target.vocabulary import load_target_vocabulary
from specdist_launch import cli, local, words
from tests.tiny import make_config, make_conversations, make_target

DRAFT = draft_config(eagle3=Eagle3Config(layers=(0, 2, 4), ttt_length=3))

EVALUATION = {
    "acceptance_length": [1.1, 2.5],
    "speedup": [0.87, 1.2],
    "accepted": [0.1, 0.1],
    "answers": 2,
    "tokens": 9,
}


def prepared(words: list[str], engine: str | None, draft: str | None) -> ServeCheck:
    return prepare(load_job([], words), words, engine, draft)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an export, and its words."""
    directory = tmp_path_factory.mktemp("served")
    path = make_target(directory / "target")
    target = describe(path)
    draft = build_draft(DRAFT, target.config, load_target_vocabulary(target, torch.float32))
    trained = Trained(draft.state_dict(), torch.arange(target.vocab_size), target.config, str(path))
    for form in ("sglang", "speculators"):
        export_draft(directory / "run/export" / form, form, DRAFT, trained, ExportConfig())
    shutil.copytree(directory / "run/export/sglang", directory / "run/export/.sglang.replaced-7")  # of a killed export
    prompts, held = (make_conversations(directory / name, 6) for name in ("prompts.jsonl", "held.jsonl"))
    return directory, make_config(directory, path, prompts, prompts__holdout=f"[{held}]", evaluate__max_new_tokens=9)


@pytest.fixture
def here(monkeypatch):
    """An environment with engines of some versions, with a GPU, whose models hand out layers."""

    def have(sglang: str | None = "0.5.16", vllm_version: str | None = None, gpus: int = 1) -> None:
        monkeypatch.setattr(versions, "installed", lambda: sglang)
        monkeypatch.setattr(vllm, "installed", lambda: vllm_version)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    monkeypatch.setattr(serving, "hands_out_layers", lambda engine, architecture: True)
    monkeypatch.setattr(versions, "check_arguments", lambda names: None)
    have()
    return have


def test_a_draft_that_is_forecast_to_be_no_faster_is_served_with_a_word(run, tmp_path):
    directory, _ = run
    draft = shutil.copytree(directory / "run/export/sglang", tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    config["specdist"] |= {"draft_tokens": 1, "evaluation": EVALUATION}
    (draft / "config.json").write_text(json.dumps(config))
    told = "# forecast to be no faster than without a draft: 0.87x for one sequence"
    for command in serve_commands(draft):
        assert str(command).endswith(f"  {told}")
        assert command.lines().startswith(f"{told}\n")
        assert told not in " ".join(command.words)
    assert model_card(config, "draft").count(f"```sh\n{told}\n") == len(serve_commands(draft))
    assert all(
        "# " not in str(command) for draft_tokens in (2, 3) for command in serve_commands(draft, None, draft_tokens)
    )


def test_the_engine_is_the_one_asked_for_the_targets_or_the_one_that_is_there(run, here):
    directory, given = run

    def chosen(engine: str | None, *more: str) -> str:
        return prepared([*given, *more], engine, None).server.command.by.engine

    assert chosen(None) == "SGLang"
    here("0.5.16", "0.22.1")
    assert (chosen("vLLM"), chosen(None, "target.engine=sglang")) == ("vLLM", "SGLang")
    here(None, "0.22.1")
    check = prepared(given, None, None)
    assert check.server.command.by.engine == "vLLM"
    assert check.server.command.draft == str(directory / "run/export/sglang")
    assert f'draft.init_from="{check.server.command.draft}"' in check.replay
    assert len(check.server.prompts) == 6


@pytest.mark.parametrize(
    ("versions_here", "more", "engine", "said"),
    [
        ((None, None), [], None, r"nothing that serves this draft is installed here: SGLang, 0.5.12 or later \(pip in"),
        (("0.5.16", None), [], "vLLM", r"installed here: vLLM, 0.22 or later \(pip install vllm\)"),
        (("0.5.10", None), [], "SGLang", "SGLang 0.5.10 is installed, 0.5.16 to 0.5.23 are supported"),
        ((None, "0.10.2"), [], None, "vLLM 0.10.2 is installed, 0.22 and later serve such drafts"),
        (("0.5.16", None, 0), [], None, "target.tp=1: SGLang decodes with drafts on GPUs, .* here are 0"),
        (("0.5.16", None), ["target.tp=2"], None, "target.tp=2: SGLang decodes with drafts on GPUs, .* here are 1"),
        (("0.5.16", None), ["prompts.holdout=null"], None, "prompts.holdout is not set, and evaluate.prompts is empty"),
        (("0.5.16", None), ["run.dir=nowhere"], None, "run.dir=nowhere: nothing is exported there yet"),
        (("0.5.16", None), ["evaluate.max_new_tokens=600"], None, "all 6 prompts are too long"),
    ],
)
def test_what_cannot_be_checked_is_said_before_an_engine_starts(run, here, versions_here, more, engine, said):
    here(*versions_here)
    with pytest.raises((ConfigError, DataError), match=said):
        prepared([*run[1], *more], engine, None)


def test_a_draft_of_another_target_is_refused(run, here, tmp_path):
    other = make_target(tmp_path / "wide", hidden=48)
    with pytest.raises(ConfigError, match=r"export/sglang is no draft of .*wide: .*hidden_size is 32, 48 beside this"):
        prepared([*run[1], f"target.path={other}"], None, None)
    shallow = make_target(tmp_path / "shallow", layers=4)
    with pytest.raises(ConfigError, match=r"export/sglang is no draft of .*shallow: .*layers"):
        prepared([*run[1], f"target.path={shallow}", "draft.eagle3.layers=[0,1,2]"], None, None)


def test_a_draft_of_a_target_of_other_depth_is_refused(run, here, tmp_path):
    draft = shutil.copytree(run[0] / "run/export/sglang", tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"num_target_layers": 9}))
    with pytest.raises(ConfigError, match=r"is a draft of a target of 9 layers, and .* has 6"):
        prepared(run[1], None, str(draft))


def test_a_replay_knows_nothing_of_the_one_before(run, here, monkeypatch):
    check = prepared(run[1], None, None)
    before = check.folder / "replay/config.yaml"
    before.parent.mkdir(parents=True)
    before.write_text("draft: {init_from: elsewhere}")
    monkeypatch.setattr(local, "train", lambda given: int(before.exists()))
    assert local.evaluate(check.replay) == 0


def test_an_evaluation_empties_no_directory_that_is_in_use(run, tmp_path):
    directory, given = run
    words = [*given, f"run.dir={shutil.copytree(directory / 'run', tmp_path / 'run')}"]
    evaluation = tmp_path / "run/evaluation"
    evaluation.mkdir()
    (evaluation / "config.yaml").write_text("run: {dir: x}")
    with pytest.raises(ConfigError, match=r"--draft .*draft: every evaluation begins by emptying .*evaluation"):
        evaluation_words(load_job([], words), words, str(evaluation / "draft"))
    with Claim(evaluation, "7.0", "a"), pytest.raises(ConfigError, match=r"evaluation is in use: attempt 7\.0"):
        evaluation_words(load_job([], words), words, str(directory / "run/export/sglang"))
    assert (evaluation / "config.yaml").exists()


@pytest.mark.parametrize("how", [[], ["--decode"]])
def test_a_draft_to_be_evaluated_is_of_the_runs_algorithm(run, capsys, how):
    directory, given = run
    draft = str(directory / "run/export/sglang")
    dflash = ["draft.algorithm=dflash", "draft.dflash.layers=[0,2,4]", "draft.dflash.mask_token_id=0"]
    other = [word for word in given if "eagle3" not in word] + dflash
    assert cli.main(["eval", *how, *other, "--draft", draft]) == 2
    said = capsys.readouterr().err
    assert f"--draft: {draft} is no draft of " in said
    assert "one of draft.algorithm=eagle3, and the configuration says dflash" in said
    assert "init_from" not in said


@pytest.mark.parametrize("command", [["eval"], ["export", "--push", "org/new"]])
def test_a_run_without_exports_is_told_so(run, command, capsys):
    assert cli.main([*command, *run[1], "export.formats=[]"]) == 2
    assert "export.formats=[] leaves nothing to write" in capsys.readouterr().err


def test_an_engine_without_the_targets_hidden_states_is_refused(run, here, monkeypatch):
    monkeypatch.setattr(serving, "hands_out_layers", lambda engine, architecture: False)
    with pytest.raises(ConfigError, match=r"SGLang 0\.5\.16 gives no hidden states of LlamaForCausalLM"):
        prepared(run[1], None, None)


def test_models_of_engines_are_read_without_importing_them(tmp_path, monkeypatch):
    folders = {"sglang": "srt/models", "vllm": "model_executor/models"}
    for package, folder in folders.items():
        (tmp_path / package / folder).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise ImportError")
    (tmp_path / "sglang/srt/models/a.py").write_text(
        "class Llama(nn.Module):\n    def set_eagle3_layers_to_capture(self): ...\n\nclass Plain(nn.Module):\n    ...\n"
    )
    (tmp_path / "sglang/srt/models/b.py").write_text("class Mistral(Llama):\n    pass\n")
    (tmp_path / "vllm/model_executor/models/a.py").write_text(
        "class Llama(\n    nn.Module, SupportsLoRA, SupportsEagle3\n):\n    pass\nclass Old(nn.Module):\n    pass\n"
        "class New[T](nn.Module, SupportsEagle3):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {name: serving.hands_out_layers("SGLang", name) for name in ("Llama", "Mistral", "Plain", "Other")}
    assert found == {"Llama": True, "Mistral": True, "Plain": False, "Other": None}
    assert [serving.hands_out_layers("vLLM", name) for name in ("Llama", "Old", "New")] == [True, False, True]


def test_engines_tell_of_drafts_in_their_own_ways():
    about = {"spec_verify_ct": 10, "spec_accept_histogram": [4, 3, 0, 3]}
    assert sglang_process.drafted(about) == {"forwards": 10, "accepted": [6, 3, 3]}
    assert sglang_process.drafted({"spec_verify_ct": 10}) == {"forwards": 10, "accepted": None}
    assert sglang_process.drafted({}) is None
    drafts = SimpleNamespace(name="vllm:spec_decode_num_drafts", value=10)
    positions = SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[6, 3, 3])
    assert vllm.drafted([drafts, positions]) == {"forwards": 10, "accepted": [6, 3, 3]}
    assert vllm.drafted([drafts]) == {"forwards": 10, "accepted": None}
    assert vllm.drafted([]) is None


def test_vllm_leaves_room_to_others_on_its_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch of two GPUs, the second one half in use: what is free there may be less when vLLM has started."""
    (tmp_path / "torch.py").write_text("class cuda:\n    mem_get_info = lambda gpu: ((99, 100), (60, 100))[gpu]\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert vllm.memory_share(1) == pytest.approx(0.92 * 0.99)
    assert vllm.memory_share(2) == pytest.approx(0.3)


def test_the_verdict(run):
    command = next(c for c in serve_commands(run[0] / "run/export/sglang") if c.by.engine == "SGLang")
    compared = {ALL: Compared(100, 9000, 2.3, 2.4), SAME: Compared(80, 6000, 2.39, 2.4)}
    report = ServeReport(
        command,
        "0.5.16",
        Drafted(3000, [1500, 600]),
        compared,
        [0.5, 0.2, 0.1],
        80,
        "x.jsonl:3, token 9",
        7,
        0.01,
        5000,
    )
    assert report.right
    assert "served as evaluated: -0.42% over same text" in report.render()
    assert "80 of 100 texts are those of plain decoding; the first that is not: x.jsonl:3" in report.render()
    assert "7 prompts were left out" in report.render()
    assert report.positions == [0.5, 0.2, 0.0]
    few = replace(report, least_tokens=7000)
    assert (few.judged, few.right) == (ALL, False)
    assert "NOT served as evaluated: -4.17% over all texts" in few.render()
    fewer = replace(report, least_tokens=10_000)
    assert (fewer.judged, fewer.right) == (None, False)
    assert "not judged: 9,000 tokens, and 10,000 are needed: raise evaluate.limit" in fewer.render()
    silent = replace(report, total=Drafted(3000), compared={ALL: compared[ALL]})
    assert "SGLang 0.5.16 does not say which drafts were accepted" in silent.render()
    assert json.loads(json.dumps(report.to_dict()))["compared"][SAME]["difference"] == pytest.approx(-0.01 / 2.4)
    assert str(command) in report.to_dict()["command"]
    assert Path(command.draft).is_dir()


@pytest.mark.parametrize("name", ["null", "[a]", "1e3", "two\nlines", "ü b", "lr=1e-3"])
def test_a_run_directory_stands_for_its_configuration(tmp_path, name):
    (run := tmp_path / name).mkdir()
    files, (given, *others) = words.split([str(run), "x.yaml", "train.steps=1"])
    assert (files, others) == ([f"{run}/config.yaml", "x.yaml"], ["train.steps=1"])
    assert Sources([], [given]).value("run.dir") == str(run)


NUMBER = b'{"dflash_config": {"rope_scaling": {"full_attention": {"factor": NaN}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is of no draft: Expected `object`, got `array`"),
        (b'{"hidden_size": "64"}', "Expected `int | null`, got `str` - at `$.hidden_size`"),
        (b'{"architectures": [null]}', "Expected `str`, got `null` - at `$.architectures"),
        (b'{"specdist": {"draft_tokens": 0}}', "Expected `int` >= 1 - at `$.specdist.draft_tokens`"),
        (NUMBER, "Expected `float` > 0.0 - at `$.dflash_config.rope_scaling.full_attention.factor`"),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(DataError, match=f"{tmp_path}/config.json .*{re.escape(message)}"):
        serve_commands(tmp_path)
