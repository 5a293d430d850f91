# SPDX-License-Identifier: Apache-2.0
"""`specdist keys`: the configuration reference on a terminal."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from specdist.core import config
from specdist.core.config import Field
from specdist.core.errors import UserError
from specdist.job.sections import ALSO_CALLED, JobConfig

COMMON = (
    "run.dir", "target.path", "target.engine", "target.replicas", "target.tp", "prompts.files", "prompts.holdout",
    "prompts.answers", "prompts.max_length", "prompts.tokens_per_rank", "draft.algorithm", "draft.dp", "train.epochs",
    "train.steps", "optimizer.lr", "checkpoint.every", "evaluate.every",
)  # fmt: skip
"""What most jobs set."""


@dataclass(frozen=True)
class Section:
    """A section of the configuration: its name, what it says of itself, and its keys."""

    name: str
    help: str
    entries: tuple[Field, ...]


def sections() -> Iterator[Section]:
    """All of them, in the order of the data flow."""
    entries, hints = list(config.fields(JobConfig)), typing.get_type_hints(config.complete(JobConfig))
    for field in dataclasses.fields(JobConfig):
        own = tuple(entry for entry in entries if entry.key.startswith(f"{field.name}."))
        yield Section(field.name, (hints[field.name].__doc__ or "").splitlines()[0], own)


def listing(words: Sequence[str] = ()) -> str:
    """All keys by section, those that most jobs set first; or the section or key of that name; or those with all words
    in the key, its other names or its help. Raises UserError where there are none."""
    entries = {entry.key: entry for entry in config.fields(JobConfig)}
    if not words:
        lines = ["# what most jobs set", *(line for key in COMMON for line in _lines(entries[key])), ""]
        return "\n".join([*lines, *_listed(list(entries.values()))])
    wanted = [word.lower() for word in words]
    named = [entry for entry in entries.values() if f"{entry.key}.".startswith(f"{wanted[0]}.")]
    texts = [(entry, f"{_names(entry)} {entry.help}".lower()) for entry in entries.values()]
    found = named if len(wanted) == 1 and named else [e for e, text in texts if all(word in text for word in wanted)]
    if not found:
        raise UserError(f"no key has '{' '.join(words)}' in its name or its meaning; `specdist keys` lists all")
    return "\n".join(_listed(sorted(found, key=lambda entry: _rank(entry, wanted))))


def _rank(entry: Field, words: Sequence[str]) -> tuple[bool, bool]:
    """Lower the likelier it is meant: its names have the words, and most jobs set it."""
    return not all(word in _names(entry) for word in words), entry.key not in COMMON


def _names(entry: Field) -> str:
    others = (name for name, key in ALSO_CALLED.items() if key == entry.key)
    return " ".join((entry.key, entry.key.replace("_", " "), *others)).lower()


def _listed(wanted: Sequence[Field]) -> Iterator[str]:
    """In the order of `wanted`, a section where its first one is."""
    described = {section.name: section for section in sections()}
    for name in dict.fromkeys(entry.key.partition(".")[0] for entry in wanted):
        yield f"# {name}: {described[name].help}"
        for entry in wanted:
            if entry.key.startswith(f"{name}."):
                yield from _lines(entry)
        yield ""


def _lines(entry: Field) -> Iterator[str]:
    yield f"{entry.key} = {'(required)' if entry.default == MISSING else entry.default}    ({entry.type})"
    yield f"    {entry.help}"
