# SPDX-License-Identifier: Apache-2.0
"""Tables and amounts as plain text."""

import io
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table


def table(title: str, columns: str, rows: Iterable[Iterable[str | None]]) -> Table:
    """`columns`: their names, between commas; behind a `>` to the right. A cell that is None is unknown."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in columns.split(", "):
        right = column.startswith(">")
        made.add_column(column.removeprefix(">"), overflow="fold", justify="right" if right else "left")
    for row in rows:
        made.add_row(*("unknown" if cell is None else cell for cell in row))
    return made


def plain(parts: Iterable[Table | str], width: int) -> str:
    """Tables of at most `width` columns, and lines as they are."""
    out = io.StringIO()
    console = Console(file=out, width=width)
    for part in parts:
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def amount(size: float) -> str:
    """Of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
