# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in one process: commit markers, rotation, and what a kill leaves behind."""

import errno
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from specdist.core.errors import ConfigError, DataError, DiskError
from specdist.core.progress import (
    COMMIT,
    CheckpointConfig,
    Cursor,
    Evaluated,
    Progress,
    best_checkpoint,
    best_intact,
    committed,
    damage,
    read_progress,
)
from specdist.run.drafts import load_state
from specdist.training import checkpoint
from specdist.training.checkpoint import Checkpointer
from specdist.training.config import OptimizerConfig
from specdist.training.dcp import SummedFile
from specdist.training.optimizer import DraftOptimizer


@pytest.fixture(scope="module")
def group():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Model(nn.Linear):
    """What a checkpoint is told of a draft."""

    def matrices(self) -> list[str]:
        return ["weight"]


def state(**options):
    torch.manual_seed(0)
    model = Model(4, 3)
    optimizer = DraftOptimizer(model, OptimizerConfig(**options))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step(0, 2)
    return model, optimizer


def progress(step: int) -> Progress:
    return Progress(step, 2 * step, Cursor(0, 3 * step), "prompts")


def test_what_an_evaluation_finds_later_is_noted_and_all_else_stays(tmp_path, group):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), group, 0)
    checkpointer.save(*state(), progress(2))
    found = Evaluated(2, 1.5, 0.5)
    checkpointer.note(found)  # it may not be written yet
    checkpointer.finish()
    (path,) = committed(tmp_path)
    assert read_progress(path) == replace(progress(2), evaluated=found)
    assert best_checkpoint(tmp_path, "acceptance_length") == path
    assert not damage(path)
    checkpointer.note(Evaluated(3, 1.5, 0.5))  # of a checkpoint that is not there
    assert committed(tmp_path) == [path]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_comes_back_and_the_last_are_kept(tmp_path, group, asynchronous):
    model, optimizer = state()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=2, asynchronous=asynchronous), group, 0)
    for step in (1, 2, 3):
        with torch.no_grad():
            model.bias.fill_(step)
        checkpointer.save(model, optimizer, progress(step))
    checkpointer.finish()
    assert [path.name for path in committed(tmp_path)] == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    expected = torch.rand(3)
    other = Model(4, 3)
    other_optimizer = DraftOptimizer(other, OptimizerConfig())
    assert checkpointer.load(committed(tmp_path)[-1], other, other_optimizer) == progress(3)
    assert torch.equal(other.bias, torch.full((3,), 3.0))
    moments = other_optimizer.parts[0].state[other.weight]["exp_avg"]
    assert torch.equal(moments, optimizer.parts[0].state[model.weight]["exp_avg"])
    assert torch.equal(torch.rand(3), expected)  # the random state is that of the last save


@pytest.mark.parametrize("allowed", range(5))  # before the directory, the shard, the metadata, its name, the marker
def test_what_another_start_may_have_begun_to_write_is_left_alone(tmp_path, group, allowed):
    looks = iter(range(10))

    def fence():
        if next(looks) >= allowed:
            path.mkdir(exist_ok=True)
            (path / "of another start").touch()
            raise ConfigError("another start has taken it")

    path = tmp_path / "step-00000001"
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False), group, 0, fence=fence)
    with pytest.raises(ConfigError, match="another start"):
        checkpointer.save(*state(), progress(1))
    assert not committed(tmp_path)
    assert (path / "of another start").exists()
    written = {file.name for file in path.iterdir()} - {"of another start"}
    named = [set(), set(), {"__0_0.distcp"}, {"__0_0.distcp", ".metadata.tmp"}, {"__0_0.distcp", ".metadata"}]
    assert written == named[allowed]


def test_a_checkpoint_without_its_marker_does_not_exist(tmp_path, group):
    model, optimizer = state()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False), group, 0)
    checkpointer.save(model, optimizer, progress(1))
    checkpointer.save(model, optimizer, progress(2))
    (tmp_path / "step-00000002" / COMMIT).unlink()  # killed before the last write
    assert [path.name for path in committed(tmp_path)] == ["step-00000001"]
    with pytest.raises(DataError, match="not a complete checkpoint"):
        read_progress(tmp_path / "step-00000002")
    checkpointer.save(model, optimizer, progress(2))  # the remains are in nobody's way
    assert read_progress(committed(tmp_path)[-1]) == progress(2)


@pytest.mark.parametrize("harm", ["cut off", "missing", "no metadata"])
def test_damage_is_named(tmp_path, group, harm):
    model, optimizer = state()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False), group, 0)
    checkpointer.save(model, optimizer, progress(1))
    checkpointer.finish()
    (path,) = committed(tmp_path)
    data = path / ".metadata" if harm == "no metadata" else next(path.glob("*.distcp"))
    if harm == "cut off":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    else:
        data.unlink()
    for read in (lambda: checkpointer.load(path, model, optimizer), lambda: load_state(model, path)):
        with pytest.raises(DataError, match=r"the checkpoint .*step-00000001 is damaged \(.*\): remove it") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", ["a bit", "cut off", "missing", "the marker"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, group, harm, capsys):
    model, optimizer = state()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False), group, 0)
    for step in (1, 2):
        checkpointer.save(model, optimizer, progress(step))
    older, newer = committed(tmp_path)
    assert best_intact(tmp_path, "loss") == newer
    data = newer / COMMIT if harm == "the marker" else next(newer.glob("*.distcp"))
    whole = bytearray(data.read_bytes())
    if harm == "a bit":  # in the middle of a tensor, where torch itself sees nothing
        whole[whole.index(model.weight.detach().numpy().tobytes()) + 9] ^= 1
        data.write_bytes(whole)
        checkpointer.load(newer, *state())
    elif harm == "missing":
        data.unlink()
    else:
        data.write_bytes(whole[: len(whole) // 2])
    assert best_intact(tmp_path, "loss") == older
    words = {
        "a bit": "has other contents",
        "cut off": "has",
        "missing": "No such file",
        "the marker": "no commit marker",
    }
    said = capsys.readouterr().err
    assert said.startswith(f"specdist: the checkpoint {newer} is damaged: ")
    assert words[harm].replace("no commit", "not a commit") in said
    (older / ".metadata").unlink()
    with pytest.raises(DataError, match=r"all checkpoints in .* are damaged: remove them to begin anew"):
        best_intact(tmp_path, "loss")


class Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("where", ["the metadata", "a value of the optimizer"])
def test_a_foreign_checkpoint_runs_no_code(tmp_path, group, where):
    model, optimizer = state()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False), group, 0)
    checkpointer.save(model, optimizer, progress(1))
    (path,), mark = committed(tmp_path), tmp_path / "code has run"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    if where == "the metadata":
        metadata.planner_data["x"] = Malicious(mark)
    else:
        torch.save(Malicious(mark), path / "x.distcp")
        place = next(v for k, v in metadata.storage_data.items() if k.fqn.endswith("betas"))
        place.relative_path, place.offset, place.length = "x.distcp", 0, (path / "x.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DataError, match=r"the checkpoint .*step-00000001 is damaged \(.*\): remove it"):
        checkpointer.load(path, model, optimizer)
    if where == "the metadata":
        with pytest.raises(DataError, match=r"asks for pathlib\S*\.Path\.touch, which is no part of a checkpoint"):
            load_state(model, path)
    assert not mark.exists()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as a test says."""
    played = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: played.now))
    return played


def test_a_save_that_fails_is_told_and_tried_again_until_it_is_given_up(tmp_path, group, monkeypatch, clock):
    (model, optimizer), told = state(), []
    config = CheckpointConfig(every_s=0, give_up_s=2)
    checkpointer = Checkpointer(tmp_path, config, group, 0, told.append)
    checkpointer.begin(0)
    assert (checkpointer.saved_step, checkpointer.due) == (0, False)

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_and_wait(step: int) -> None:
        checkpointer.save(model, optimizer, progress(step))
        checkpointer.finish()

    disk = pytest.MonkeyPatch()
    disk.setattr(SummedFile, "write", full)
    save_and_wait(1)
    assert checkpointer.saved_step == -1
    assert not list(tmp_path.iterdir())  # nothing half-written takes the room of the next try
    (words,) = told
    assert words.startswith(
        f"step 1 could not be saved in {tmp_path}: OSError: [Errno 28] No space left on device; tried"
    )
    assert not checkpointer.due
    clock.now += checkpointer.retry_s
    assert checkpointer.due
    disk.undo()
    save_and_wait(2)
    assert (checkpointer.saved_step, checkpointer.due, told[1:]) == (2, False, [""])
    assert committed(tmp_path) == [tmp_path / "step-00000002"]
    monkeypatch.setattr(SummedFile, "write", full)
    save_and_wait(3)
    clock.now += config.give_up_s
    with pytest.raises(DiskError, match=r"step 4 could not be saved in .*; this has gone on for 2 s"):
        save_and_wait(4)
    assert committed(tmp_path) == [tmp_path / "step-00000002"]


@pytest.mark.parametrize("harm", ["protected", "unreadable"])
def test_an_old_checkpoint_that_cannot_be_touched_costs_no_new_one(tmp_path, group, monkeypatch, harm):
    model, optimizer = state()
    told, unlink, read_text = list[str](), Path.unlink, Path.read_text
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=1), group, 0, told.append)

    def refusing(does, wanted):
        def instead(path, *args, **options):
            if harm == wanted and path.parent.name == "step-00000001":
                raise PermissionError(errno.EACCES, "Permission denied")
            return does(path, *args, **options)

        return instead

    for step in range(1, 5):
        checkpointer.save(model, optimizer, progress(step))
        checkpointer.finish()
        monkeypatch.setattr(Path, "unlink", refusing(unlink, "protected"))
        monkeypatch.setattr(Path, "read_text", refusing(read_text, "unreadable"))
    assert (checkpointer.saved_step, told) == (4, [])
    names = [path.name for path in committed(tmp_path)]
    assert names == [*["step-00000001"] * (harm == "protected"), "step-00000004"]


def test_a_file_server_that_is_away_is_told_where_something_is_in_the_way_of_a_checkpoint(tmp_path, group, monkeypatch):
    (model, optimizer), told = state(), list[str]()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every_s=0), group, 0, told.append)

    def away(path, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as server:
        server.setattr(Path, "unlink", away)
        checkpointer.save(model, optimizer, progress(1))
    assert told[0].startswith(f"step 1 could not be saved in {tmp_path}: OSError: [Errno 116] Stale file handle; tried")
    checkpointer.save(model, optimizer, progress(2))
    checkpointer.finish()
    assert (checkpointer.saved_step, told[1:]) == (2, [""])


def test_a_checkpoint_is_due_by_the_clock(tmp_path, group, clock):
    model, optimizer = state()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every_s=0.5), group, 0)
    checkpointer.begin(0)
    assert not checkpointer.due
    clock.now = 0.5
    assert checkpointer.due
    checkpointer.save(model, optimizer, progress(1))
    assert not checkpointer.due
    checkpointer.finish()


def test_a_strange_marker_is_named(tmp_path):
    (tmp_path / COMMIT).write_text("{}")
    with pytest.raises(DataError, match="is not a commit marker"):
        read_progress(tmp_path)


def test_weights_load_without_a_process_group(tmp_path, group):
    model, optimizer = state()
    Checkpointer(tmp_path, CheckpointConfig(asynchronous=False), group, 0).save(model, optimizer, progress(1))
    found = load_state(nn.Linear(4, 3), committed(tmp_path)[0])
    assert torch.equal(found["weight"], model.weight.detach())


def test_muon_and_the_moving_average_come_back_and_the_average_is_served(tmp_path, group):
    model, optimizer = state(method="muon", ema=0.9, lr=0.1)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False), group, 0)
    checkpointer.save(model, optimizer, progress(1))
    (path,) = committed(tmp_path)
    other = Model(4, 3)
    other_optimizer = DraftOptimizer(other, OptimizerConfig(method="muon", ema=0.9, lr=0.1))
    checkpointer.load(path, other, other_optimizer)
    for one, its in ((model, optimizer), (other, other_optimizer)):
        one(torch.arange(8.0).view(2, 4)).square().sum().backward()
        its.step(1, 2)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other_optimizer.average["weight"], optimizer.average["weight"])
    found = load_state(Model(4, 3), path)
    assert not torch.equal(found["weight"], model.weight.detach())
    with optimizer.averaged():
        assert not torch.equal(found["weight"], model.weight.detach())  # of the step after
