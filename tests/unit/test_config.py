# SPDX-License-Identifier: Apache-2.0
"""Configuration errors name the key, the file and the nearest valid name."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from omegaconf import MISSING

from specdist.core import config
from specdist.core.errors import ConfigError, DataError
from specdist.job.config import JobConfig, load_job


@dataclass(frozen=True)
class Inner:
    length: int = 7
    """How long."""
    kind: Literal["a", "b"] = "a"
    options: dict[str, int] = field(default_factory=dict)
    length_max: int = 10

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ConfigError(f"inner.length is >= 0, not {self.length}", "inner.length")
        if self.length > self.length_max:
            raise ConfigError(
                f"inner.length_max ({self.length_max}) is less than inner.length ({self.length})",
                "inner.length_max inner.length",
            )


@dataclass(frozen=True)
class Outer:
    path: str = MISSING
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    kinds: tuple[Literal["a", "b"], ...] = ()
    pair: tuple[float, float] = (0.0, 0.0)


def write(tmp_path, text, name="x.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_files_merge_in_order_and_overrides_win(tmp_path):
    one = write(tmp_path, "path: p\nnames: [x, y]\ninner: {length: 1, options: {free: 1}}\n", "one.yaml")
    two = write(tmp_path, "inner: {length: 2}\n", "two.yaml")
    loaded = config.load(Outer, [one, two], ["inner.kind=b"])
    assert loaded == Outer("p", ("x", "y"), Inner(2, "b", {"free": 1}))


def test_one_name_is_a_list_of_one(tmp_path):
    assert config.load(Outer, [write(tmp_path, "path: p\nnames: a\n")]).names == ("a",)
    assert config.load(Outer, [], ["path=p", "names=b.jsonl"]).names == ("b.jsonl",)


def test_saved_yaml_loads_to_the_same_value(tmp_path):
    loaded = config.load(Outer, [write(tmp_path, "path: p\nnames: [a]\n")])
    assert config.load(Outer, [write(tmp_path, config.to_yaml(loaded), "saved.yaml")]) == loaded


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("path: p\ninner:\n  lenght: 3\n", [], r"x\.yaml:3: unknown key 'inner\.lenght'; did you mean 'inner\.length'"),
        ("path: p\nlength: 3\n", [], r"x\.yaml:2: unknown key 'length'; did you mean 'inner\.length'"),
        ("path: p\nzzz: 3\n", [], r"x\.yaml:2: unknown key 'zzz'; valid here: path, names, inner, kinds, pair"),
        ("path: p\ninner:\n  length: many\n", [], r"x\.yaml:3: inner\.length: .*'many'.*Integer"),
        (
            "path: p\ninner: 3\n",
            [],
            r"x\.yaml:2: inner is a section with keys of its own: length, kind, options, length_max",
        ),
        ("path: p\n", ["inner.kind=c"], r"command line: inner\.kind: .*\['a', 'b'\]"),
        ("path: p\n", ["kinds=[a,c]"], r"command line: kinds: Invalid value \['a', 'c'\], expected one of"),
        ("path: p\nkinds: [c]\n", [], r"x\.yaml:2: kinds: Invalid value \['c'\]"),
        ("path: p\n", ["inner.knid=c"], r"command line: unknown key 'inner\.knid'; did you mean 'inner\.kind'"),
        ("path: p\n", ["inner"], r"'inner' is not of the form key=value"),
        ("path: p\n", ["path=a\udcff"], r"command line: 'path=a\\udcff' is not UTF-8"),
        ("path: p\n", ["inner.length=-1"], r"inner\.length is >= 0, not -1"),
        ("names: [a]\n", [], r"path has no value: set it in a config file \(.*x\.yaml\) or as path="),
        ("path: p\ninner: [p\n", [], r"x\.yaml:3: not valid YAML: expected ',' or ']', but got .*\Z"),
        ("path: \0\n", [], r"x\.yaml is not valid YAML: unacceptable character.*\Z"),
        ("path: !!python/object:os.system x", [], r"x\.yaml:1: not valid YAML: could not determine a constructor.*\Z"),
        ("path: !!timestamp x", [], r"x\.yaml is not valid YAML: .*\Z"),
        ("path: " + 9999 * "[", [], r"x\.yaml is not valid YAML: .*recursion.*\Z"),
        ("path: ${nowhere}\n", [], r"path: Interpolation key 'nowhere' not found \(path: .*x\.yaml:1\)"),
        ("path: '${nowhere'\n", [], r"x\.yaml:1: path: "),
        ("path: p\nnames: [a]\npath: q\n", [], r"x\.yaml:3: path is set already on line 1"),
        ("path: p\ninner:\n  options:\n    a: 1\n    a: 2\n", [], r"x\.yaml:5: inner\.options\.a is set .* line 4"),
        ("- path\n", [], r"x\.yaml:1: a config file is a mapping"),
        ("path: p\n", ["names=3"], r"command line: names: it takes a list: write \[a, b\]"),
        ("path: p\nnames: 3\n", [], r"x\.yaml:2: names: it takes a list"),
        ("path: p\n", ["pair=[1]"], r"command line: pair: it has 1 values and needs 2"),
        ("path: p\n", ["inner=3"], r"command line: inner is a section with keys of its own"),
        ("path: p\n", ["path="], r"command line: path: it needs a value"),
        ("path: p\n", ["names=[a"], r"command line: names: its value is not YAML"),
    ],
)
def test_bad_input_is_named(tmp_path, text, overrides, said):
    with pytest.raises(ConfigError, match=said):
        config.load(Outer, [write(tmp_path, text)], overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("inner:\n  length: -1\n", [], "inner.length is >= 0, not -1 (inner.length: {file}:3)"),
        ("inner:\n  length: 1\n", ["inner.length=-1"], "inner.length is >= 0, not -1 (inner.length: command line)"),
        ("names: [a]\n", ["inner={length: -1}"], "inner.length is >= 0, not -1 (inner.length: command line)"),
        (
            "inner:\n  kind: a\n  length_max: 3\n",
            [],
            "inner.length_max (3) is less than inner.length (7) (inner.length_max: {file}:4; inner.length: default)",
        ),
    ],
)
def test_a_section_that_refuses_its_values_says_where_they_came_from(tmp_path, text, overrides, said):
    file = write(tmp_path, f"path: p\n{text}")
    with pytest.raises(ConfigError) as caught:
        config.load(Outer, [file], overrides)
    assert str(caught.value) == said.format(file=file)


def test_the_last_file_to_set_a_key_is_its_source(tmp_path):
    files = [
        write(tmp_path, "inner: {length: 1}\n", "one.yaml"),
        write(tmp_path, "\ninner: {length: -1}\n", "two.yaml"),
    ]
    with pytest.raises(ConfigError, match=r"\(inner\.length: .*two\.yaml:2\)"):
        config.load(Outer, files, ["path=p"])


def test_errors_that_come_long_after_loading_say_where_the_values_came_from(tmp_path):
    file = write(tmp_path, "path: p\n")
    with (
        pytest.raises(DataError) as caught,
        config.Sources([file]).naming(),
        config.Sources([], ["path=q"]).naming(),  # what is nearer knows better, and it is said once
    ):
        raise DataError("path=q is of no use", "path")
    assert str(caught.value) == "path=q is of no use (path: command line)"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        config.load(Outer, [tmp_path / "nowhere.yaml"])


def test_fields_carry_their_help():
    found = {f.key: f for f in config.fields(Outer)}
    assert found["inner.length"].help == "How long."
    assert found["inner.kind"].type == "a | b"


def test_a_plugin_is_imported_before_the_rest_of_the_configuration_is_checked(tmp_path, monkeypatch):
    (tmp_path / "toy_plugin.py").write_text("raise ImportError('toy_plugin was here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path, "run:\n  plugins: [json]\n  plugins_: 1\n")
    with pytest.raises(ConfigError, match=r"'toy_plugin' cannot be imported \(toy_plugin was here\).*command line"):
        load_job([file], ["run.plugins=[toy_plugin]"])
    with pytest.raises(ConfigError, match=r"'no_such_plugin' cannot be imported .*No module named"):
        load_job([], ["run.plugins=[no_such_plugin]"])
    with pytest.raises(ConfigError, match=r"x\.yaml:3: unknown key 'run\.plugins_'"):
        load_job([file])


IMPLEMENTATIONS: dict[str, type] = {}


@dataclass(frozen=True)
class Chosen:
    kind: str = "plain"
    """Which one."""

    @classmethod
    def registered(cls) -> dict[str, object]:
        return {"kind": Literal[("plain", *IMPLEMENTATIONS)], **IMPLEMENTATIONS}


@dataclass(frozen=True)
class WithSections:
    chosen: Chosen = field(default_factory=Chosen)
    count: int = 1


def test_a_schema_with_registered_sections_is_found_in_its_own_module():
    """Its documentation is read from there."""
    assert config.complete(JobConfig).__module__ == JobConfig.__module__


def test_a_registered_implementation_has_a_section_of_its_own(tmp_path, monkeypatch):
    assert config.load(WithSections, []) == config.complete(WithSections)()
    monkeypatch.setitem(IMPLEMENTATIONS, "inner", Inner)
    file = write(tmp_path, "chosen:\n  kind: inner\n  inner:\n    length: 3\n")
    loaded = config.load(WithSections, [file], ["chosen.inner.kind=b"])
    assert isinstance(loaded, WithSections)
    assert loaded.chosen.inner == Inner(length=3, kind="b")
    assert config.complete(type(loaded)) is type(loaded)
    assert config.load(WithSections, [write(tmp_path, config.to_yaml(loaded))]) == loaded
    found = {f.key: f for f in config.fields(WithSections)}
    assert (found["chosen.kind"].type, found["chosen.kind"].help) == ("plain | inner", "Which one.")
    assert found["chosen.inner.length"].help == "How long."
    with pytest.raises(ConfigError, match=r"unknown key 'chosen\.inner\.lenght'; did you mean"):
        config.load(WithSections, [], ["chosen.inner.lenght=1"])
    with pytest.raises(ConfigError, match=r"command line: chosen\.kind: .*'other'"):
        config.load(WithSections, [], ["chosen.kind=other"])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"x\.yaml:3: unknown key 'chosen\.inner'"):
        config.load(WithSections, [file])


@pytest.mark.parametrize("key", ["draft.dp", "draft.cp", "target.replicas", "target.tp"])
def test_more_ranks_than_there_are_anywhere_are_refused_before_they_are_listed(key):
    with pytest.raises(ConfigError, match=rf"{key} is 1000000000: it must be at least 1 and at most 10000"):
        load_job(["configs/quickstart.yaml"], [f"{key}=1000000000"])
