# SPDX-License-Identifier: Apache-2.0
"""The whole command line that serves an exported draft beside its target, engine by engine.

Which engine takes which algorithm, under which name and since which version, each algorithm says (`served_by`). What
the command lines say was read in SGLang 0.5.10 to 0.5.23 (`server_args.py`, `arg_groups/speculative_hook.py`) and in
vLLM 0.22 to 0.33 (`config/speculative.py`):

- Without `num_steps`, `topk` and `num_draft_tokens` SGLang takes a tree of a size of its own choice. Of a chain it
  verifies the drafts and the token before them: one more than the steps.
- vLLM takes the name of a method in the draft's path for it where it is not told.
- A draft runs in the server's dtype. `auto` makes float16 or bfloat16 of a float32 model, so the export's is given.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdist.core.errors import DataError
from specdist.draft.algorithm import ServedBy
from specdist.draft.registry import algorithm_of
from specdist.export.config_json import CONFIG, OURS, form, read_config


@dataclass(frozen=True)
class ServeCommand:
    """One engine's command line.

    Attributes:
        by: the engine, and what it calls the algorithm.
        target, draft: what the server is given: a directory or an id on the Hub.
        draft_tokens: drafts a target forward, K.
        dtype: of both models.
        speedup: of decoding one sequence, forecast; None where it is not known.
    """

    by: ServedBy
    target: str
    draft: str
    draft_tokens: int
    dtype: str
    speedup: float | None = None

    @property
    def comment(self) -> str:
        """For a shell, what is to be known before it is used; empty where nothing is."""
        if self.speedup is None or self.speedup > 1:
            return ""
        return f"# forecast to be no faster than without a draft: {self.speedup:.2f}x for one sequence"

    @property
    def arguments(self) -> dict[str, Any]:
        """The same as keyword arguments of the engine in Python."""
        by = self.by
        if by.engine == "vLLM":
            speculation = {"method": by.method, "model": self.draft, "num_speculative_tokens": self.draft_tokens}
            return {"model": self.target, "dtype": self.dtype, "speculative_config": speculation}
        return {
            "model_path": self.target,
            "dtype": self.dtype,
            "speculative_algorithm": by.method,
            "speculative_draft_model_path": self.draft,
            **({} if by.block else {"speculative_num_steps": self.draft_tokens}),
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": self.draft_tokens + 1,
        }

    @property
    def words(self) -> list[str]:
        options, begin = self.arguments, ["python", "-m", "sglang.launch_server"]
        if self.by.engine == "vLLM":
            begin = ["vllm", "serve", options.pop("model")]
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
        return [*begin, *(word for name, text in texts.items() for word in (f"--{name.replace('_', '-')}", text))]

    def __str__(self) -> str:
        return f"{shlex.join(self.words)}  {self.comment}".strip()

    def lines(self) -> str:
        """The command line for people, an option a line, below its comment."""
        begin = [word.startswith("--") for word in self.words]
        command = "".join(
            f" \\\n    {shlex.quote(word)}" if option else f" {shlex.quote(word)}"
            for word, option in zip(self.words, begin, strict=True)
        ).strip()
        return f"{self.comment}\n{command}".strip()


def serve_commands(
    directory: str | Path, target: str | None = None, draft_tokens: int | None = None, name: str | None = None
) -> list[ServeCommand]:
    """How each engine that loads the export in `directory` is started with it. Raises DataError: there is no export, of
    no algorithm that is known, or it does not say what is not given.

    Args:
        target: the target, where the export does not say it or it lies elsewhere.
        draft_tokens: drafts a target forward; the export's by default.
        name: what the server finds the draft by, by default the absolute path of `directory`.
    """
    path = Path(directory)
    config = read_config(path)
    ours = config.get(OURS) or {}
    target, draft_tokens = target or ours.get("target"), draft_tokens or ours.get("draft_tokens")
    for key, value in (("target", target), ("draft_tokens", draft_tokens)):
        if value is None:
            raise DataError(f"{path / CONFIG}: {OURS}.{key} is missing: the draft was not exported by this version")
    told = {**config, OURS: {**ours, "target": target, "draft_tokens": draft_tokens}}
    return commands_of(told, name or str(path.absolute()))


def commands_by_engine(directories: Iterable[Path], **given: Any) -> dict[str, ServeCommand]:
    """By engine, how it serves the first of some exports that it loads. `given`, errors: see `serve_commands`."""
    found: dict[str, ServeCommand] = {}
    for directory in directories:
        for command in serve_commands(directory, **given):
            found.setdefault(command.by.engine, command)
    return found


def commands_of(config: Mapping[str, Any], name: str) -> list[ServeCommand]:
    """The same of the config.json of an export of ours, which servers find by `name`."""
    ours = config[OURS]
    dtype = config.get("torch_dtype") or config.get("dtype") or "auto"
    beside = ours.get("target_architectures") or ()
    algorithm = algorithm_of(config)
    engines = algorithm.served(config, beside) if algorithm else ()
    draft_tokens, speedups = int(ours["draft_tokens"]), (ours.get("evaluation") or {}).get("speedup", ())
    speedup = speedups[draft_tokens - 1] if draft_tokens <= len(speedups) else None
    return [
        ServeCommand(by, str(ours["target"]), name, draft_tokens, dtype, speedup)
        for by in engines
        if form(config) in by.formats
    ]
