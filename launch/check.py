# SPDX-License-Identifier: Apache-2.0
"""`specdist check`: all of a job that can be checked without a GPU in about a minute; its exit status serves a CI."""

from collections.abc import Callable, Sequence
from pathlib import Path

from specdist.core.errors import UserError
from specdist.core.troubleshooting import linked
from specdist_launch import words


def check(config: Sequence[str], gpu_memory: str) -> int:
    """Print what is right and what is not; 0 where all is. Raises UserError where the configuration itself is wrong."""
    from specdist.channel.config import parse_bytes
    from specdist.core.files import unwritable
    from specdist.job.config import check_installed
    from specdist.job.plan import make_plan
    from specdist.run.answers import look_ahead
    from specdist_launch.ranks import world_size

    job = words.load_checked(config)
    print(f"ok      configuration and target: {job.target.path}; run directory {job.run.dir}")

    def libraries() -> str:
        check_installed(job, target=job.world.mode != "draft_only" and job.world.role != "draft")
        return "all that the job asks for are installed"

    def memory() -> str:
        if job.world.mode == "split" and job.draft.dp is None:
            return "not estimated: draft.dp is left to the machine"
        if job.world.device == "cpu":
            return "not estimated: the job is for the CPU"
        plan = make_plan(job, ["node0"] * world_size(job, 0), parse_bytes(gpu_memory, "--gpu-memory"))
        if not plan.fits:
            raise UserError(f"does not fit into {gpu_memory} (--gpu-memory); `specdist plan` shows the parts")
        return f"{plan.topology.world_size} ranks; estimated to fit into {gpu_memory} a GPU (--gpu-memory)"

    def prompts(key: str = "prompts.files") -> str:
        found = look_ahead(job, key)
        if not found.report.kept:
            raise UserError(f"not one usable sample among the first\n{found.report}")
        if found.report.bad_total > job.prompts.max_bad_fraction * found.report.samples:
            raise UserError(f"more of the first than prompts.max_bad_fraction are bad\n{found.report}")
        if not found.report.tokens:
            bad = f", {found.report.bad_total} cannot" if found.report.bad_total else ""
            return f"{found.files} files; of the first records the target can answer {found.report.kept}{bad}"
        return f"{found.files} files, about {found.tokens:,.0f} tokens; of the first records: {found.report}"

    def directory() -> str:
        path = Path(job.run.dir).absolute()
        above = next(parent for parent in (path, *path.parents) if parent.exists())
        if (error := unwritable(above)) is not None:
            raise UserError(f"{above} cannot be written: {error}")
        return f"{above} can be written"

    checks = {"libraries": libraries, "memory": memory, "run.dir": directory, "prompts": prompts}
    if isinstance(job.prompts.holdout, tuple):
        checks["held out"] = lambda: prompts("prompts.holdout")
    passed = [_passes(what, run) for what, run in checks.items()]  # all of them, whatever the first says
    return 0 if all(passed) else 1


def _passes(what: str, run: Callable[[], str]) -> bool:
    try:
        print(f"ok      {what}: {run()}", flush=True)
    except UserError as error:
        print(f"FAILED  {what}: {linked(error)}", flush=True)
        return False
    return True
