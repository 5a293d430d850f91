# SPDX-License-Identifier: Apache-2.0
"""Host names as Slurm's `--exclude` takes them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence


def compress(hosts: Iterable[str]) -> str:
    """gpu01, gpu02, gpu03, gpu07, login as 'gpu[01-03,07],login'. Duplicates are dropped."""
    names = sorted({_split(host) for host in hosts})
    padded = {(prefix, len(digits)) for prefix, digits in names if digits.startswith("0")}
    families: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for prefix, digits in names:
        # Slurm tells n1 from n01: only numbers of one width stand in one pair of brackets with padded ones.
        width = len(digits) if (prefix, len(digits)) in padded else 0
        families[prefix, width].append(digits)
    return ",".join(word for (prefix, width), digits in families.items() for word in _words(prefix, width, digits))


def _split(host: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*?)(\d*)", host)
    assert match is not None
    return match[1], match[2]


def _words(prefix: str, width: int, digits: Sequence[str]) -> list[str]:
    bare = [prefix] if "" in digits else []
    numbers = sorted(int(text) for text in digits if text)
    if not numbers:
        return bare
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [f"{first:0{width}d}" if first == last else f"{first:0{width}d}-{last:0{width}d}" for first, last in runs]
    return [*bare, f"{prefix}{parts[0]}" if len(numbers) == 1 else f"{prefix}[{','.join(parts)}]"]
