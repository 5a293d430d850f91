# SPDX-License-Identifier: Apache-2.0
"""How a rank that does not train ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from specdist.run import rank_program


def test_a_defect_is_shown_also_once_torch_distributed_holds_the_output_of_its_hook(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    def part() -> int:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rank_program, "leave", leave)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    try:
        rank_program.leave_with(part)
    except OSError as error:
        with pytest.raises(SystemExit, match="1"):  # as the interpreter does
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        dist.destroy_process_group()
    assert "No space left on device" in capfd.readouterr().err


def test_a_rank_whose_reader_is_gone_does_its_part() -> None:
    script = """
import sys
from specdist.run import rank_program
rank_program.load_job, rank_program.RankFacts.from_environment = lambda *_: None, lambda: None
def part(*_):
    for stream in (sys.stdout, sys.stderr):
        print("a table", file=stream, flush=True)
    return 7
sys.exit(rank_program.rank_status(part, "m", None, ["--config", "x"]))
"""
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=writer, timeout=300).returncode == 7
    os.close(writer)
