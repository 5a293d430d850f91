# SPDX-License-Identifier: Apache-2.0
"""The text of a job's batch script. slurm/train.sbatch is what `by_hand` returns; the tests hold them together."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdist_launch.config import LaunchConfig
from specdist_launch.slurm_config import ContainerConfig, NodesConfig, SlurmConfig

from specdist.errors import ConfigError

HEADER = """\
#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
"""

ABOUT_BY_HAND = """\
# Train on the nodes of a Slurm job. From the project's directory, with its Python environment active:
#
#     sbatch --nodes 4 slurm/train.sbatch configs/X.yaml key=value
#
# Options of sbatch go before the script's name and override the lines below; delete what your cluster does not know.
# The job is started again where that helps: see docs/slurm.md.
"""

BODY = """\

# At the time limit, a preemption or scancel Slurm signals the ranks, which save and leave. This shell waits for them.
trap : TERM USR1 USR2

# One agent a node, which starts a rank for each GPU. srun takes none of sbatch's --cpus-per-task over by itself.
{agents}

# What came of it? 0: done, 75: to be started again, which keeps the job's id; anything else: given up.
{verdict}
status=$?
if [[ $status == 75 ]]; then
    # Not where Slurm itself ends the job: it requeues a preempted one, and a cancelled one stays cancelled.
    state=$(squeue --noheader --job "$SLURM_JOB_ID" --format %T | sort --unique)
    [[ $state == RUNNING ]] && scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


@dataclass(frozen=True)
class Place:
    """Where a generated job runs and writes, as absolute paths."""

    directory: Path
    """Its working directory."""
    run_dir: Path
    config: Path
    """Its snapshot of the configuration."""
    log: Path
    """The output of the script; %j stands for the job's id."""
    python: str
    """The interpreter, unless a container or launch.slurm.setup decides."""


def by_hand() -> str:
    """The script for submission by hand: the defaults, eight GPUs a node, and the job's words from the command line."""
    config = LaunchConfig()
    options = ["--job-name=specdist", "--output=specdist-%j.out", "--nodes=1", "--gpus-per-node=8"]
    options += [*_whole_nodes(config.slurm), *_rules(config)]
    body = _body(Runtime(config.container, "python", []), config.slurm.components, '"$@"')
    return HEADER + ABOUT_BY_HAND + _directives(options) + body


def render(config: LaunchConfig, place: Place) -> str:
    """The script of `specdist launch slurm`. Every word that comes from a configuration is quoted."""
    slurm, container = config.slurm, config.container
    first, *others = slurm.components
    log = str(place.log.parent).replace("%", "%%") + "/" + place.log.name
    options = [f"--job-name={slurm.job_name}", f"--chdir={place.directory}", f"--output={log}"]
    text = HEADER + _directives([*options, *_component(config, first)])
    text += "".join("#SBATCH hetjob\n" + _directives(_component(config, other)) for other in others)
    text += "".join(f"{line}\n" for line in ("", *slurm.setup) if slurm.setup)
    python = "python" if slurm.setup or container.kind != "none" else shlex.quote(place.python)
    runtime = Runtime(container, python, [place.directory, place.run_dir])
    return text + _body(runtime, slurm.components, shlex.quote(str(place.config)))


@dataclass(frozen=True)
class Runtime:
    """How a command of the job runs: as it is, or in a container."""

    container: ContainerConfig
    python: str
    mounts: Sequence[Path]

    def srun(self) -> list[str]:
        """Options of srun."""
        if self.container.kind != "pyxis":
            return []
        return [
            f"--container-image={self.container.image}",
            f"--container-mounts={','.join(self._mounts())}",
            f"--container-workdir={self.mounts[0]}",
            *self.container.options,
        ]

    def prefix(self) -> list[str]:
        """Words before the interpreter."""
        if self.container.kind != "apptainer":
            return []
        binds = [word for mount in self._mounts() for word in ("--bind", mount)]
        image = str(self.container.image)
        return ["apptainer", "exec", "--nv", *binds, "--pwd", str(self.mounts[0]), *self.container.options, image]

    def command(self, module: str, words: str) -> str:
        """The shell words that run one of our modules."""
        return " ".join([*map(shlex.quote, self.prefix()), self.python, "-m", module, words])

    def _mounts(self) -> list[str]:
        unclear = [path for path in self.mounts if set(",: ") & set(str(path))]
        if unclear:
            raise ConfigError(f"{unclear[0]} cannot be mounted in a container: no commas, colons or spaces in its path")
        return [*dict.fromkeys(f"{path}:{path}" for path in self.mounts), *self.container.mounts]


def _body(runtime: Runtime, components: Sequence[NodesConfig], words: str) -> str:
    agent = runtime.command("specdist_launch.agent", f"--slurm {words}")
    container = [shlex.quote(option) for option in runtime.srun()]
    heterogeneous = len(components) > 1
    starts = []
    for number in range(len(components)):
        group, cpus = [], "$SLURM_CPUS_ON_NODE"
        if heterogeneous:
            group, cpus = [f"--het-group={number}"], f"${{SLURM_JOB_CPUS_PER_NODE_HET_GROUP_{number}%%[(,]*}}"
        starts.append(" ".join([*group, "--kill-on-bad-exit=1", f'--cpus-per-task="{cpus}"', *container, agent]))
    verdict = runtime.command("specdist_launch.verdict", words)
    if container:
        group = ["--het-group=0"] if heterogeneous else []
        verdict = " ".join(["srun", *group, "--nodes=1", "--ntasks=1", *container, verdict])
    return BODY.format(agents="srun " + " : \\\n     ".join(starts), verdict=verdict)


def _directives(options: Sequence[str]) -> str:
    for option in options:
        if not option.isprintable():
            raise ConfigError(f"an option of sbatch is one line of text, not {option!r}")
    return "".join(f"#SBATCH {shlex.quote(option)}\n" for option in options)


def _component(config: LaunchConfig, nodes: NodesConfig) -> list[str]:
    """The options of one component: Slurm takes none over from the first to the others."""
    slurm = config.slurm
    asked = {
        "nodes": nodes.nodes,
        "gpus-per-node": nodes.gpus_per_node,
        "partition": nodes.partition,
        "constraint": nodes.constraint,
        "time": slurm.time,
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "exclude": slurm.exclude,
    }
    return [*_options(asked), *_whole_nodes(slurm), *_rules(config), *slurm.options]


def _whole_nodes(slurm: SlurmConfig) -> list[str]:
    """One task a node, and all the node has, unless the job shares it."""
    whole = ["--exclusive", "--mem=0"] if slurm.exclusive else []
    return ["--ntasks-per-node=1", *whole, *_options({"cpus-per-task": slurm.cpus_per_task})]


def _rules(config: LaunchConfig) -> list[str]:
    """How the job is told to leave, and that it may be started again."""
    return [f"--signal=USR2@{math.ceil(config.stop_before_end_s)}", "--requeue", "--open-mode=append"]


def _options(asked: Mapping[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in asked.items() if value is not None]
