# SPDX-License-Identifier: Apache-2.0
"""Configuration errors name the key, the file and the nearest valid name."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from omegaconf import MISSING

from specdist import config
from specdist.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    length: int = 7
    """How long."""
    kind: Literal["a", "b"] = "a"
    options: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ConfigError(f"inner.length is >= 0, not {self.length}")


@dataclass(frozen=True)
class Outer:
    path: str = MISSING
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


def write(tmp_path, text, name="x.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_files_merge_in_order_and_overrides_win(tmp_path):
    one = write(tmp_path, "path: p\nnames: [x, y]\ninner: {length: 1, options: {free: 1}}\n", "one.yaml")
    two = write(tmp_path, "inner: {length: 2}\n", "two.yaml")
    loaded = config.load(Outer, [one, two], ["inner.kind=b"])
    assert loaded == Outer("p", ("x", "y"), Inner(2, "b", {"free": 1}))


def test_saved_yaml_loads_to_the_same_value(tmp_path):
    loaded = config.load(Outer, [write(tmp_path, "path: p\nnames: [a]\n")])
    assert config.load(Outer, [write(tmp_path, config.to_yaml(loaded), "saved.yaml")]) == loaded


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("path: p\ninner:\n  lenght: 3\n", [], r"x\.yaml:3: unknown key 'inner\.lenght'; did you mean 'inner\.length'"),
        ("path: p\nlength: 3\n", [], r"x\.yaml:2: unknown key 'length'; did you mean 'inner\.length'"),
        ("path: p\nzzz: 3\n", [], r"x\.yaml:2: unknown key 'zzz'; valid here: path, names, inner"),
        ("path: p\ninner:\n  length: many\n", [], r"x\.yaml:3: inner\.length: .*'many'.*Integer"),
        ("path: p\ninner: 3\n", [], r"x\.yaml:2: inner is a section with keys of its own: length, kind, options"),
        ("path: p\n", ["inner.kind=c"], r"command line: inner\.kind: .*\['a', 'b'\]"),
        ("path: p\n", ["inner.knid=c"], r"command line: unknown key 'inner\.knid'; did you mean 'inner\.kind'"),
        ("path: p\n", ["inner"], r"'inner' is not of the form key=value"),
        ("path: p\n", ["inner.length=-1"], r"inner\.length is >= 0, not -1"),
        ("names: [a]\n", [], r"path has no value: set it in a config file \(.*x\.yaml\) or as path="),
        ("path: [p\n", [], r"x\.yaml is not valid YAML"),
        ("- path\n", [], r"x\.yaml:1: a config file is a mapping"),
    ],
)
def test_bad_input_is_named(tmp_path, text, overrides, said):
    with pytest.raises(ConfigError, match=said):
        config.load(Outer, [write(tmp_path, text)], overrides)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        config.load(Outer, [tmp_path / "nowhere.yaml"])


def test_fields_carry_their_help():
    found = {f.key: f for f in config.fields(Outer)}
    assert found["inner.length"].help == "How long."
    assert found["inner.kind"].type == "a | b"
