# SPDX-License-Identifier: Apache-2.0
"""One rank's way into a run: world, prompts, groups, control plane, then its role."""

import contextlib
import functools
from pathlib import Path

from torch import Tensor

from specdist.channel.encoding import row_bytes
from specdist.core import config, hub
from specdist.core.errors import DataError, say
from specdist.core.files import to_json
from specdist.core.launch_env import RankFacts, run_token
from specdist.core.run_lock import Claim, fence
from specdist.core.stop import StopFlag
from specdist.core.team import SILENCE_S, Team
from specdist.core.topology import Topology
from specdist.export import load_exported
from specdist.job import config as jobs
from specdist.job.config import JobConfig
from specdist.job.rates import evaluation_weight, packing_weights
from specdist.job.resume_plan import ResumePlan, find_resume_plan, warn_of_few
from specdist.job.run_dir import RunDirectory
from specdist.prompts.corpus import frequent_tokens
from specdist.prompts.prepare import prepare_in_world
from specdist.run.answers import answered_prompts
from specdist.run.context import Start, WorldContext
from specdist.run.control_plane import await_run, connected, serving
from specdist.run.draft_role import consume
from specdist.run.preflight.preflight import Preflight
from specdist.run.rank_log import RankLog
from specdist.run.target_loop import produce
from specdist.run.timeline import collect
from specdist.run.worlds.target_world import TargetWorld
from specdist.target.registry import engine_groups
from specdist.training.metrics import check_trackers
from specdist.training.profile import NO_PROFILE, PartInfo, Profile, find_traced_steps
from specdist.world.groups import World, join_world, make_groups
from specdist.world.links import connect_links

UNSEEN = """
specdist: no text is held out (prompts.holdout=0.02 would): nothing will say how many of its tokens serving accepts"""


def run(job: JobConfig, facts: RankFacts, start: Start) -> None:
    """Take part in the run as rank `facts.rank`; returns when the run is done or was asked to stop."""
    run_token()  # each rank for itself, before it waits for others
    job_facts = jobs.examine(job)
    jobs.check_replay(job)
    check = fence(jobs.home(job, start.attempt))
    start.clock.begin("meeting the other ranks")
    world = join_world(job.world, facts)
    start.join(world.attempt, jobs.home(job, world.attempt))
    held = functools.partial(check, start.attempt.name)
    topology = jobs.topology(job, world.hosts, world.roles)
    _place_log(start.log, topology, facts.rank)
    jobs.check_installed(job, target=topology.target_place(facts.rank) is not None)
    if facts.rank in topology.draft_ranks[:1]:
        check_trackers(job.metrics)
    start.clock.begin("preflight")
    preflight = Preflight(job, world, topology, file=start.log.path)
    preflight.hosts(job_facts)
    start.clock.begin("target's files and answers")
    fetch_target(job.target.path, world)
    asked = answered_prompts(job, world, held)
    start.clock.begin("prompts")
    prompts = prepare_in_world(asked, job_facts.target.path, world.store, world.hosts, facts.rank)
    prompts.check_vocabulary(job_facts.target.vocab_size)
    backend = jobs.transport(job, world.device).link_backend
    engine = engine_groups(job.target, topology.replicas, world.device)
    start.clock.begin("process groups")
    context = WorldContext(
        job=job,
        facts=job_facts,
        start=start,
        world=world,
        topology=topology,
        groups=make_groups(topology, world, backend, job.world.wait_timeout_s, engine),
        prompts=prompts,
        stop=StopFlag(start.attempt.deadline, job.launch.stop_before_end_s),
        run_dir=RunDirectory(Path(job.run.dir), held),
    )
    if job.world.role == "target":
        TargetWorld(context).run()
    else:
        _take_part(context, preflight)


def fetch_target(path: str, world: World, silence_s: float = SILENCE_S) -> None:
    """Have the first rank of every host download what its host lacks; returns when all hosts have it. Raises DataError:
    see `hub.resolve`, or hosts have different commits in their caches; on all ranks. WorldError: a rank that downloads
    has come no further for `silence_s` seconds."""
    rank, hosts, commits = world.facts.rank, world.hosts, dict[str, str]()
    firsts = sorted({hosts.index(host) for host in set(hosts)})
    team = Team(world.store, "target", f"downloads {path}", rank, hosts, silence_s)
    with team.telling_errors():
        if rank in firsts:
            progress = rank == 0
            found = hub.resolve(
                path, "target.path", weights=True, progress=progress, say=lambda _, text: team.tell(text)
            )
            team.put(str(rank), "a directory" if found == Path(path).expanduser() else found.name)
        for first in firsts:
            commits[hosts[first]] = team.wait(str(first), first)
    if len(set(commits.values())) > 1:
        listed = ", ".join(f"{host} has {commit}" for host, commit in commits.items())
        raise DataError.at("target.path", f"={path}: the hosts have different ones ({listed}): name ORG/NAME@COMMIT")


def _take_part(context: WorldContext, preflight: Preflight) -> None:
    """The part of a rank of a world that leads its run."""
    topology, rank = context.topology, context.rank
    context.start.clock.begin("control plane")
    with contextlib.ExitStack() as stack:
        if rank == 0:
            resume = _begin(context, stack)
            context = context.accumulating(resume.schedule.accumulation)
            profile = _profile(context, resume)
            control = stack.enter_context(serving(context, resume, profile))
        else:
            resume, control = await_run(context)
            context = context.accumulating(resume.schedule.accumulation)
            profile = _profile(context, resume)
        client = stack.enter_context(connected(context, control, profile))
        stack.enter_context(profile.recording(client.ask_clock))
        context.stop.install()  # before, no rank could be notified, and there is nothing to save
        client.phase = "connecting links"
        context.start.clock.begin(client.phase)
        connect_links(topology, context.groups, context.world, context.job.world.join_timeout_s)
        preflight.links(context.groups)
        role = produce if topology.draft_place(rank) is None else consume
        role(context.in_run(resume, client, profile))
    if profile.on and rank == 0:  # all ranks have left
        _put_trace_together(context)


def _place_log(log: RankLog, topology: Topology, rank: int) -> None:
    target, draft = topology.target_place(rank), topology.draft_place(rank)
    log.move_to("colocated" if target and draft else "target" if target else "draft")
    if topology.draft_ranks and rank == topology.draft_ranks[0]:
        log.show_on_terminal()


def _begin(context: WorldContext, stack: contextlib.ExitStack) -> ResumePlan:
    """On rank 0: claim the run directory until `stack` is left, where no agent of ours holds it already, check it, find
    where the run starts, and record the attempt. Raises ConfigError: it is another run's, in use, or read-only."""
    job, run_dir, record = context.job, context.run_dir, context.record
    run_dir.create()
    claimed = record.started() is not None
    if not claimed:  # plain torchrun
        stack.enter_context(Claim(run_dir.path, context.start.attempt.name, context.world.facts.host))
    run_dir.check(job)
    resume = find_resume_plan(
        job,
        run_dir,
        context.prompts.training,
        context.topology.shards,
        packing_weights(job, context.facts),
        context.evaluation_items(),
        evaluation_weight(job, context.facts),
        context.topology.pods,
    )
    if resume.checkpoint is None:  # a run that was saved keeps the vocabulary it has
        run_dir.save_vocabulary(_draft_vocabulary(context))
    run_dir.write(run_dir.config, config.to_yaml(job))
    run_dir.write(run_dir.prompts, to_json(context.prompts.tables()))
    if not claimed:
        record.begin(context.begun(resume.progress.step))
    _introduce(context, resume)
    return resume


def _draft_vocabulary(context: WorldContext) -> Tensor | None:
    """The target ids of a new run's draft vocabulary, None for all of them."""
    draft, whole = context.job.draft, context.facts.target.vocab_size
    if draft.init_from is not None:
        ids = load_exported(jobs.initial_draft(context.job)).vocabulary
    elif draft.chosen.vocab_size is not None:
        ids, coverage = frequent_tokens(context.prompts, draft.chosen.vocab_size, whole)
        say(f"the draft vocabulary covers {coverage:.2%} of the tokens in the loss")
    else:
        return None
    return ids if ids is not None and len(ids) < whole else None


def _introduce(context: WorldContext, resume: ResumePlan) -> None:
    job, topology, prompts = context.job, context.topology, context.prompts
    target = f"{len(topology.replicas)} target replica(s) x tp {job.target.tp}, "
    if job.world.role == "draft":
        target = "target replicas join it (specdist train CONFIG --role target), "
    start = f"resuming from {resume.checkpoint.name}" if resume.checkpoint else "starting"
    done, total = resume.progress.step, resume.total_steps
    steps = f"{total - done} steps to go" if done < total else f"{done} of {total} steps are done, nothing to train"
    per_token = sum(row_bytes(context.facts.layout, job.channel.dtype))
    heldout = prompts.heldout
    held_out = f" ({len(heldout)} more held out, {heldout.tokens:,} tokens)" if heldout is not None else ""
    told = [] if total == 0 or resume.checkpoint else prompts.bad_samples().splitlines()
    if job.train.steps is None:
        told += warn_of_few(total)
    say(
        f"{topology.mode} world of {topology.world_size} ranks: {target}"
        f"{len(topology.draft)} draft rank(s). {len(prompts.training):,} sequences, "
        f"{prompts.training.tokens:,} tokens{held_out}, {per_token:,} B of features per token. "
        f"{start}: {steps}. {resume.note}{' ' * bool(resume.note)}Run directory {job.run.dir}"
        + "".join(f"\nspecdist: {line}" for line in told)
        + (UNSEEN if heldout is None and topology.mode in ("split", "colocated") else ""),
    )


def _profile(context: WorldContext, resume: ResumePlan) -> Profile:
    """This rank's profile, where the job asks for one and this start comes to the steps it asks for."""
    job, rank = context.job, context.rank
    traced = find_traced_steps(job.trace, resume.schedule)
    if job.trace.steps is not None and rank == 0:
        what = "nothing is traced" if traced is None else f"steps {traced[0].start} to {traced[0][-1]} are traced"
        first = resume.progress.step + 1
        say(f"{what}; this start does steps {first} to {resume.total_steps}")
    if traced is None:
        return NO_PROFILE
    topology, (steps, items) = context.topology, traced
    about = rank, topology.world_size, topology.describe(rank), topology.hosts[rank]
    info = PartInfo(*about, steps.start, steps[-1], (items.start, items.stop))
    return Profile(info, context.world.device, context.record.trace_parts)


def _put_trace_together(context: WorldContext) -> None:
    try:
        text = collect(context.record) or "is empty: this start ended before the traced steps"
    except (OSError, DataError) as error:  # the run itself is done
        text = f"could not be put together: {error}"
    say(f"trace {text}")
