# SPDX-License-Identifier: Apache-2.0
"""The role of a target rank: wires the engine, the sender and the producer's loop."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Literal

import torch
import torch.distributed as dist

from specdist.channel.base import FeatureSender
from specdist.channel.drop import DropSender
from specdist.core.attempts import Ending
from specdist.core.files import write_atomically
from specdist.run.context import Rank
from specdist.run.target_loop import Producer, ProducerReport


def produce(rank: Rank) -> None:
    """The role of a target rank."""
    job, topology, place = rank.job, rank.topology, rank.topology.target_place(rank.rank)
    assert place is not None
    item_rows = topology.shards * job.prompts.tokens_per_rank
    engine = rank.load_engine(item_rows)
    layout, device = rank.facts.layout, rank.world.device
    sender: FeatureSender
    if topology.mode == "target_only":
        sender = DropSender(layout, item_rows, device)
    else:
        sender = rank.transport.sender(rank.wire(), item_rows, None)
        rank.client.phase = "connecting to the draft ranks"
        sender.connect(job.control.load_timeout_s, rank.client.check)
    producer = Producer(
        engine,
        sender,
        rank.client,
        rank.items(),
        rank.prompts,
        place,
        job.target.verify,
        rank.timeout_s,
        rank.profile,
    )
    rank.client.ready()
    report = producer.run()
    if topology.mode == "split" and place.tp == 0:
        _send_report(rank, report)
    elif topology.mode == "target_only" and rank.rank == 0:
        _tell_target_only(rank, report)
        state: Literal["stopped", "finished"] = "stopped" if rank.stop else "finished"
        rank.record.end(Ending(state, rank.resume.progress.step, rank.stop.reason, rank.stop.detail))


def _tell_target_only(rank: Rank, report: ProducerReport) -> None:
    summary = {"mode": "target_only", **dataclasses.asdict(report), "tokens_per_s": report.tokens_per_s}
    write_atomically(rank.run_dir.summary, json.dumps(summary, indent=1) + "\n")
    print(
        f"specdist: target only: {report.items} items, {report.tokens:,} tokens in {report.elapsed_s:.1f} s = "
        f"{report.tokens_per_s:,.0f} tokens/s on replica 0, busy {report.busy_s / max(report.elapsed_s, 1e-9):.0%}",
        file=sys.stderr,
        flush=True,
    )


def _send_report(rank: Rank, report: ProducerReport) -> None:
    """Tell the first draft rank what this target rank did; over the ranks' own connections, for the store goes with the
    launcher, or with rank 0."""
    figures = torch.tensor(dataclasses.astuple(report), dtype=torch.float64)
    dist.send(figures, rank.topology.draft_ranks[0], group=rank.groups.control)


def receive_reports(rank: Rank) -> list[ProducerReport]:
    """What the first rank of each target replica did; they report when the scheduler stops them."""
    if rank.job.world.role == "draft":
        assert rank.server is not None
        return [ProducerReport(*dataclasses.astuple(report)) for report in rank.server.reports(rank.timeout_s)]
    if rank.topology.mode != "split":
        return []
    reports = []
    for replica in rank.topology.replicas:
        figures = torch.tensor(dataclasses.astuple(ProducerReport()), dtype=torch.float64)
        dist.recv(figures, replica[0], group=rank.groups.control)
        items, tokens, *seconds = figures.tolist()
        reports.append(ProducerReport(int(items), int(tokens), *seconds))
    return reports
