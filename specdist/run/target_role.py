# SPDX-License-Identifier: Apache-2.0
"""The role of a target rank: wires the engine, the sender and the producer's loop."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Literal

from specdist.channel.base import FeatureSender
from specdist.channel.drop import DropSender
from specdist.core.attempts import Ending
from specdist.core.files import write_atomically
from specdist.job import config as jobs
from specdist.run.context import Rank
from specdist.run.target_loop import Producer
from specdist.scheduler.messages import Produced, ProducerReport


def produce(rank: Rank) -> None:
    """The role of a target rank."""
    job, topology = rank.job, rank.topology
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
        jobs.slots(job, layout),
        job.target.verify,
        rank.timeout_s,
        rank.profile,
    )
    rank.client.ready()
    report = producer.run()
    if topology.mode == "split":
        rank.client.send(Produced(report))
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
