# SPDX-License-Identifier: Apache-2.0
"""The answers in a world: whoever leads a replica writes some of them, and rank 0 puts them together."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
import torch.distributed as dist

from specdist.core.errors import ConfigError, say
from specdist.core.files import locked, telling_full_disk, to_json, write_atomically
from specdist.core.hub import resolve, served_name
from specdist.core.model_config import end_tokens
from specdist.core.progress import AnswersProgress
from specdist.core.progress_bar import ProgressBar
from specdist.core.team import Team
from specdist.generate.config import GenerateConfig
from specdist.generate.engine import Engine, sampling_of
from specdist.generate.files import PROGRESS, Tally, answered, find_manifest, local_files, merge, open_answers, written
from specdist.generate.work import Author, Watch, count, records, write_answers
from specdist.prompts.config import PromptsConfig
from specdist.prompts.render import load_tokenizer
from specdist.target.config import TargetConfig


@dataclass(frozen=True)
class Assignment:
    """What is to be answered, by what, and where the answers go. `start` is unlike that of any earlier start. `held`:
    raises ConfigError once the directory is another run's, and nothing is to be written there any more."""

    prompts: PromptsConfig
    config: GenerateConfig
    target: TargetConfig
    directory: Path
    start: str
    held: Callable[[], None] = lambda: None


def answers_in_world(
    asked: Assignment, store: dist.Store, hosts: Sequence[str], rank: int, device: torch.device
) -> PromptsConfig:
    """Have the target write the answers, all ranks of a world together, whose `hosts` are given in rank order. The
    `prompts` section with the files of answers in place of its own; with `prompts.answers=data` it is itself.

    Answers of an earlier start are kept, and where all are there nothing is done. What the engines held is free again.
    Raises ConfigError, DataError: of prompts, target, endpoint, or of answers that were written otherwise; on all
    ranks. DiskError: there is no room for the answers. WorldError: an engine has written nothing for
    `generate.timeout_s`, or a rank said nothing; on all ranks.
    """

    def refuse(seconds: float) -> NoReturn:
        text = f": another process writes answers in {asked.directory}: wait for it, or stop it"
        raise ConfigError.at("run.dir", text)

    team = Team(store, "answers", "writes answers (generate.timeout_s)", rank, hosts, asked.config.timeout_s)
    with team.telling_errors(), telling_full_disk(asked.directory):
        if rank == 0:
            with locked(asked.directory / ".lock", refuse):
                _lead(asked, team, device)
        elif team.wait("plan", 0) == "write":
            _write(asked, team, device, lambda tally: team.tell(_encoded(tally)))
            team.put(f"done/{rank}")
            team.wait("merged", 0)
    found = answered(asked.prompts, asked.directory)
    assert found is not None, "rank 0 has put them together"
    return found


def _lead(asked: Assignment, team: Team, device: torch.device) -> None:
    """Rank 0's part: look what is there, show how far all are, put the parts together."""
    asked.held()
    manifest = open_answers(asked.directory, asked.prompts, asked.config, asked.target.path)
    if manifest.tally is not None:
        team.put("plan", "done")
        return
    total, before, began = count(manifest.sources), len(written(asked.directory)), time.monotonic()
    team.put("plan", "write")
    with ProgressBar("answers", total, before) as bar:

        def show(own: Tally) -> None:
            """On the terminal and in progress.json, if it is time to."""
            if not team.tell(_encoded(own)):
                return
            written, seconds = _of_all(team), max(time.monotonic() - began, 1e-3)
            done, rate = before + written.conversations, written.tokens / seconds
            text = f"{written.finished + written.cut:,} answers, {rate:,.0f} tokens/s"
            line = f"answers: {done:,} of {total:,} conversations, {text}"
            bar.update(done if written.answered else before, text, line)  # bad ones come first, and tell no rate
            asked.held()
            _note(asked, AnswersProgress(done, total, rate, bar.left_s))

        show(Tally())
        own = _write(asked, team, device, show)
        for rank in range(1, len(team.hosts)):
            team.wait(f"done/{rank}", rank, lambda: show(own))
    tally = merge(asked.directory, manifest, asked.held).tally
    say(f"answers: {tally} ({asked.directory})")
    _note(asked, AnswersProgress(total, total, 0.0, 0.0, ended=str(tally)))
    team.put("merged")


def _note(asked: Assignment, progress: AnswersProgress) -> None:
    with suppress(OSError):  # for those who look on; where the disk is full, writing the answers says so
        write_atomically(asked.directory / PROGRESS, to_json(progress))


def _encoded(tally: Tally) -> str:
    return json.dumps([time.monotonic(), msgspec.to_builtins(tally)])  # the time, for who waits: this rank is alive


def _of_all(team: Team) -> Tally:
    """What all ranks have written in this start."""
    total = Tally()
    for rank in range(len(team.hosts)):
        if (said := team.said(rank)) is not None:
            total.add(msgspec.convert(json.loads(said)[1], Tally))
    return total


def _write(asked: Assignment, team: Team, device: torch.device, tell: Callable[[Tally], object]) -> Tally:
    """This rank's part of the answers, by its replica; nothing where it leads none."""
    if not _leads(asked, team, device):
        return Tally()
    config, path = asked.config, resolve(asked.target.path, "target.path")
    manifest = find_manifest(asked.directory)
    assert manifest is not None, "rank 0 has written it"
    tokenizer = load_tokenizer(path, asked.prompts)
    ends = end_tokens(path, tokenizer.eos_token_id)
    where = f"the replica of rank {team.rank} (host {team.hosts[team.rank]})"
    watch = Watch(where if config.endpoint is None else config.endpoint, config.timeout_s, tell, asked.held)
    author = Author(tokenizer, asked.prompts, config, sampling_of(config, None if config.endpoint else path), ends)
    todo = records(asked.prompts, config, local_files(manifest.sources, asked.prompts), team.claim)
    part = asked.directory / f"part-{asked.start}-{team.rank}.jsonl"
    asyncio.run(write_answers(_engine(asked, device, ends, watch), author, todo, written(asked.directory), part, watch))
    return watch.tally


def _leads(asked: Assignment, team: Team, device: torch.device) -> bool:
    """Whether this rank has an engine: with an endpoint rank 0 alone, else the first of every `target.tp` GPUs."""
    if asked.config.endpoint is not None:
        return team.rank == 0
    host = team.hosts[team.rank]
    own = [rank for rank, other in enumerate(team.hosts) if other == host]
    tp = asked.target.tp if asked.target.engine == "sglang" else 1
    devices = len(own) if device.type == "cpu" else min(len(own), torch.cuda.device_count())
    if devices < tp:
        raise ConfigError.at(
            "target.tp",
            f"={tp}: host {host} has {devices} ranks with a GPU of their own, and a replica that writes answers lies "
            "on one host: give generate.endpoint instead",
        )
    place = own.index(team.rank)
    return place % tp == 0 and place + tp <= devices


def _engine(asked: Assignment, device: torch.device, ends: frozenset[int], watch: Watch) -> Engine:
    config = asked.config
    if config.endpoint is not None:
        from specdist.generate.endpoint import EndpointEngine

        return EndpointEngine(config, served_name(asked.target.path), watch.note)
    target = replace(asked.target, path=str(resolve(asked.target.path, "target.path")))
    if target.engine == "sglang":
        from specdist.generate.sglang import sglang_engine

        return sglang_engine(target, device, config.concurrency, ends, config.seed)
    from specdist.generate.hf import HfEngine

    return HfEngine(target, device, config.batch, ends, watch.alive)
