# SPDX-License-Identifier: Apache-2.0
"""Typed configuration: defaults <- YAML files <- `key=value` overrides, checked against frozen dataclasses.

This module knows no section. Each section's dataclass lives beside the code it configures and
`specdist/job/config.py` puts them together. A section that holds those of registered implementations says by a
classmethod `registered` which fields these are: see `complete`. An unknown key, a wrong type or a missing value raises
ConfigError with the source (`file:line` or `command line`), the key, and the nearest valid name. Errors about values
are raised by the code that they concern, often long after loading, and know their keys: `Sources.naming` adds where
each of them was set.
"""

import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specdist.core.errors import ConfigError, InputError, first_line
from specdist.core.words import is_text

T = TypeVar("T")
_defaults: Callable[[type], Any] = functools.cache(OmegaConf.structured)  # most of what loading a job takes


@dataclass(frozen=True)
class Field:
    """One key of a configuration, as help shows it."""

    key: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class _Layer:
    """One file or `key=value` word: what it sets, and where each full key is set (`file:line` or `command line`)."""

    name: str
    values: DictConfig
    places: Mapping[str, str]
    sections: frozenset[str]
    """The keys whose value is a mapping, or null."""


class Sources:
    """Configuration files and `key=value` words, in the order in which they are merged; they are parsed once. Raises
    ConfigError: a file that cannot be read or is not YAML, a key set twice in a file, a word without `=`."""

    def __init__(self, files: Sequence[str | Path], overrides: Sequence[str] = ()):
        self._files = tuple(map(str, files))
        self._layers = [*(_file_layer(Path(file)) for file in files), *map(_override_layer, overrides)]

    def value(self, key: str) -> Any:
        """What is given for a key, before any check; None where nothing is."""
        merged = OmegaConf.merge(*(layer.values for layer in self._layers)) if self._layers else OmegaConf.create()
        found = OmegaConf.select(merged, key, throw_on_resolution_failure=False)
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found

    def where(self, key: str) -> str:
        """Where a key was last set: `file:line`, `command line` or `default`."""
        return next((layer.places[key] for layer in reversed(self._layers) if key in layer.places), "default")

    def load(self, schema: type[T]) -> T:
        """Merge everything over the defaults of the dataclass `schema`. Raises ConfigError: an unknown key, a wrong
        type, a value still missing, or a combination that a section's own validation refuses."""
        config = copy.deepcopy(_defaults(schema := complete(schema)))
        OmegaConf.set_readonly(config, False)
        for layer in self._layers:
            _check_keys(schema, layer)
            try:
                config = OmegaConf.unsafe_merge(config, copy.deepcopy(layer.values))  # `merge` copies all of `config`
            except OmegaConfBaseException as error:
                key, wrong = _refused(error, config, layer)
                raise ConfigError(f"{layer.places.get(key, layer.name)}: {key}: {wrong}") from error
        with self.naming():
            try:
                return typing.cast(T, OmegaConf.to_object(config))
            except MissingMandatoryValue as error:
                given, key = ", ".join(self._files) or "no file given", error.full_key or ""
                raise ConfigError(f"{key} has no value: set it in a config file ({given}) or as {key}=...") from error
            except OmegaConfBaseException as error:
                raise ConfigError(f"{error.full_key}: {_first_line(error)}", error.full_key or "") from error

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors about the configuration also say where their keys were set; of several, the nearest."""
        try:
            yield
        except InputError as error:
            if error.sources is None:
                error.sources = "; ".join(f"{key}: {self.where(key)}" for key in error.keys.split() if key[0] != "-")
            raise


def load(schema: type[T], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> T:
    """Merge `files` in order and then `overrides` (`a.b=value`) over the defaults of `schema`. Raises ConfigError."""
    return Sources(files, overrides).load(schema)


def _refused(error: OmegaConfBaseException, config: Any, layer: _Layer) -> tuple[str, str]:
    """The key that a layer sets wrongly, and what is wrong with it. Of items of a list OmegaConf knows neither key nor
    value: then it is the key that is refused alone."""
    if error.full_key:
        return error.full_key, _first_line(error)
    for key in (key for key in layer.places if key not in layer.sections):
        value, alone = OmegaConf.select(layer.values, key), OmegaConf.create()
        OmegaConf.update(alone, key, value)
        try:
            OmegaConf.merge(config, alone)
        except OmegaConfBaseException:
            return key, _first_line(error).replace("'$VALUE'", str(value))
    return "", _first_line(error)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; `load` on it gives the same value back."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)), resolve=True)


def complete(schema: type[T]) -> type[T]:
    """A dataclass with the fields, of itself and of its sections, that follow from registries.

    `schema.registered()`, where there is such a classmethod, gives their types by name: the section of every registered
    implementation, or another type (the names to choose from) for a field that there is already. Where nothing is
    added it is `schema` itself, else a subclass.
    """
    hints = typing.get_type_hints(schema)
    added: dict[str, Any] = dict(getattr(schema, "registered", dict)())
    for name, hint in hints.items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            added.setdefault(name, complete(hint))
    added = {name: hint for name, hint in added.items() if hints.get(name) != hint}
    return typing.cast(type[T], _extended(typing.cast(Any, schema), tuple(added.items()))) if added else schema


@functools.cache
def _extended(schema: type, added: tuple[tuple[str, Any], ...]) -> type:
    present = {field.name: field for field in dataclasses.fields(schema)}
    made = []
    for name, hint in added:
        section = dataclasses.is_dataclass(hint) and isinstance(hint, type)
        made.append((name, hint, dataclasses.field(default_factory=hint) if section else present[name].default))
    namespace = {"__qualname__": schema.__qualname__, "__doc__": schema.__doc__}
    extended = dataclasses.make_dataclass(schema.__name__, made, bases=(schema,), frozen=True, namespace=namespace)
    extended.__module__ = schema.__module__  # Python 3.12 gives it that of the caller
    return extended


def fields(schema: type, prefix: str = "") -> Iterator[Field]:
    """Every key of a schema with its type, default and help (the string literal under the field)."""
    schema = complete(schema)
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


def _file_layer(path: Path) -> _Layer:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _not_yaml(path, error) from error
    if node is None:
        return _Layer(str(path), OmegaConf.create(), {}, frozenset())
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: a config file is a mapping of sections to keys")
    keys = list(_keys(path, node))
    places = {key: f"{path}:{line}" for key, line, _ in keys}
    try:
        values = typing.cast(DictConfig, OmegaConf.create(text))
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(f"{places.get(key, path)}: {key}: {_first_line(error)}") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # of a tag
        raise _not_yaml(path, error) from error
    return _Layer(str(path), values, places, frozenset(key for key, _, section in keys if section))


def _not_yaml(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return ConfigError(f"{path}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}")
    return ConfigError(f"config file {path} is not valid YAML: {_first_line(error)}")


def _keys(path: Path, node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int, bool]]:
    """Every key of a YAML file, its line, and whether its value is a mapping or null. One that a mapping has twice, at
    any depth, is refused."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _keys(path, item, f"{prefix}{i}.")
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            raise ConfigError(f"{path}:{line}: {key} is set already on line {lines[key]}")
        lines[key] = line
        yield key, line, isinstance(value, yaml.MappingNode) or value.tag == "tag:yaml.org,2002:null"
        yield from _keys(path, value, f"{key}.")


def _override_layer(override: str) -> _Layer:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"command line: '{override}' is not of the form key=value")
    if not is_text(override):
        raise ConfigError(f"command line: {override!r} is not UTF-8")
    try:
        values = OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"command line: {key}: {_first_line(error)}") from error
    keys = dict(_full_keys(OmegaConf.to_container(values)))
    sections = frozenset(key for key, value in keys.items() if value is None or isinstance(value, dict))
    return _Layer("command line", values, dict.fromkeys(keys, "command line"), sections)


def _full_keys(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield f"{prefix}{name}", value
            yield from _full_keys(value, f"{prefix}{name}.")


def _check_keys(schema: type, layer: _Layer) -> None:
    """Raise unless all keys of a layer are known. One text, where a list of texts is due, becomes a list of one."""
    for key, place in layer.places.items():
        hint = _check_key(schema, key, place)
        if dataclasses.is_dataclass(hint) and key not in layer.sections:
            names = ", ".join(_names(typing.cast(type, hint)))
            raise ConfigError(f"{place}: {key} is a section with keys of its own: {names}")
        if tuple[str, ...] in (hint, *typing.get_args(hint)):
            value = OmegaConf.select(layer.values, key, throw_on_resolution_failure=False)
            if isinstance(value, str):
                OmegaConf.update(layer.values, key, [value])


def _check_key(schema: type, key: str, where: str) -> Any:
    """Raise unless `key` names a field of `schema`; returns its type, that of a section without `| None`."""
    hint: Any = None
    section: type | None = schema
    prefix = ""
    for part in key.split("."):
        if section is None:  # inside a free mapping, whose keys are the user's own
            return None
        names = _names(section)
        if part not in names:
            raise ConfigError(f"{where}: unknown key '{prefix}{part}'{_suggest(schema, prefix, part, names)}")
        hint = typing.get_type_hints(section)[part]
        section = typing.cast(type, _plain(hint)) if dataclasses.is_dataclass(_plain(hint)) else None
        prefix += f"{part}."
    return section or hint


def _suggest(schema: type, prefix: str, part: str, names: list[str]) -> str:
    """The right key: by another name (`schema.also_called`), spelling, the name alone, or its help."""
    keys = {**getattr(schema, "also_called", {}), **{name: f"{prefix}{name}" for name in names}}
    near = difflib.get_close_matches(part, keys, n=1) or [name for name in names if part in name]
    found = [keys[name] for name in near]
    if not found:  # slower: it reads all sections' sources
        known, words = list(fields(schema)), [word for word in part.lower().split("_") if len(word) > 2]
        found = [field.key for field in known if field.key.rsplit(".", 1)[-1] == part]
        if len(words) > 1:
            found += [field.key for field in known if all(word in field.help.lower() for word in words)]
    return f"; did you mean '{found[0]}'?" if found else f"; valid here: {', '.join(names)}"


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
    """The string literal that follows each field in the source of a dataclass and of those it inherits from."""
    found = {}
    for field, after in itertools.chain.from_iterable(map(_statements, reversed(schema.__mro__))):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[field.target.id] = " ".join(after.value.value.split())
    return found


@functools.cache
def _statements(schema: type) -> tuple[tuple[ast.stmt, ast.stmt], ...]:
    """Every statement of a dataclass with the one after it."""
    if not dataclasses.is_dataclass(schema):
        return ()
    found = _classes(inspect.getfile(schema)).get(schema.__qualname__)
    if found is None:  # within another class or a function
        source = ast.parse(textwrap.dedent(inspect.getsource(schema)))
        found = typing.cast(ast.ClassDef, source.body[0])
    return tuple(itertools.pairwise(found.body))


@functools.cache
def _classes(file: str) -> Mapping[str, ast.ClassDef]:
    """The classes of a module; `inspect.getsource` would parse it anew for each of them."""
    return {node.name: node for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.ClassDef)}


_WORDS = (
    (r".* is not a TupleConfig, ListConfig, list, or tuple\.", "it takes a list: write [a, b]"),
    (r"TupleConfig length (\d+) does not match type hint length (\d+)", r"it has \1 values and needs \2"),
    (
        r"Value '(.*)' of type '\w+' is incompatible with type hint '(?:Optional\[)?Union\[float, tuple\[str, .*",
        r"it takes a number with a decimal point (0.5), a name or a list of names ([a, b]), not \1",
    ),
    (r"Incompatible value 'None' for field of type '(\w+)'.*", r"it needs a value (\1)"),
    (r"while parsing a flow .*", "its value is not YAML: is a bracket or a quote left open?"),
)
"""What OmegaConf and YAML say, and what it means to the writer of a configuration."""


def _first_line(error: BaseException) -> str:
    line = first_line(error)
    for pattern, words in _WORDS:
        if match := re.fullmatch(pattern, line):
            return match.expand(words)
    return line
