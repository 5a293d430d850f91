# SPDX-License-Identifier: Apache-2.0
"""What cannot be measured is refused in one line that names the option, and mostly before anything is started."""

from __future__ import annotations

import pytest

from specdist_launch.cli import main

CASES = {
    "step --batch 9x9999999": "--batch 9x9999999: 9999999 tokens is more than the 40960 positions of the target",
    "step --batch 0x5": "--batch 0x5: write COUNTxLENGTH",
    "step --batch mixed:0": "--batch mixed:0: write COUNTxLENGTH",
    "step --batch 99999999999x1": "--batch 99999999999x1: write COUNTxLENGTH",
    "step --batch 99999999x9": "--batch 99999999x9: 899,999,991 tokens, and no device takes more than 100,000,000",
    "step --batch mixed:99999999999": "--batch mixed:99999999999: write COUNTxLENGTH",
    "step --repeats 0": "argument --repeats: 0 is not a number from 1 to 100,000,000",
    "step --ranks two": "argument --ranks: two is not a number from 1 to 100,000,000",
    "step --supervised 2": "argument --supervised: 2 is not a number above 0 and at most 1",
    "step --link nan": "argument --link: nan is not a number above 0",
    "step --model nowhere": "argument --model: there is no nowhere/config.json",
    "step --device cuda": "--device cuda: this host has no GPU that torch can use",
    "step draft.nonsense=1": "unknown key 'draft.nonsense'",
    "channel --tp 0": "argument --tp: 0 is not a number from 1 to 100,000,000",
    "channel --products -1": "argument --products: -1 is not a number from 0 to 100,000,000",
    "channel --payload 0": "argument --payload: 0 is not a number above 0",
    "channel --device cuda": "--device cuda: this host has no GPU that torch can use",
    "decode --batch 0": "argument --batch: 0 is not a number from 1 to 100,000,000",
    "decode --model nowhere": "argument --model: there is no nowhere/config.json",
    "decode --device cuda": "--device cuda: this host has no GPU that torch can use",
    "target --items 0": "argument --items: 0 is not a number from 1 to 100,000,000",
    "target --items 8 --sequences 16": "--sequences 16 is more than --items 8",
    "pipeline --length 0": "--length 0: a number of tokens, or mixed",
    "pipeline --supervised 0": "argument --supervised: 0 is not a number above 0 and at most 1",
    "scheduler --speeds 1xmany": "argument --speeds: SPEED or SPEEDxN:",
    "scheduler --speeds 1x99999999999": "argument --speeds: SPEED or SPEEDxN: 99999999999 is not",
    "scheduler --speeds 0x2": "argument --speeds: SPEED or SPEEDxN: 0 is not a number above 0",
    "scheduler --connections -1": "argument --connections: -1 is not a number from 0 to 100,000,000",
    "scheduler --items 0": "argument --items: 0 is not a number from 1 to 100,000,000",
    "stream --sequences -1": "argument --sequences: -1 is not a number from 0 to 100,000,000",
    "stream --ranks 0": "argument --ranks: 0 is not a number from 1 to 100,000,000",
    "startup_store --tp 0": "argument --tp: 0 is not a number from 1 to 100,000,000",
}


def tell(words: str) -> int:
    try:
        return main(["bench", *words.split()])
    except SystemExit as left:  # as argparse says it
        return int(str(left.code))


@pytest.mark.parametrize("words", CASES)
def test_an_option_that_cannot_be(
    words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tell(words) == 2
    said = capfd.readouterr().err
    assert CASES[words] in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.usefixtures("forked_worlds")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--batch 2048x40000", "--batch 2048x40000: its hidden states alone take "),
        ("--batch 1x40 --ranks 2 draft.cp=3", "draft"),
    ],
)
def test_what_only_a_rank_can_know(words: str, told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert tell(f"step --device cpu {words}") == 2
    said = capfd.readouterr().err
    assert told in said.splitlines()[-1]
    assert "Traceback" not in said
