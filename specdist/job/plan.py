# SPDX-License-Identifier: Apache-2.0
"""What a job will look like, worked out on a machine without a GPU: ranks, links, bytes and memory.

Memory figures are estimates: weights, optimizer state and buffers are counted exactly, the target's activations by the
rule stated beside them, the draft's step by what it keeps (`Cost.step_bytes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from transformers import PretrainedConfig

from specdist.channel.encoding import is_encoded, row_bytes
from specdist.core.errors import ConfigError
from specdist.core.launch_env import Role
from specdist.core.records import ARGMAX_LSE_BYTES
from specdist.core.text import amount, plain, table
from specdist.core.topology import Topology
from specdist.draft.build import blank_draft, parameter_count
from specdist.draft.config import DraftConfig
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.job.rates import estimated
from specdist.target.head import CHUNK
from specdist.target.registry import ENGINES
from specdist.training.config import OptimizerConfig
from specdist.world.groups import ranges

_COPY, _WRITE = 5e9, 1e9
"""Bytes/s that a draft rank copies its state to the host with, and that a shared file system takes; both are modest."""
_KILL_WAIT_S = 30


@dataclass(frozen=True)
class Need:
    """One part of the memory of a role, in bytes; `host`: page-locked memory of the host, and not of the GPU."""

    role: str
    what: str
    bytes: int
    host: bool = False


@dataclass(frozen=True)
class Plan:
    """A job as it would run. `needs` are per rank of the role; `limit` is the memory of one GPU, in bytes."""

    job: JobConfig
    facts: JobFacts
    topology: Topology
    needs: tuple[Need, ...]
    limit: int

    def demand(self) -> dict[str, int]:
        """Bytes of GPU memory that each kind of rank needs; in colocated mode one rank needs both roles'."""
        totals = dict.fromkeys([need.role for need in self.needs], 0)
        for need in self.needs:
            totals[need.role] += 0 if need.host else need.bytes
        return {"target + draft": sum(totals.values())} if self.topology.mode == "colocated" else totals

    @property
    def on_gpus(self) -> bool:
        """Not where the job itself asks for the CPU."""
        return self.job.world.device != "cpu"

    @property
    def fits(self) -> bool:
        """True on the CPU, whose memory `limit` says nothing of."""
        return not self.on_gpus or all(total <= self.limit for total in self.demand().values())


def make_plan(job: JobConfig, hosts: Sequence[str], limit: int, roles: Sequence[Role | None] = ()) -> Plan:
    """Work out the plan of a job on `hosts` (one entry a rank) with `limit` bytes of memory per GPU. `roles`: those
    that a launcher would give to the nodes of the ranks. Of the target, config.json is enough. Raises ConfigError,
    DataError: what could not be, with the arithmetic."""
    return plan_of(job, jobs.examine(job, weights=False), jobs.topology(job, hosts, roles), limit)


def plan_of(job: JobConfig, facts: JobFacts, topology: Topology, limit: int) -> Plan:
    needs: list[Need] = []
    if topology.replicas:
        needs += _target_needs(job, facts, topology)
    if topology.draft:
        needs += _draft_needs(job, facts, topology)
    return Plan(job, facts, topology, tuple(needs), limit)


def nodes_of_roles(job: JobConfig, target_nodes: int, draft_nodes: int) -> tuple[list[str], list[Role]]:
    """The hosts and roles of the ranks of a heterogeneous job: `target_nodes` equal machines target0, target1, ... and
    `draft_nodes` equal ones of the draft. Raises ConfigError."""
    if job.draft.dp is None:
        raise ConfigError.at("draft.dp", "is not set: it says how many ranks the draft's nodes have")
    target, draft = job.target.replicas * job.target.tp, job.draft.dp * job.draft.cp
    kinds: list[tuple[Role, str, int, int]] = [
        ("target", "target.replicas x target.tp", target, target_nodes),
        ("draft", "draft.dp x draft.cp", draft, draft_nodes),
    ]
    hosts: list[str] = []
    roles: list[Role] = []
    for role, product, ranks, nodes in kinds:
        if ranks % nodes:
            raise ConfigError(f"{product} = {ranks} ranks do not divide among {nodes} {role} nodes")
        hosts += [f"{role}{n}" for n in range(nodes) for _ in range(ranks // nodes)]
        roles += [role] * ranks
    return hosts, roles


def _target_needs(job: JobConfig, facts: JobFacts, topology: Topology) -> list[Need]:
    width = facts.target_dtype.itemsize
    shards = topology.shards // len(topology.replicas) if topology.mode == "colocated" else topology.shards
    tokens = max(shards, 1) * job.prompts.tokens_per_rank
    buffers = {"split": job.channel.send_buffers, "colocated": job.train.accumulation}.get(topology.mode, 1)
    parts = ENGINES[job.target.engine].memory(job.target, facts.target, facts.target_dtype, tokens)
    sent = sum(row_bytes(facts.layout, job.channel.dtype))
    size = sent if topology.mode == "split" else facts.layout.bytes_per_token
    parts[f"{buffers} feature buffers of {tokens:,} tokens"] = buffers * tokens * size
    if topology.mode == "split" and is_encoded(facts.layout, job.channel.dtype):
        parts[f"features of {tokens:,} tokens before they are encoded"] = tokens * facts.layout.bytes_per_token
    if job.target.verify:  # a packed batch and one of its documents alone, then three fp32 copies of a layer
        compared = tokens * (2 * facts.layout.bytes_per_token + 3 * 4 * facts.target.hidden_size)
        parts[f"target.verify: features of {tokens:,} tokens twice, and their difference"] = compared
    if facts.layout.argmax_lse or (job.prompts.holdout and topology.mode in ("split", "colocated")):
        head = facts.target.vocab_size * (facts.target.hidden_size // job.target.tp + CHUNK // job.target.tp) * width
        parts[f"output head, and logits of {CHUNK:,} tokens"] = head
        if not facts.layout.final:
            parts[f"last hidden states of {tokens:,} held-out tokens"] = tokens * facts.target.hidden_size * width
    return [Need("target", part, size) for part, size in parts.items()]


def _draft_needs(job: JobConfig, facts: JobFacts, topology: Topology) -> list[Need]:
    tokens, ranks = job.prompts.tokens_per_rank, len(topology.draft_ranks)
    parts = training_memory(
        job.draft, facts.target.config, facts.target.tied, facts.target_dtype.itemsize, tokens, ranks, job.optimizer
    )
    needs = [Need("draft", part, size) for part, size in parts.items()]
    if job.draft.chosen.embedding_on_host:
        table = facts.target.vocab_size * facts.target.hidden_size * facts.target_dtype.itemsize
        locked = 1 << (table - 1).bit_length()  # torch locks pages in powers of two
        needs.append(Need("draft", "target embedding, in page-locked host memory", locked, host=True))
    if topology.mode == "split":
        slots = jobs.slots(job, facts.layout)
        ring = slots * tokens * sum(row_bytes(facts.layout, job.channel.dtype))
        needs.append(Need("draft", f"receive buffer of {slots} slots", ring))
        if is_encoded(facts.layout, job.channel.dtype):
            step = job.train.accumulation * tokens
            size = step * facts.layout.bytes_per_token
            needs.append(Need("draft", f"features of {step:,} tokens as they are read", size))
    return needs


def state_bytes(draft: DraftConfig, target: PretrainedConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of what is trained: weights, AdamW's two moments or Muon's one, and a moving average, all in fp32."""
    blank = blank_draft(draft, target)
    sizes = {name: parameter.numel() for name, parameter in blank.named_parameters()}
    muon = sum(sizes[name] for name in blank.matrices()) if optimizer.method == "muon" else 0
    return 4 * ((3 + bool(optimizer.ema)) * sum(sizes.values()) - muon)


def training_memory(
    draft: DraftConfig,
    target: PretrainedConfig,
    tied: bool,
    itemsize: int,
    tokens: int,
    ranks: int,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
) -> dict[str, int]:
    """Bytes on one of `ranks` draft ranks that trains with micro-batches of `tokens`, without the features. `tied`:
    whether the target's embedding is its head. `itemsize`: bytes of a number of the target's tables."""
    parameters, cost = parameter_count(draft, target), draft.chosen.cost(target)
    shards = ranks if draft.sharding == "fsdp" else draft.cp
    compute = 4 if draft.dtype == "float32" else 2
    step = cost.step_bytes(tokens, -(-tokens // draft.cp), compute, draft.compile)
    tables = cost.frozen_rows(tied) * target.get_text_config().hidden_size * itemsize
    # Gradients come when what the steps kept has gone: as they are computed, in fp32 to be reduced, and this rank's.
    gradients = (compute + 4) * parameters + 4 * parameters // shards
    graphs: dict[str, int] = {}
    if draft.cuda_graphs:  # read and write copies; and what comes after them has none of their memory
        width = draft.chosen.layout(target, torch.bfloat16).width
        graphs = {"copies for CUDA graphs": compute * parameters + itemsize * width * tokens}
    return {
        f"fp32 weights and state of the optimizer / {shards}": state_bytes(draft, target, optimizer) // shards,
        "weights to compute with": compute * parameters,
        "target head" if draft.chosen.embedding_on_host else "target embedding and head": tables,
        **step,
        **graphs,
        "gradients, beyond that": max(gradients - (0 if graphs else sum(step.values())), 0),
    }


def render(plan: Plan) -> str:
    facts, topology, job = plan.facts, plan.topology, plan.job
    target, sizes = facts.target, job.draft.chosen.sizes(facts.target.config)
    captured = f"captures layers {list(facts.layout.captured_layers)}"
    parts: list[Table | str] = [
        f"target {job.target.path}: {', '.join(target.architectures)}, {target.parameters:,} parameters, "
        f"{target.layers} layers of {target.hidden_size}, vocabulary {target.vocab_size:,}, "
        f"{_name(facts.target_dtype)}",
        f"draft {job.draft.algorithm}: {', '.join(filter(None, [captured, sizes]))}",
    ]
    if job.prompts.holdout:
        parts.append(f"evaluation: held-out text, with {job.draft_tokens} draft tokens a forward")
    needs = [(need.role, need.what, amount(need.bytes)) for need in sorted(plan.needs, key=lambda need: need.host)]
    parts += [_rank_table(plan), *_link_lines(plan), table("memory (estimate)", "role, what, >per rank", needs)]
    for role, total in plan.demand().items():
        verdict = f"of {amount(plan.limit)}: {'fits' if total <= plan.limit else 'does NOT fit'}"
        parts.append(f"{role}: {amount(total)} {verdict if plan.on_gpus else 'a rank'}")
    if not plan.fits:
        parts.append(_advice(plan))
    if topology.mode == "split" and (line := _buffer_line(plan)):
        parts.append(line)
    if job.draft.cuda_graphs and len(topology.draft_ranks) > 1:
        parts.append("draft.cuda_graphs: draft ranks reduce their gradients after the backward, beside nothing")
    if topology.draft and plan.on_gpus:
        parts.append(_grace_line(plan))
    return plain(parts, 110)


def _buffer_line(plan: Plan) -> str:
    """Where the receive buffer keeps the target's replicas waiting for each other: what it would take. As many slots as
    half the replicas, of all pods together, keep 98 % of their rate (`specdist bench scheduler`)."""
    job, replicas = plan.job, len(plan.topology.replicas)
    slots = jobs.slots(job, plan.facts.layout)
    wanted = job.train.accumulation + -(-replicas // (2 * plan.topology.pods))
    if slots >= wanted:
        return ""
    memory = wanted * job.prompts.tokens_per_rank * sum(row_bytes(plan.facts.layout, job.channel.dtype))
    return (
        f"receive buffer: {slots} slots are few for {replicas} replicas, of which the quick will wait for the slow: "
        f"{wanted} slots take channel.memory={-(-memory // 2**20)}MiB"
    )


def _rank_table(plan: Plan) -> Table:
    topology, rows = plan.topology, []
    scheduled = topology.mode in ("split", "target_only") and plan.job.world.role != "target"
    for rank, host in enumerate(topology.hosts):
        target, draft = topology.target_place(rank), topology.draft_place(rank)
        role = " + ".join(name for name, place in (("target", target), ("draft", draft)) if place)
        where: list[int | str] = [target.replica, target.tp] if target else ["", ""]
        where += [draft.dp, draft.cp] if draft else ["", ""]
        scheduler = "scheduler" if rank == topology.scheduler_rank and scheduled else ""
        rows.append((str(rank), host, role, *map(str, where), scheduler))
    return table("ranks", "rank, host, role, replica, tp, dp, cp, ", rows)


def _link_lines(plan: Plan) -> list[str]:
    layout, topology, tp = plan.facts.layout, plan.topology, plan.job.target.tp
    dtype = plan.job.channel.dtype
    every, taught = row_bytes(layout, dtype)
    kind = "FP8 and scales" if dtype == "fp8" else _name(layout.dtype)
    lines = [
        f"{every:,} B of features per token: {len(layout.captured_layers)} captured layers x {layout.hidden_size} x "
        f"{kind}"
    ]
    if taught:
        argmax = f", with {ARGMAX_LSE_BYTES} B of its argmax and log-sum-exp" if layout.argmax_lse else ""
        lines[0] += f"; and {taught:,} B of the last hidden state{argmax}, per token that the loss compares with it"
    if plan.job.world.role != "both":
        over = plan.job.channel.transport
        return [*lines, f"links: between every target rank and every draft rank of the other worlds, over {over}"]
    if not topology.links:
        return [*lines, "no links: features stay on the rank that computes them"]
    tokens = plan.job.prompts.tokens_per_rank
    if topology.pods > 1:
        most = max(map(len, topology.reach))
        lines.append(
            f"{topology.pods} pods of {topology.shards} data-parallel draft ranks, a batch for each in turn; a replica "
            f"computes for {'all' if most == topology.pods else f'up to {most}'} of them"
        )
    return [
        *lines,
        f"{len(topology.links)} links: target ranks {ranges(topology.target_ranks)} -> draft ranks "
        f"{ranges(topology.draft_ranks)}; each carries 1/{tp} of the shard of its draft rank, up to "
        f"{tokens * (every + taught) / tp / 2**20:,.1f} MiB per batch",
    ]


def grace(plan: Plan) -> tuple[float, float, float]:
    """Estimated seconds from a request to stop until the work is on the disk: of the step that is under way, of copying
    the state of a draft rank, and of writing the whole."""
    job, facts = plan.job, plan.facts
    state = state_bytes(job.draft, facts.target.config, job.optimizer)
    shards = len(plan.topology.draft_ranks) if job.draft.sharding == "fsdp" else job.draft.cp
    step = job.train.accumulation * job.prompts.tokens_per_rank / estimated(job, facts).draft
    return step, state / shards / _COPY, state / _WRITE


def _grace_line(plan: Plan) -> str:
    step, copy, write = grace(plan)
    total, ahead = step + copy + write, plan.job.launch.stop_before_end_s
    parts = f"a step {step:.1f} s, copying the state {copy:.1f} s, writing it {write:.0f} s at {_WRITE / 1e9:.0f} GB/s"
    line = (
        f"stop: about {total:.0f} s from the request until the work is saved ({parts}; estimates). Slurm "
        f"gives KillWait after scancel ({_KILL_WAIT_S} s by default), GraceTime before a preemption, and the time "
        f"limit is told launch.stop_before_end_s={ahead:g} s ahead"
    )
    if total > min(_KILL_WAIT_S, ahead):
        line += ": too little. Ask for a longer KillWait and GraceTime, and raise launch.stop_before_end_s"
    return line


def _advice(plan: Plan) -> str:
    roles = [role for role, total in plan.demand().items() if total > plan.limit]
    advice = {
        "target": "raise target.tp, or lower prompts.tokens_per_rank or draft.pod (a batch has the tokens of a pod)",
        "draft": "raise draft.dp with draft.sharding=fsdp, or lower prompts.tokens_per_rank or channel.memory",
        "target + draft": "use world.mode=split, or lower prompts.tokens_per_rank",
    }
    return "\n".join(f"{role}: {advice[role]}" for role in roles)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
