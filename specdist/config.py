# SPDX-License-Identifier: Apache-2.0
"""Typed configuration: defaults <- YAML files <- `key=value` overrides, checked against frozen dataclasses.

This module knows no section. Each section's dataclass lives beside the code it configures and `specdist/job.py` puts
them together. An unknown key, a wrong type or a missing value raises ConfigError with the source (`file:line` or
`command line`), the key, and the nearest valid name.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specdist.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Field:
    """One key of a configuration, as help shows it."""

    key: str
    type: str
    default: Any
    help: str


def load(schema: type[T], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> T:
    """Merge `files` in order and then `overrides` (`a.b=value`) over the defaults of the dataclass `schema`.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a wrong type, a value still missing, or a combination
            that a section's own validation refuses.
    """
    config = OmegaConf.structured(schema)
    OmegaConf.set_readonly(config, False)
    for file in files:
        config = _merge_file(schema, config, Path(file))
    for override in overrides:
        config = _merge_override(schema, config, override)
    try:
        return typing.cast(T, OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        sources = ", ".join(map(str, files)) or "no file given"
        key = error.full_key
        raise ConfigError(f"{key} has no value: set it in a config file ({sources}) or as {key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; `load` on it gives the same value back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as nested plain dictionaries."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), resolve=True))


def fields(schema: type, prefix: str = "") -> Iterator[Field]:
    """Every key of a schema with its type, default and help (the string literal under the field)."""
    helps = _field_docstrings(schema)
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(typing.cast(type, hint), f"{key}.")
            continue
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Field(key, _type_name(hint), default, helps.get(field.name, ""))


def _merge_file(schema: type, config: DictConfig, path: Path) -> DictConfig:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    if node is None:
        return config
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: a config file is a mapping of sections to keys")
    lines = dict(_check_keys(schema, node, path))
    try:
        return typing.cast(DictConfig, OmegaConf.merge(config, OmegaConf.create(text)))
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        where = f"{path}:{lines[key]}" if key in lines else str(path)
        raise ConfigError(f"{where}: {key}: {_first_line(error)}") from error


def _merge_override(schema: type, config: DictConfig, override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"command line: '{override}' is not of the form key=value")
    _check_key(schema, key, "command line")
    try:
        return typing.cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist([override])))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"command line: {key}: {_first_line(error)}") from error


def _check_keys(schema: type, node: yaml.MappingNode, path: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Check every key of a YAML mapping; yield each full key with its line."""
    for key_node, value in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        section = _check_key(schema, key, f"{path}:{line}")
        yield key, line
        if isinstance(value, yaml.MappingNode) and section is not None:
            yield from _check_keys(schema, value, path, f"{key}.")
        elif section is not None and value.tag != "tag:yaml.org,2002:null":
            raise ConfigError(f"{path}:{line}: {key} is a section with keys of its own: {', '.join(_names(section))}")


def _check_key(schema: type, key: str, where: str) -> type | None:
    """Raise unless `key` names a field of `schema`; returns the section's dataclass if it names one."""
    section: type | None = schema
    prefix = ""
    for part in key.split("."):
        if section is None:  # inside a free mapping, whose keys are the user's own
            return None
        names = _names(section)
        if part not in names:
            raise ConfigError(f"{where}: unknown key '{prefix}{part}'{_suggest(schema, prefix, part, names)}")
        hint = _plain(typing.get_type_hints(section)[part])
        section = typing.cast(type, hint) if dataclasses.is_dataclass(hint) else None
        prefix += f"{part}."
    return section


def _suggest(schema: type, prefix: str, part: str, names: list[str]) -> str:
    near = difflib.get_close_matches(part, names, n=1) or [name for name in names if part in name]
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    elsewhere = [f.key for f in fields(schema) if f.key.rsplit(".", 1)[-1] == part]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return f"; valid here: {', '.join(names)}"


def _names(schema: type) -> list[str]:
    return [f.name for f in dataclasses.fields(schema)]


def _plain(hint: Any) -> Any:
    """The type inside `X | None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _field_docstrings(schema: type) -> dict[str, str]:
    """The string literal that follows each field in the source of a dataclass."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]).body
    found = {}
    for field, after in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[field.target.id] = " ".join(after.value.value.split())
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
