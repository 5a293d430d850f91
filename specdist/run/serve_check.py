# SPDX-License-Identifier: Apache-2.0
"""`specdist serve-check`: is what an engine serves what was evaluated?

The engine that will serve decodes held-out prompts greedily, with the exported draft and alone. Replay over the answers
that it gave alone says how many target forwards serving needs for them (`evaluate/replay.py`); the engine says how many
it took with the draft. Where a text is the same both ways, the two numbers differ by rounding only, so the verdict is
over those texts, if the engine tells of every answer (SGLang does, vLLM does not) and they are long enough together.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specdist.core.errors import ConfigError, DataError
from specdist.core.files import to_json, write_atomically
from specdist.core.hub import resolve
from specdist.core.words import override_words
from specdist.evaluate.decoding import fitting_prompts
from specdist.evaluate.prompts import EvaluationPrompt
from specdist.export.serving import ServeCommand
from specdist.generate.engine import GREEDY
from specdist.job.config import JobConfig, examine
from specdist.job.run_dir import RunDirectory
from specdist.prompts.report import PrepareReport
from specdist.prompts.store import StoreWriter
from specdist.run.evaluation import ALONE, heldout_prompts, prompt_files
from specdist.run.judge import read_evaluation
from specdist.run.serve_report import OTHER, SAME, ServeReport, compare, first_divergence
from specdist.run.serving import Decoded, Server, check_draft, check_engine, installed, serve_command

LAST_KEY = 2**64 - 1


@dataclass(frozen=True)
class ServeCheck:
    """A check that is ready to run, and the job that replays what it decodes.

    Attributes:
        too_long: how many prompts had to be left out.
        folder: of the run, for what the check leaves behind.
        replay: the words of a job that replays the answers, in `folder`.
    """

    server: Server
    too_long: int
    folder: Path
    replay: list[str]

    def decode(self) -> tuple[Decoded, Decoded]:
        """With the draft, and alone; the answers lie ready for replay then."""
        drafted = self.server.decode(GREEDY, draft=True)
        if drafted.drafted is None or not drafted.drafted.forwards:
            raise ConfigError(f"{self.server.command.by.engine} made no drafts of {len(drafted.replies)} answers")
        plain = self.server.decode(GREEDY, draft=False)
        same = [a == b for a, b in zip(drafted.texts, plain.texts, strict=True)]
        write_answers(self.folder / "answers", self.server.prompts, plain.texts, same)
        return drafted, plain


def prepare(job: JobConfig, words: Sequence[str], engine: str | None, draft: str | None) -> ServeCheck:
    """Everything that can be checked before an engine starts. Raises ConfigError, DataError: what is missing or does
    not go together. `engine`: SGLang or vLLM; None for the target's, or the one that is installed. `draft`: an exported
    draft instead of the run's: a directory, or an id on the Hub. `words`: those of `job`."""
    if not prompt_files(job)[0]:
        raise ConfigError.at(
            "prompts.holdout", "is not set, and evaluate.prompts is empty: give files of held-out prompts"
        )
    if draft is None:
        exports = sorted(path.parent for path in RunDirectory(Path(job.run.dir)).exports.glob("[!.]*/config.json"))
        if not exports:
            raise ConfigError.at("run.dir", f"={job.run.dir}: nothing is exported there yet: `specdist export` does")
    else:
        exports = [resolve(draft, "--draft", weights=True)]
    command = serve_command(job, exports, engine, job.draft_tokens if draft else None)
    resolve(job.target.path, "target.path", weights=True)
    facts = examine(job)
    check_draft(job, facts, Path(command.draft))
    check_engine(command, job, facts.target)
    found = heldout_prompts(job, facts)
    longest = min(facts.target.max_positions or job.prompts.max_length, job.prompts.max_length)
    prompts = [found[i] for i in fitting_prompts([p.tokens for p in found], job.evaluate, longest)]
    folder = Path(job.run.dir) / "serve-check"
    server = Server(command, job, facts, prompts, job.evaluate.max_new_tokens)
    replay = [*words, *_replay_words(command, folder, job.target.tp)]
    return ServeCheck(server, len(found) - len(prompts), folder, replay)


def _replay_words(command: ServeCommand, folder: Path, tp: int) -> list[str]:
    """Of a job that evaluates once, on as many ranks as the engine has had."""
    keys: dict[str, Any] = ALONE | {
        "run.dir": folder / "replay",
        "prompts.files": [folder / "answers"],
        "prompts.holdout": 0.5,  # by the keys that `write_answers` gives
        "target.dtype": command.dtype,
        "target.replicas": 1,
        "world.mode": "colocated",
        "draft.init_from": command.draft,
        "draft.dp": tp,
        "draft.cp": 1,
        "evaluate.draft_tokens": command.draft_tokens,
        "evaluate.limit": None,
        "evaluate.temperature": 0,
        "metrics.report": False,
    }
    return override_words(keys)


def write_answers(
    directory: Path, prompts: Sequence[EvaluationPrompt], answers: Sequence[Sequence[int]], same: Sequence[bool]
) -> None:
    """A prompt store of every prompt with its answer, held out, and of the first once more to train on."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    sequences = [*zip(prompts, answers, strict=True), (prompts[0], answers[0])]
    marks = [np.repeat([False, True], [len(prompt.tokens), len(answer)]) for prompt, answer in sequences]
    with StoreWriter(directory) as writer:
        writer.extend(
            lengths=np.array(list(map(len, marks))),
            tokens=np.concatenate([[*prompt.tokens, *answer] for prompt, answer in sequences]),
            supervised=np.concatenate(marks),
            file=0,
            lines=np.arange(len(sequences)),
            groups=np.array([*[0] * len(prompts), LAST_KEY], dtype=np.uint64),
            categories=[*(SAME if equal else OTHER for equal in same), OTHER],
        )
        count = len(sequences)
        writer.finish(["answers"], PrepareReport(count, count, count, writer.tokens, writer.supervised))


def judge(check: ServeCheck, drafted: Decoded, plain: Decoded, tolerance: float, least_tokens: int) -> ServeReport:
    """The report, once the answers are replayed; it is also written to a file of `folder`, by the engine's name. Raises
    DataError: the replay has left no evaluation."""
    run_dir, command = RunDirectory(check.folder / "replay"), check.server.command
    replay = read_evaluation(run_dir, 0)
    if replay is None:
        raise DataError(f"the replay of the answers has left no evaluation in {run_dir.path}")
    assert drafted.drafted is not None
    report = ServeReport(
        command=command,
        version=installed(command.by.engine) or "",
        total=drafted.drafted,
        compared=compare(drafted, plain, replay),
        replay=replay.total.position_acceptance,
        same_texts=sum(a == b for a, b in zip(drafted.texts, plain.texts, strict=True)),
        divergence=first_divergence(check.server.prompts, drafted, plain),
        too_long=check.too_long,
        tolerance=tolerance,
        least_tokens=least_tokens,
    )
    write_atomically(check.folder / f"{command.by.engine.lower()}.json", to_json(report.to_dict()))
    return report
