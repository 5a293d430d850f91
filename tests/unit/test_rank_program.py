# SPDX-License-Identifier: Apache-2.0
"""How a rank that does not train ends."""

from __future__ import annotations

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
