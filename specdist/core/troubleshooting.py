# SPDX-License-Identifier: Apache-2.0
"""Which entry of the page docs/troubleshooting.md is about a message."""

from __future__ import annotations

import re

from specdist.core.errors import DiskError, Dismissed, UserError, WorldError

PAGE = "docs/troubleshooting.md"
ENTRIES = {
    "unknown-key": r"unknown key '",
    "no-file": r"no file matches|^config file .* does not exist",
    "bad-samples": r"samples are bad|are bad\n|not one usable sample|prompts\.on_bad=stop",
    "not-the-model": r"no such directory, nor the id|no usable tokenizer",
    "download": r"hf download|has come no further for|the repository is gated|HF_TOKEN",
    "memory": r"does not fit into|ran out of memory|out of memory|does not fit on one GPU",
    "ranks": r"ranks, but the (world|launcher)|do not divide among|ranks do not fit on|!= \d+ ranks|must both equal",
    "draft-dp": r"draft\.dp is not set",
    "receive-buffer": r"holds \S+ micro-batches",
    "positions": r"is more than the \d+ positions",
    "not-installed": r"pip install|not installed|does not load here",
    "engine": r"hands? out (the )?layers|\(export\.formats=\[",
    "target-differs": r"off by \d",
    "in-use": r" is in use: attempt",
    "other-values": r"with other values of",
    "other-prompts": r"was trained on other prompts",
    "other-steps": r"would make steps of|took sequences in another order",
    "damaged": r"are damaged|complete checkpoint",
    "full-disk": r"takes no more|No space left|Disk quota",
    "cannot-be-written": r"cannot be (written|created)",
    "did-not-join": r"did not come up|did not come to the meeting|did not join"
    r"|did not reach the rendezvous|no answer to its roll",
    "stalled": r"silent for more than|has been computing batch|has not released batch|no target replica delivered"
    r"|did not receive its hidden states|did not take what|messages of it were lost",
    "killed": r"exited without an error message|killed by SIG|it vanished",
    "not-finite": r"not finite|holds NaN",
    "time-limit": r"this job has only|the time limit came",
    "secret": r"secret that admits ranks",
    "tracker": r"^metrics\.wandb",
    "held-out": r"prompts\.holdout is not set|needs held-out text|there is no prompt",
}
"""The anchor of each entry and the messages that it is about, as a regular expression."""

GENERAL = {
    "input": "input",
    "error": "defect",
    "device": "device",
    "lost": "world",
    "world": "world",
    "disk": "full-disk",
}
"""The anchor of the entry about all other messages of a kind (`specdist.core.attempts.Kind`)."""


def linked(error: UserError) -> str:
    """An error's message and the place of the entry about it, which a request to stop has none of."""
    return str(error) if isinstance(error, Dismissed) else f"{error} (see {place(str(error), _kind(error))})"


def place(message: str, kind: str) -> str:
    """The page and anchor of the entry about a message, or else about its kind."""
    return f"{PAGE}#{entry(message) or GENERAL[kind]}"


def entry(message: str) -> str | None:
    """The anchor of the entry about a message; None where there is none."""
    return next((anchor for anchor, pattern in ENTRIES.items() if re.search(pattern, message)), None)


def _kind(error: UserError) -> str:
    if isinstance(error, WorldError):
        return "world"
    return "disk" if isinstance(error, DiskError) else "input"
