# SPDX-License-Identifier: Apache-2.0
"""The run directory: one place for the configuration, the checkpoints, the metrics and the results of a run.

config.yaml            the resolved configuration
draft_vocabulary.safetensors   target ids of the draft vocabulary (absent when it is the whole)
checkpoints/step-*/    training state
answers/               what the target has written, where prompts.answers=target (specdist/generate/files.py)
metrics.jsonl          one record every metrics.every steps
tensorboard/
export/<format>/       the draft as serving engines load it
evaluations/step-*.json   what replay over held-out text found
serve-check/           what engines accept of the export, beside replay (specdist/run/serve_check.py)
summary.json           the results
report.html            the same, to look at (specdist/run/report/)
prompts.json           what came of the prompts, in the words of `specdist prepare`
status.json            the state of the run a few seconds ago
logs/<job>.<restart>/  every attempt's logs, first failure and end (specdist/core/attempts.py)
"""

from dataclasses import dataclass
from pathlib import Path

from specdist.core.errors import ConfigError


class _In:
    """A path in the run directory."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: "RunPaths", owner: type) -> Path:
        return run.path / self._name


@dataclass(frozen=True)
class RunPaths:
    """Paths of a run, without what is done with them: `RunDirectory` (specdist/job/run_dir.py) imports torch."""

    path: Path

    config = _In("config.yaml")
    checkpoints = _In("checkpoints")
    answers = _In("answers")
    answers_progress = _In("answers/progress.json")
    """How far the answers are, there from when they are begun."""
    metrics = _In("metrics.jsonl")
    tensorboard = _In("tensorboard")
    exports = _In("export")
    summary = _In("summary.json")
    prompts = _In("prompts.json")
    status = _In("status.json")

    def absent(self) -> ConfigError:
        """What is wrong where there is no run."""
        return ConfigError(f"{self.path} is no run directory: it has no config.yaml (give the run.dir of a job)")

    def evaluation(self, step: int) -> Path:
        """What held-out text gave after `step` steps."""
        return self.path / "evaluations" / f"step-{step:08d}.json"
