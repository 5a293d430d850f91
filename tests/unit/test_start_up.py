# SPDX-License-Identifier: Apache-2.0
"""What the time to the first step went to, as a rank notes it."""

import os
import pwd
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from specdist.core.attempts import AttemptRecord, Started
from specdist.core.errors import ConfigError
from specdist.core.launch_env import keep_compiled
from specdist.run import start_up
from specdist.run.start_up import Part, StartUp, last_to_start
from specdist_launch import local
from tests.tiny import make_config, make_conversations, make_target


def test_the_time_to_the_first_step(tmp_path, monkeypatch):
    now, record = [130.0], AttemptRecord(tmp_path / "logs/7.0")
    record.begin(Started("local", ("a",), 3, time=104.0, launched=100.0))
    monkeypatch.setattr(start_up.time, "time", lambda: now[0])
    assert last_to_start(record) is None
    clock = StartUp(Part("importing", 105.0), Part("prompts", 119.0))
    clock.begin("loading the target")
    now[0] = 131.0
    clock.write(record, 1, "draft dp 0 cp 0", "a")
    begun = last_to_start(record)
    assert begun is not None
    assert begun.cpu_s > 0
    assert begun.told() == ("31.0 s until work began: importing 14.0 s, prompts 11.0 s, launching 4.0 s, other 2.0 s")
    StartUp(Part("importing", 105.0)).write(record, 0, "target replica 0 tp 0", "a")  # at work as soon
    now[0] = 151.0
    clock.stepped(evaluated_s=5.0)
    start = last_to_start(record)
    assert start is not None
    assert dict(start.took()) == {
        "launching": 4.0, "starting the ranks": 1.0, "importing": 14.0, "prompts": 11.0, "loading the target": 1.0,
        "evaluating": 5.0, "compiling": 0.0, "the first step": 15.0,
    }  # fmt: skip
    assert "51.0 s to the first step: the first step 15.0 s, importing" in start.told()


def test_prompts_that_the_command_prepares_are_no_launching(tmp_path, monkeypatch):
    record = AttemptRecord(tmp_path / "logs/7.0")
    record.begin(Started("local", ("a",), 3, time=104.0, launched=60.0, prompts_s=40.0))
    monkeypatch.setattr(start_up.time, "time", lambda: 109.0)
    StartUp(Part("importing", 105.0)).write(record, 0, "draft dp 0 cp 0", "a")
    assert last_to_start(record).told() == (
        "49.0 s until work began: preparing the prompts 40.0 s, launching 4.0 s, importing 4.0 s, other 1.0 s"
    )


def test_what_is_compiled_is_kept_where_others_find_it(tmp_path, monkeypatch):
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").write_text("no directory")
    keep_compiled(None, "2.13.0")  # the default cannot be: torch has places of its own
    with monkeypatch.context() as homeless:
        homeless.delenv("HOME")
        homeless.setattr(pwd, "getpwuid", {}.__getitem__)
        keep_compiled(None, "2.13.0")
    assert not os.environ.keys() & set(names)
    with pytest.raises(ConfigError, match=r"run.compile_cache=\S+home/kept cannot be written"):
        keep_compiled(str(tmp_path / "home/kept"), "2.13.0")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/own")  # the user's word
    keep_compiled(str(tmp_path / "kept"), "2.13.0")
    (folder,) = (tmp_path / "kept").iterdir()
    assert folder.name.startswith("torch-2.13.0-")
    assert [os.environ[name] for name in names] == [f"{folder}/inductor", "/own"]


def test_what_torch_has_written_into_the_environment_of_the_launcher_is_nobodys_word(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as the import of torch._dynamo does
    monkeypatch.setenv("TRITON_CACHE_DIR", "/own")
    keep_compiled(str(tmp_path), "2.13.0")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))


def test_what_is_compiled_is_told_apart(tmp_path):
    """Of an evaluation before the first step, too; what was compiled before the work began is not."""
    record = AttemptRecord(tmp_path / "logs/7.0")
    clock = StartUp(Part("importing", time.time()))
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
    assert "torch._dynamo" in sys.modules
    client, said = SimpleNamespace(phase="training on batch 0"), list[str]()
    clock.watch_compiler(client)
    clock.write(record, 1, "draft dp 0 cp 0", "a")

    def backend(graph, _):
        said.append(client.phase)
        return graph

    torch.compile(lambda x: x + 2, backend=backend)(torch.zeros(1))
    assert (said, client.phase) == (["compiling (training on batch 0)"], "training on batch 0")
    evaluated = start_up.time.time() - clock.kept.ended
    clock.stepped(evaluated)
    took = dict(last_to_start(record).took())
    assert took["compiling"] > 0
    assert took["compiling"] + took["evaluating"] == pytest.approx(evaluated, abs=1e-3)


def test_a_start_begins_with_its_command_not_with_the_process(tmp_path, monkeypatch):
    """A script that sets everything up, and then becomes the command, is that process too."""
    words = make_config(
        tmp_path, make_target(tmp_path / "target"), make_conversations(tmp_path / "prompts.jsonl"), draft__dp=1
    )
    started: dict[str, float] = {}
    monkeypatch.setattr(local, "start", lambda *_, ranks=0, retries, role, **told: started.update(told) or 0)
    before = time.time()
    assert local.train(words) == 0
    assert before <= started["launched"] <= started["launched"] + started["prompts_s"] <= time.time()
    assert started["prompts_s"] > 0
