# SPDX-License-Identifier: Apache-2.0
"""Decoding by the engine that will serve: SGLang's or vLLM's own, with an exported draft, in a process of its own."""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path

import torch
from packaging.version import Version

from specdist.core.errors import ConfigError, WorldError
from specdist.core.hub import resolve, served_name
from specdist.core.model_config import end_tokens
from specdist.core.progress_bar import ProgressBar
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.decoding import check_settings, fitting_prompts, make_report
from specdist.evaluate.prompts import EvaluationPrompt
from specdist.evaluate.report import EvaluationReport, Tally
from specdist.export import load_exported
from specdist.export.config_json import read_config
from specdist.export.serving import ServeCommand, commands_by_engine
from specdist.generate import vllm
from specdist.generate.engine import Drafted, Reply, Request, Sampling
from specdist.generate.engine_process import EngineProcess
from specdist.generate.sglang import sglang_engine
from specdist.generate.work import Watch, attended
from specdist.job.config import JobConfig, JobFacts
from specdist.prompts.render import load_tokenizer
from specdist.run.evaluation import heldout_prompts
from specdist.target.description import TargetDescription
from specdist.target.sglang import versions

INSTALL = {"SGLang": "pip install -e '.[sglang]'", "vLLM": "pip install vllm"}


@dataclass(frozen=True)
class Decoded:
    """What an engine wrote: a reply to every prompt, in their order, with the token that ended it. `drafted`: what
    became of all drafts together; None where none were made. `seconds`: from the first request to the last reply, once
    the model was loaded."""

    replies: list[Reply]
    drafted: Drafted | None
    seconds: float

    @property
    def texts(self) -> list[list[int]]:
        return [reply.token_ids or [] for reply in self.replies]


def installed(engine: str) -> str | None:
    """The version of SGLang or vLLM in this environment, None if there is none."""
    return versions.installed() if engine == "SGLang" else vllm.installed()


def serve_command(
    job: JobConfig, directories: Sequence[Path], engine: str | None = None, draft_tokens: int | None = None
) -> ServeCommand:
    """How an engine serves the draft that lies in `directories`, in a form of its own in each: the `engine` asked for,
    else that of `target.engine`, else the first that is installed here. Raises ConfigError: no such engine is installed
    here, or it does not serve such a draft. DataError: see `commands_by_engine`."""
    found = commands_by_engine(directories, target=served_name(job.target.path), draft_tokens=draft_tokens)
    wanted = engine or ("SGLang" if job.target.engine == "sglang" else next(filter(installed, sorted(found)), None))
    if wanted is not None and wanted not in found:
        served = ", ".join(sorted(found)) or "no engine that is known"
        raise ConfigError.at("draft.algorithm", f"={job.draft.algorithm}: {wanted} does not serve it, but {served}")
    if wanted is None or installed(wanted) is None:
        names = sorted(found) if wanted is None else [wanted]
        ways = " or ".join(f"{name}, {found[name].by.since} or later ({INSTALL[name]})" for name in names)
        raise ConfigError(f"nothing that serves this draft is installed here: {ways}")
    return found[wanted]


def check_draft(job: JobConfig, facts: JobFacts, directory: Path) -> None:
    """Raise ConfigError or DataError where the export in `directory` is no draft of the job's target."""
    try:
        draft = job.draft.of_exported(load_exported(directory), facts.target.config)
        draft.chosen.layout(facts.target.config, facts.layout.dtype)
    except ConfigError as error:
        raise ConfigError(f"{directory} is no draft of {job.target.path}: {error}", "target.path") from error
    layers = read_config(directory).get("num_target_layers", facts.target.layers)
    if layers != facts.target.layers:
        raise ConfigError(
            f"{directory} is a draft of a target of {layers} layers, and {job.target.path} has {facts.target.layers}",
            "target.path",
        )


def check_engine(command: ServeCommand, job: JobConfig, target: TargetDescription) -> None:
    """Raise ConfigError where the engine of `command`, which is installed, cannot serve it here; nothing is started."""
    engine, version = command.by.engine, installed(command.by.engine)
    if engine == "SGLang":
        versions.require()
    if Version(str(version)) < Version(command.by.since):
        raise ConfigError.at(
            "draft.algorithm",
            f"={job.draft.algorithm}: {engine} {version} is installed, {command.by.since} and later serve such drafts",
        )
    if target.architectures and hands_out_layers(engine, target.architectures[0]) is False:
        raise ConfigError.at(
            "target.path",
            f"={job.target.path}: {engine} {version} gives no hidden states of {target.architectures[0]}, so it can "
            "serve no draft for it: a later version may",
        )
    gpus(command, job.target.tp)


def gpus(command: ServeCommand, tp: int) -> torch.device:
    """The first of the GPUs that the engine takes. Raises ConfigError where there are not so many here."""
    found = torch.cuda.device_count()
    if found < tp:
        raise ConfigError.at(
            "target.tp",
            f"={tp}: {command.by.engine} decodes with drafts on GPUs, so many, and here are {found} "
            "(specdist eval --decode target.engine=hf decodes in transformers)",
        )
    return torch.device("cuda", 0)


@dataclass(frozen=True)
class Server:
    """The engine of one command line, which is to decode some prompts, `limit` new tokens each."""

    command: ServeCommand
    job: JobConfig
    facts: JobFacts
    prompts: Sequence[EvaluationPrompt]
    limit: int

    def decode(self, sampling: Sampling, draft: bool) -> Decoded:
        """Start the engine with the draft or without one, and have it answer the prompts. Raises WorldError: it ended,
        refused a prompt, or wrote nothing for `generate.timeout_s`."""
        seed = self.job.run.seed
        requests = [Request(list(p.tokens), self.limit, sampling, seed + i) for i, p in enumerate(self.prompts)]
        name = self.command.by.engine
        what = f"{name} with {self.command.draft_tokens} drafts" if draft else f"{name} alone"
        engine = self._engine(draft)
        with ProgressBar(what, len(requests), at_once=True) as bar:
            watch = Watch(name, self.job.generate.timeout_s, lambda _: None)
            replies, seconds = asyncio.run(_ask(engine, requests, watch, bar, what))
        for prompt, reply in zip(self.prompts, replies, strict=True):
            if reply.finish_reason == "error":
                raise WorldError(f"{name} refused the prompt at {prompt.file}:{prompt.line}: {reply.text}")
        return Decoded(replies, engine.drafted or _sum(replies), seconds)

    def _engine(self, draft: bool) -> EngineProcess:
        path = resolve(self.job.target.path, "target.path")
        arguments = self.command.arguments
        if not draft:
            arguments = {name: value for name, value in arguments.items() if not name.startswith("speculative")}
        ends = end_tokens(path, load_tokenizer(path, self.job.prompts).eos_token_id)
        target = replace(self.job.target, path=str(path))
        arguments = {name: str(path) if name in ("model", "model_path") else v for name, v in arguments.items()}
        concurrency, seed = len(self.prompts), self.job.run.seed
        if self.command.by.engine == "SGLang":
            return sglang_engine(target, gpus(self.command, target.tp), concurrency, ends, seed, arguments)
        return vllm.vllm_engine(target, concurrency, ends, seed, arguments)


async def _ask(
    engine: EngineProcess, requests: Sequence[Request], watch: Watch, bar: ProgressBar, name: str
) -> tuple[list[Reply], float]:
    """The replies, and the seconds that they took once the model was loaded."""
    found: dict[int, Reply] = {}
    seconds = 0.0

    async def write(number: int) -> None:
        reply = await engine.write(requests[number])
        tokens = reply.token_ids or []
        if reply.end is not None and tokens[-1:] != [reply.end]:
            tokens = [*tokens, reply.end]
        found[number] = replace(reply, token_ids=tokens)
        watch.touch()
        bar.update(len(found), "", f"{name}: {len(found)} of {len(requests)} prompts")

    async def all_of_them() -> None:
        nonlocal seconds
        await engine.ready()
        watch.touch()
        began = time.monotonic()
        await asyncio.gather(*map(write, range(len(requests))))
        seconds = time.monotonic() - began

    await attended(engine, watch, all_of_them)
    return [found[number] for number in range(len(requests))], seconds


def _sum(replies: Sequence[Reply]) -> Drafted | None:
    """What became of all drafts, by what is said of every reply; one of a single token has none."""
    told = [reply.drafted for reply in replies if reply.drafted is not None]
    if not told:
        return None
    columns = [drafted.accepted for drafted in told if drafted.accepted is not None]
    longest = max(map(len, columns), default=0)
    sums = [sum(column[k] for column in columns if k < len(column)) for k in range(longest)]
    return Drafted(sum(drafted.forwards for drafted in told), sums if len(columns) == len(told) else None)


def evaluate_served(job: JobConfig, facts: JobFacts, directory: Path) -> EvaluationReport:
    """What `specdist eval --decode` reports, by the target's engine with the export in `directory`. Raises ConfigError,
    DataError, WorldError: see `serve_command`, `check_engine`, `fitting_prompts` and `Server`."""
    settings = job.decoding
    command = serve_command(job, [directory], draft_tokens=settings.drafts)
    check_settings(settings)
    check_draft(job, facts, directory)
    check_engine(command, job, facts.target)
    prompts = heldout_prompts(job, facts)
    fitting = fitting_prompts([p.tokens for p in prompts], settings, facts.target.max_positions)
    server = Server(command, job, facts, [prompts[i] for i in fitting], settings.max_new_tokens)
    sampling = Sampling(settings.temperature, 1.0, 0, 0.0, 1.0)
    drafted = server.decode(sampling, draft=True)
    tallies = [_tally(reply, settings, drafted.seconds / len(fitting)) for reply in drafted.replies]
    if settings.check:
        plain = server.decode(sampling, draft=False)
        texts = zip(tallies, drafted.texts, plain.texts, strict=True)
        tallies = [t.compared(text, own, plain.seconds / len(fitting)) for t, text, own in texts]
    return make_report(settings, [p.file for p in prompts], fitting, tallies)


def _tally(reply: Reply, settings: EvaluateConfig, seconds: float) -> Tally:
    forwards = reply.drafted.forwards if reply.drafted else 0
    accepted = (reply.drafted.accepted or []) if reply.drafted else []
    accepted = [*accepted, *[0] * settings.drafts][: settings.drafts]
    return Tally(
        prompts=1,
        tokens=len(reply.token_ids or ()),
        forwards=forwards,
        drafted=(forwards,) * settings.drafts,
        reached=(forwards, *accepted[:-1]),
        accepted=tuple(accepted),
        seconds=seconds,
    )


_MODELS = {"SGLang": ("sglang", "srt/models"), "vLLM": ("vllm", "model_executor/models")}
_CLASS = re.compile(r"^class (\w+)(?:\[[^\]]*\])?(?:\(([^)]*)\))?:", re.MULTILINE)
_CAPTURES = re.compile(r"def set_\w+_layers_to_capture\b")


def hands_out_layers(engine: str, architecture: str) -> bool | None:
    """Whether the installed engine does so for models of this architecture; None where it has no class of that name."""
    package, folder = _MODELS[engine]
    found = util.find_spec(package)
    assert found is not None, f"{engine} is installed"
    classes: dict[str, tuple[list[str], bool]] = {}
    for root in found.submodule_search_locations or ():
        for file in sorted((Path(root) / folder).rglob("*.py")):
            classes |= _classes(file.read_text(encoding="utf-8", errors="replace"))
    return _captures(architecture, classes, set()) if architecture in classes else None


def _classes(text: str) -> dict[str, tuple[list[str], bool]]:
    """By name the bases of every class of a module, and whether its own body takes layers to capture."""
    found = list(_CLASS.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)][: len(found)]
    return {
        match[1]: (re.findall(r"\w+", match[2] or ""), bool(_CAPTURES.search(text, match.end(), end)))
        for match, end in zip(found, ends, strict=True)
    }


def _captures(name: str, classes: dict[str, tuple[list[str], bool]], seen: set[str]) -> bool:
    if name == "SupportsEagle3":
        return True
    if name not in classes or name in seen:
        return False
    bases, own = classes[name]
    return own or any(_captures(base, classes, seen | {name}) for base in bases)
