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


@dataclass(frozen=True)
class RunPaths:
    """Paths of a run, without what is done with them: `RunDirectory` (specdist/job/run_dir.py) imports torch."""

    path: Path

    def absent(self) -> ConfigError:
        """What is wrong where there is no run."""
        return ConfigError(f"{self.path} is no run directory: it has no config.yaml (give the run.dir of a job)")

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def answers(self) -> Path:
        return self.path / "answers"

    @property
    def answers_progress(self) -> Path:
        """There while answers are written."""
        return self.answers / "progress.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def exports(self) -> Path:
        return self.path / "export"

    def evaluation(self, step: int) -> Path:
        """What held-out text gave after `step` steps."""
        return self.path / "evaluations" / f"step-{step:08d}.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"
