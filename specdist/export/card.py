# SPDX-License-Identifier: Apache-2.0
"""The model card of an exported draft: its README.md, written from nothing but its config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdist.core import hub
from specdist.draft.registry import algorithm_of
from specdist.export.config_json import CONFIG, OURS, read_config
from specdist.export.serving import commands_of

CARD = "README.md"
FILES = ("data", "prompts.files", "prompts.holdout", "prompts.chat_template")
"""Keys of what is ours in config.json whose words may be relative paths."""


def model_card(config: Mapping[str, Any], name: str) -> str:
    """README.md as the Hub shows it. `config`: config.json of an export of ours. `name`: what servers are given for the
    draft: a directory or an id on the Hub."""
    ours = config[OURS]
    algorithm = found.name if (found := algorithm_of(config)) else "unknown"
    commands = commands_of(config, name)
    target = str(ours["target"])
    shown = target if _on_hub(target) else Path(target).name
    lines = [
        *_front_matter(ours, algorithm, [command.by.engine.lower() for command in commands]),
        f"# {algorithm} draft of {shown}",
        "",
        f"A draft model for speculative decoding of `{shown}`: it proposes tokens and the target verifies them, so "
        "that the same text takes fewer forwards of the target. It is of no use alone or beside another target.",
        "",
        "## Serve",
        "",
    ]
    for command in commands:
        lines += [f"{command.by.engine} {command.by.since} or newer:", "", "```sh", command.lines(), "```", ""]
    if not commands:
        lines += ["No engine that serves drafts of this algorithm is known.", ""]
    lines += ["## Figures", "", *_figures(ours.get("evaluation")), "", "## Made with", "", *_made_with(ours)]
    return "\n".join(lines) + "\n"


def push(directory: Path, name: str) -> str:
    """Put an export of ours on the Hub as ORG/NAME, with a card that says so; returns its address. Of files of this
    machine that it names, others get the names alone. Raises ConfigError, DataError: see `hub.push`."""
    config = _public(read_config(directory))
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
    files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    files[CARD] = model_card(config, name).encode()
    return hub.push(files, name, f"Draft of step {config[OURS].get('step', 'unknown')}, by specdist")


def _public(value: Any, file: bool = False) -> Any:
    """`value` of JSON without the directories of this machine. `file`: whether its words are files or on the Hub."""
    if isinstance(value, dict):
        return {key: _public(entry, file or key in FILES) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry, file) for entry in value]
    if not isinstance(value, str) or value.startswith("hub:"):
        return value
    return Path(value).name if file or value.startswith(("/", "~")) else value


def _front_matter(ours: Mapping[str, Any], algorithm: str, engines: list[str]) -> list[str]:
    """YAML, of which JSON is a part."""
    keys: dict[str, Any] = {"license": "unknown"}
    if _on_hub(ours["target"]):
        keys["base_model"] = ours["target"]
    if data := [_dataset(name) for name in ours.get("data") or () if name.startswith("hub:")]:
        keys["datasets"] = data
    keys["pipeline_tag"] = "text-generation"
    keys["tags"] = ["speculative-decoding", "draft-model", algorithm, "specdist", *engines]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in keys.items()), "---", ""]


def _figures(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return ["Not evaluated: the run held no text out (`prompts.holdout`)."]
    rows = ["| drafts a forward | acceptance length | accepted at this position |", "|---|---|---|"]
    pairs = zip(found["acceptance_length"], found["accepted"], strict=True)
    rows += [f"| {k} | {length:.2f} | {share:.1%} |" for k, (length, share) in enumerate(pairs, 1)]
    own = found.get("agreement")
    how = f"Tokens per target forward under greedy decoding, by replay of {found['answers']:,.0f} held-out answers "
    share = "" if own is None else f", of which {own:.1%} are the target's own greedy choice"
    return [f"{how}({found['tokens']:,.0f} tokens){share}.", "", *rows]


def _made_with(ours: Mapping[str, Any]) -> list[str]:
    told = {key: ours.get(key) for key in ("target", "run", "step", "data", "answers")}
    told["data"] = ", ".join(ours.get("data") or ())
    told["versions"] = ", ".join(f"{key} {value}" for key, value in (ours.get("versions") or {}).items())
    rows = [f"| {key} | {value} |" for key, value in told.items() if value not in (None, "")]
    keys = [f"    {key}: {json.dumps(value)}" for key, value in (ours.get("configuration") or {}).items()]
    rows += ["", "Configuration, where it is not the default:", "", *keys] if keys else []
    return ["| | |", "|---|---|", *rows]


def _dataset(name: str) -> str:
    """ORG/NAME of `hub:ORG/NAME[/CONFIG][:SPLIT][@REVISION]`."""
    return "/".join(name.removeprefix("hub:").split("@")[0].split(":")[0].split("/")[:2])


def _on_hub(target: str) -> bool:
    return not Path(target).is_absolute() and target.count("/") == 1
