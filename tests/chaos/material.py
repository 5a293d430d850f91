# SPDX-License-Identifier: Apache-2.0
"""The target and the prompts of all seeds, and the losses of runs that nothing happens to."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.seed import Losses, Run
from tests.tiny import make_conversations, make_target


class Material:
    def __init__(self, directory: Path):
        self._directory = directory
        self.files = make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")
        self._losses: dict[str, Losses] = {}

    def undisturbed(self, world: str) -> Losses:
        world = "split" if world == "two" else world  # they have the same, bit for bit
        if world not in self._losses:
            run = Run(self._directory / world, self.files, world)
            run.disk.mkdir(parents=True)
            run.start()
            try:
                for process in run.processes.values():
                    assert process.end(300) == 0, run.said()
                assert not run.remains()
                self._losses[world] = run.losses()
            finally:
                run.clear()
        return self._losses[world]
