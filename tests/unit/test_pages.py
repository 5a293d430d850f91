# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ and the README: the site builds without a dead link, and what they tell one to type is right."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from specdist.core import config
from specdist.core.attempts import Failure, Kind
from specdist.core.errors import ConfigError, DataError, DiskError, Dismissed, UserError, WorldError
from specdist.core.troubleshooting import ENTRIES, GENERAL, PAGE, entry, linked, place
from specdist.job.sections import JobConfig
from specdist_launch import words
from specdist_launch.cli import parse
from tests.distributed.worlds import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The `specdist` and `./quickstart` commands among a page's indented lines, with those that they go on in."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    found = re.findall(r"^    ((?:specdist|\./quickstart) .*)$", text, re.MULTILINE)
    return [line for line in found if not line.startswith("specdist: ")]


def test_the_site_builds_and_no_link_is_dead(tmp_path: Path) -> None:
    pytest.importorskip("material")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "configuration.html").read_text()
    for key in ("optimizer.lr", "target.sglang.prefill_tokens"):
        assert f'id="{key}"' in reference


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_ones_that_there_are(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They parse; their files exist, and their keys and values are those of the configuration."""
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        name, *arguments = shlex.split(line, comments=True)
        if name == "specdist" and "$JOB" not in arguments and "..." not in arguments:
            try:
                args = parse(arguments)
            except SystemExit:
                pytest.fail(f"{page.name}: {line}")
            given = getattr(args, "config", None) or []
        else:
            given = arguments
        files, overrides = words.split([word for word in given if "X.yaml" not in word and word != "CONFIG"])
        files = [file for file in files if file.endswith(".yaml")]
        if not overrides and not files:
            continue
        filler = [word for word in ("run.dir=x", "target.path=x") if not files]
        try:
            config.load(JobConfig, files, [*filler, *overrides])
        except ConfigError as error:
            pytest.fail(f"{page.name}: {line}\n{error}")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_benchmarks_that_a_page_names_are_ones_that_there_are(page: Path) -> None:
    for part in re.findall(r"specdist bench ([a-z_]+)\b(?!\|)", page.read_text()):
        assert parse(["bench", part]).part == part


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_the_command_that_heads_a_configuration_loads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = re.search(r"^#.*specdist train (configs/.*)$", file.read_text(), re.MULTILINE)
    assert found, "a configuration's head says how it is used"
    files, overrides = words.split(found[1].split())
    config.load(JobConfig, files, overrides)
    assert f"configs/{file.name}" in files


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (ROOT / link).exists(), f"{page.name}: {link}"


def test_every_entry_of_troubleshooting_is_linked_by_the_messages_in_its_title() -> None:
    files = [file for folder in ("specdist", "launch") for file in sorted((ROOT / folder).rglob("*.py"))]
    code = "\n".join(file.read_text() for file in files if file.stem != "troubleshooting")
    messages = re.sub(r"\{[^{}]*\}", "8", re.sub(r'"\s*f?"', "", code)).replace('"', "\n")
    titles = re.findall(r"^### (.*) \{#([\w-]+)\}$", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert {anchor for _, anchor in titles} == {*ENTRIES, *GENERAL.values()}
    for title, anchor in titles:
        if anchor not in ENTRIES:
            continue
        assert anchor in {entry(part.replace("...", "8")) for part in [title, *title.split(", ")]}, title
        assert re.search(ENTRIES[anchor], messages, re.MULTILINE), f"no message is of {anchor}"


def test_every_error_ends_with_its_place() -> None:
    error = ConfigError("no file matches 'chats.jsonl'")
    assert linked(error) == "no file matches 'chats.jsonl' (see docs/troubleshooting.md#no-file)"
    assert set(GENERAL) == set(get_args(Kind))
    for error in (UserError("x"), ConfigError("x"), DataError("x"), WorldError("x"), DiskError("x")):
        kind = Failure.of(error).kind
        assert linked(error) == f"x (see {place('x', kind)})"
        assert place("x", kind) in Failure.of(error).render(Path())
    assert linked(Dismissed("asked to stop")) == "asked to stop"
