# SPDX-License-Identifier: Apache-2.0
"""The channel between target and draft ranks: GB/s, its share of the raw transport's, and what it costs the compute.

    specdist bench channel                                            # a target and a draft rank, NCCL or gloo
    specdist bench channel --transport gloo mooncake --payload 1 64   # MiB over every link
    specdist bench channel --target-ranks 4 --tp 2 --draft-ranks 4 channel.memory=4GiB

Training's own loops move items, in a torchrun world on this machine: the scheduler, the target's producer, the sender,
the receiver and the draft's source of features. The limit is measured in turns with them: isend and irecv of the same
size between the same ranks in the same groups, 2 in flight and as many as the ring has slots, of which the faster
counts (over NCCL all are queued at once); for Mooncake the Transfer Engine's writes from host memory. What arrives is
compared bit by bit in a pass of its own. GB are 1e9 bytes of all links together, and the median of the repeats counts.

With `--products N` (the default on GPUs) each rank also computes, for each item, N products of bf16 matrices, whose
operations are those of a forward of an 8B model. `target` and `draft` are the shares of the time in which the device of
the idlest rank of each side had no product to run, and `exposed` is that of the busier side, less the same without
transfers: the slower side does not wait for the faster one, so transfers are what it waits for. `slower` is by how much
the products of all ranks together got slower beside transfers. (Shares and sums, because a device that throttles may
make one side faster and the other one slower from pass to pass.)

The words `key=value` are keys of the configuration's `channel` section, such as channel.memory, a draft rank's ring,
and channel.send_buffers. Prints JSON, then a table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.channel_rank import PRODUCTS, ChannelRun, ChannelSection, ChannelSpeed
from benchmarks.measure import (
    apart,
    as_command,
    command_line,
    count,
    count_or_none,
    device_of,
    device_options,
    in_a_world,
    positive,
    table,
)
from specdist.channel.registry import transport_for
from specdist.core import config as configuration
from specdist.core.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("channel", __doc__)
    parser.add_argument("--transport", nargs="+", default=["auto"], metavar="NAME", help="auto, nccl, gloo, mooncake")
    parser.add_argument("--target-ranks", type=count, default=1, metavar="N")
    parser.add_argument("--tp", type=count, default=1, metavar="N", help="target ranks of a replica")
    parser.add_argument("--draft-ranks", type=count, default=1, metavar="N")
    parser.add_argument(
        "--payload",
        nargs="+",
        type=positive,
        default=[1, 4, 16, 64, 256],
        metavar="MIB",
        help="of an item, over a link",
    )
    parser.add_argument(
        "--moved", type=positive, metavar="MIB", help="over a link in a repeat (nccl: 65536, others: 256)"
    )
    parser.add_argument("--hidden", type=count, default=4096, help="a token's row is 4 hidden states in bf16")
    parser.add_argument(
        "--products", type=count_or_none, metavar="N", help=f"of matrices, an item (GPU: {PRODUCTS}, CPU: 0)"
    )
    device_options(parser)
    options, words = apart(arguments)
    args = parser.parse_args(options)
    device_of(args.device)
    if args.target_ranks % args.tp:
        raise ConfigError(f"--tp {args.tp} does not divide --target-ranks {args.target_ranks}")
    found = []
    for transport in args.transport:
        transport_for(transport).check_installed()
        own = (*words, f"channel.transport={transport}")
        run = ChannelRun(
            args.target_ranks // args.tp, args.tp, args.draft_ranks, args.payload, args.moved, args.hidden,
            args.products, args.repeats, args.device, own,
        )  # fmt: skip
        run.sizes(configuration.load(ChannelSection, [], own).channel)
        ranks = args.target_ranks + args.draft_ranks
        found += in_a_world("benchmarks.channel_rank", f"the channel ({transport})", ranks, **asdict(run))
    print(json.dumps(found))
    print(render([ChannelSpeed(**speed) for speed in found]))


def render(speeds: Sequence[ChannelSpeed]) -> str:
    """A line for every payload."""
    columns = {
        "transport": "transport:", "ranks": "ranks:", "MiB": "payload_mib:,.3g", "GB/s": "gb_per_s:.2f",
        "limit": "limit_gb_per_s:.2f", "of it": "ratio:.0%", "spread": "spread:.0%", "compute ms": "compute_ms:.2f",
        "exposed": "exposed:.1%", "target": "target_idle:.1%", "draft": "draft_idle:.1%", "slower": "slower:.1%",
    }  # fmt: skip
    note = "limit: the transport alone, in the same run; GB are 1e9 bytes, of all links together"
    return f"{table(columns, speeds)}\n{note}"


if __name__ == "__main__":
    as_command(main)
