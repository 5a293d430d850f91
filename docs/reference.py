# SPDX-License-Identifier: Apache-2.0
"""Adds every key to the page configuration.md when the site is built, from the configuration's dataclasses."""

from __future__ import annotations

import json
import re
from typing import Any

from omegaconf import MISSING

from specdist.core.config import Field
from specdist.job.keys import COMMON, sections
from specdist.job.sections import ALSO_CALLED, may_change


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs' event: the text of a page before it is converted."""
    return f"{markdown}\n{reference()}" if page.file.src_uri == "configuration.md" else markdown


def reference() -> str:
    """The most common keys as a table of links, then a heading a section and a key, as Markdown."""
    found = list(sections())
    helps = {entry.key: entry.help for section in found for entry in section.entries}
    rows = [f"| [`{key}`](#{key}) | {_text(helps[key].split('. ')[0].rstrip('.'))} |" for key in COMMON]
    lines = ["## What most jobs set\n", "| key | |\n|---|---|", *rows, ""]
    for section in found:
        lines.append(f"## {section.name} {{#{section.name}}}\n\n{_text(section.help)}\n")
        lines += map(_entry, section.entries)
    return "\n".join(lines)


def _entry(entry: Field) -> str:
    default = "required" if entry.default == MISSING else f"default `{json.dumps(entry.default)}`"
    facts = [f"`{entry.type}`", default, *([] if may_change(entry.key) else ["*fixed*"])]
    others = [f"`{name}`" for name, key in ALSO_CALLED.items() if key == entry.key]
    also = f" Elsewhere called {', '.join(others)}." if others else ""
    return f"#### `{entry.key}` {{#{entry.key}}}\n\n{', '.join(facts)}\n\n{_text(entry.help)}{also}\n"


def _text(help_: str) -> str:
    """A docstring as Markdown: what is no code means itself, and pages are links."""
    parts = re.split(r"(`[^`]*`)", help_)
    parts[::2] = [re.sub(r"([*_<\[\]|])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", "".join(parts))
