# SPDX-License-Identifier: Apache-2.0
"""Where a draft comes from, as its export says it: run, step, data, configuration, figures, versions."""

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from specdist import __version__
from specdist.core import config
from specdist.generate.config import CHANGEABLE
from specdist.job.config import JobConfig
from specdist.job.run_dir import RunDirectory
from specdist.run.judge import read_evaluation

SECTIONS = ("target", "draft", "prompts", "generate", "train", "optimizer", "run.seed")
"""Of the configuration, what makes a draft what it is."""
WHERE = ("prompts.cache_dir", *(f"generate.{key}" for key in CHANGEABLE))
"""And not where it ran."""


def origin(job: JobConfig, run_dir: RunDirectory, step: int) -> dict[str, Any]:
    """Of the draft after `step` steps; see `specdist.export.card` for what becomes of it."""
    own = f"{__version__}{_commit()}"
    return {
        "run": run_dir.path.absolute().name,
        "step": step,
        "data": list(job.prompts.files),
        "answers": "written by the target" if job.prompts.answers == "target" else "those of the data",
        "versions": {"specdist": own} | {name: version(name) for name in ("torch", "transformers")},
        "configuration": _configuration(job),
        "evaluation": _evaluation(run_dir, step),
    }


def _configuration(job: JobConfig) -> dict[str, Any]:
    values, found = config.to_dict(job), {}
    for entry in config.fields(JobConfig):
        value: Any = values
        for part in entry.key.split("."):
            value = value[part]
        default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        if value != default and entry.key.startswith(SECTIONS) and entry.key not in WHERE:
            found[entry.key] = value
    return found


def _evaluation(run_dir: RunDirectory, step: int) -> dict[str, Any] | None:
    report = read_evaluation(run_dir, step)
    if report is None:
        return None
    total = report.total
    return {
        "acceptance_length": [round(length, 4) for length in total.acceptance_lengths],
        "accepted": [round(share, 4) for share in total.position_acceptance],
        "answers": int(total.answers),
        "tokens": int(total.tokens),
        "agreement": report.agreement,
    }


def _commit() -> str:
    """The commit of a clone that the code runs from, as ` (COMMIT)`; nothing of an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""
