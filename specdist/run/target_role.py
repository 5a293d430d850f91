# SPDX-License-Identifier: Apache-2.0
"""The role of a target rank: wires the engine, the sender and the producer's loop."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from specdist.channel.base import DropSender, FeatureSender
from specdist.channel.encoding import Plain
from specdist.channel.ring import Ring
from specdist.core.attempts import Ending
from specdist.core.files import to_json, write_atomically
from specdist.run.context import RankContext
from specdist.run.target_loop import Producer
from specdist.scheduler.messages import Produced, ProducerReport


def produce(context: RankContext) -> None:
    """The role of a target rank."""
    job, topology = context.job, context.topology
    item_tokens = topology.shards * job.prompts.tokens_per_rank
    context.begin("loading the target")
    engine = context.load_engine(item_tokens)
    layout = context.facts.layout
    sender: FeatureSender
    if topology.mode == "target_only":
        encoding = Plain(layout)
        sender = DropSender(Ring(layout, 1, item_tokens, context.world.device))
    else:
        encoding, sender = context.sender(context.client)
        context.begin("connecting to the draft ranks")
        sender.connect(job.control.load_timeout_s, context.client.check)
    producer = Producer(
        engine,
        sender,
        encoding,
        context.client,
        context.items(),
        context.prompts,
        job.target.verify,
        context.timeout_s,
        context.profile,
        alone=job.target.tp == 1,
        in_turn=topology.mode == "split" and job.target.tp > 1 and not context.transport.one_sided,
    )
    context.client.ready()
    context.started()
    report = producer.run()
    if topology.mode == "split":
        context.client.send(Produced(report))
    elif topology.mode == "target_only" and context.rank == 0:
        _report_target_only(context, report)
        state: Literal["stopped", "finished"] = "stopped" if context.stop else "finished"
        context.record.end(Ending(state, context.resume.progress.step, context.stop.reason, context.stop.detail))


def _report_target_only(context: RankContext, report: ProducerReport) -> None:
    summary = {"mode": "target_only", **dataclasses.asdict(report), "tokens_per_s": report.tokens_per_s}
    write_atomically(context.run_dir.summary, to_json(summary))
    print(
        f"specdist: target only: {report.items} batches, {report.tokens:,} tokens in {report.elapsed_s:.1f} s = "
        f"{report.tokens_per_s:,.0f} tokens/s on replica 0, busy {report.busy_s / max(report.elapsed_s, 1e-9):.0%}",
        file=sys.stderr,
        flush=True,
    )
