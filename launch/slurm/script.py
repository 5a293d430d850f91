# SPDX-License-Identifier: Apache-2.0
"""The text of a job's batch script. slurm/train.sbatch is that of a job on its command line: the tests hold them
together."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from specdist.core.errors import ConfigError
from specdist.job.launch_config import ContainerConfig, LaunchConfig, NodesConfig

HEADER = """\
#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
"""

SECRET = r"export SPECDIST_TOKEN=${SPECDIST_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}"
BODY = """\
python=({python})
job=({job})

# The secret that admits this job's ranks to each other; srun passes it on.
{secret}

# At the time limit, a preemption or scancel Slurm signals the ranks, which save and leave. This shell waits for them.
trap : TERM USR1 USR2

# One agent a node, which starts a rank for each GPU. The others may end long before the one that evaluates (--wait).
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


def render(config: LaunchConfig, directory: Path, run_dir: Path, snapshot: Path, interpreter: str) -> str:
    """The script of `specdist launch slurm`. Every word that comes from a configuration is quoted.

    Args:
        directory: the job's working directory; this and the other paths are absolute.
        snapshot: of the configuration; the job's output goes beside it, to NUMBER.out.
        interpreter: the Python that runs it, unless a container or launch.slurm.setup decides.
    """
    slurm, container = config.slurm, config.container
    first, *others = slurm.components
    log = str(snapshot.parent).replace("%", "%%") + "/%j.out"
    options = [f"--job-name={slurm.job_name}", f"--chdir={directory}", f"--output={log}"]
    text = HEADER + _directives([*options, *_component(config, first)])
    text += "".join("#SBATCH hetjob\n" + _directives(_component(config, other)) for other in others)
    text += "\n" + "".join(f"{line}\n" for line in slurm.setup)
    mounts = [*dict.fromkeys((directory, run_dir))]
    python = "python" if slurm.setup or container.kind != "none" else interpreter
    return text + _body(config, mounts, [python], shlex.quote(str(snapshot)))


def _body(config: LaunchConfig, mounts: Sequence[Path], python: Sequence[str], job: str) -> str:
    """What runs. `mounts` are the directories that a container needs, the working directory first."""
    if config.container.kind == "apptainer":
        python = [*_apptainer(config.container, mounts), *python]
    container = _pyxis(config.container, mounts) if config.container.kind == "pyxis" else []
    heterogeneous = config.slurm.heterogeneous
    starts = []
    for number in range(len(config.slurm.components)):
        group, cpus = [], "$SLURM_CPUS_ON_NODE"
        if heterogeneous:
            group, cpus = [f"--het-group={number}"], f"${{SLURM_JOB_CPUS_PER_NODE_HET_GROUP_{number}%%[(,]*}}"
        options = [*group, "--kill-on-bad-exit=1", "--wait=0", f'--cpus-per-task="{cpus}"', *container]
        starts.append(" ".join([*options, _run("agent", "--slurm")]))
    verdict = _run("verdict", "--slurm")
    if container:
        group = ["--het-group=0"] if heterogeneous else []
        verdict = " ".join(["srun", *group, "--nodes=1", "--ntasks=1", *container, verdict])
    agents = "srun " + " : \\\n     ".join(starts)
    return BODY.format(secret=SECRET, python=shlex.join(python), job=job, agents=agents, verdict=verdict)


def _run(module: str, *options: str) -> str:
    """The shell words that run one of our modules for the job."""
    return " ".join(['"${python[@]}"', "-m", f"specdist_launch.{module}", *options, '"${job[@]}"'])


def _apptainer(container: ContainerConfig, mounts: Sequence[Path]) -> list[str]:
    binds = [word for mount in _mounted(container, mounts) for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *binds, "--pwd", str(mounts[0]), *container.options, str(container.image)]


def _pyxis(container: ContainerConfig, mounts: Sequence[Path]) -> list[str]:
    options = [f"--container-image={container.image}", f"--container-mounts={','.join(_mounted(container, mounts))}"]
    return [shlex.quote(word) for word in (*options, f"--container-workdir={mounts[0]}", *container.options)]


def _mounted(container: ContainerConfig, mounts: Sequence[Path]) -> list[str]:
    unclear = [path for path in mounts if set(",: ") & set(str(path))]
    if unclear:
        raise ConfigError(f"{unclear[0]} cannot be mounted in a container: no commas, colons or spaces in its path")
    return [*(f"{path}:{path}" for path in mounts), *container.mounts]


def _directives(options: Sequence[str]) -> str:
    for option in options:
        if not option.isprintable():
            raise ConfigError(f"an option of sbatch is one line of text, not {option!r}")
    return "".join(f"#SBATCH {shlex.quote(option)}\n" for option in options)


def _component(config: LaunchConfig, nodes: NodesConfig) -> list[str]:
    """The options of one component: Slurm takes none over from the first to the others. One task a node, which has all
    of it unless the job shares it; the job is signalled to leave, and may be started again."""
    slurm = config.slurm
    of_all = {key: getattr(slurm, key) for key in ("time", "account", "qos", "reservation", "exclude")}
    return [
        *_options(vars(nodes) | of_all),
        "--ntasks-per-node=1",
        *(["--exclusive", "--mem=0"] if slurm.exclusive else []),
        *_options({"cpus_per_task": slurm.cpus_per_task}),
        f"--signal=USR2@{math.ceil(config.stop_before_end_s)}",
        "--requeue",
        "--open-mode=append",
        *slurm.options,
    ]


def _options(asked: Mapping[str, object]) -> list[str]:
    """By keys of launch.slurm, which sbatch writes with dashes."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in asked.items() if value is not None]
