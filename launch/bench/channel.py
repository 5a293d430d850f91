# SPDX-License-Identifier: Apache-2.0
"""The channel between target and draft ranks: GB/s, its share of the raw transport's, and what it costs the compute.

    specdist bench channel                                            # a target and a draft rank, NCCL or gloo
    specdist bench channel --transport gloo mooncake --payload 1 64   # MiB over every link
    specdist bench channel --target-ranks 4 --tp 2 --draft-ranks 4 channel.memory=4GiB

The project's own sender and receiver move items through their rings, in a torchrun world on this machine. Its limit is
measured in turns with it: isend and irecv of the same size between the same ranks in the same groups, 2 in flight and
as many as the ring has slots, of which the faster counts (over NCCL all are queued at once); for Mooncake the Transfer
Engine's writes from host memory. What arrives is compared bit by bit in a pass of its own. GB are 1e9 bytes and those
of all links together, a figure is the median of the repeats.

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

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from specdist.channel.mooncake import engine as mooncake
from specdist.core import config as configuration
from specdist.core.errors import ConfigError
from specdist_launch.bench.channel_measure import PRODUCTS, BenchConfig, ChannelSpeed, Run
from specdist_launch.bench.measure import apart, in_a_world


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="specdist bench channel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", nargs="+", choices=["auto", "nccl", "gloo", "mooncake"], default=["auto"])
    parser.add_argument("--target-ranks", type=int, default=1, metavar="N")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="target ranks of a replica")
    parser.add_argument("--draft-ranks", type=int, default=1, metavar="N")
    parser.add_argument(
        "--payload", nargs="+", type=float, default=[1, 4, 16, 64, 256], metavar="MIB", help="of an item, over a link"
    )
    parser.add_argument("--moved", type=float, metavar="MIB", help="over a link in a repeat (nccl: 65536, others: 256)")
    parser.add_argument("--hidden", type=int, default=4096, help="a token's row is 4 hidden states in bf16")
    parser.add_argument("--products", type=int, metavar="N", help=f"of matrices, an item (GPU: {PRODUCTS}, CPU: 0)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options, words = apart(arguments)
    args = parser.parse_args(options)
    for name in ("target_ranks", "tp", "draft_ranks", "repeats"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if min(args.payload) <= 0:
        raise ConfigError(f"--payload {min(args.payload):g}: it must be more than 0 MiB")
    if args.target_ranks % args.tp:
        raise ConfigError(f"--tp {args.tp} does not divide --target-ranks {args.target_ranks}")
    if "mooncake" in args.transport:
        mooncake.check_installed()
    speeds = []
    for transport in args.transport:
        own = (*words, f"channel.transport={transport}")
        configuration.load(BenchConfig, [], own)
        run = Run(
            args.target_ranks // args.tp, args.tp, args.draft_ranks, tuple(args.payload), args.moved, args.hidden,
            args.products, args.repeats, args.device, own,
        )  # fmt: skip
        ranks = args.target_ranks + args.draft_ranks
        speeds += in_a_world(
            "specdist_launch.bench.channel_measure", f"the channel ({transport})", ranks, run=asdict(run)
        )
    print(json.dumps(speeds))
    print(render([ChannelSpeed(**speed) for speed in speeds]))


def render(speeds: Sequence[ChannelSpeed]) -> str:
    """A line for every payload."""
    head = (
        f"{'transport':<10}{'ranks':>8}{'MiB':>9}{'GB/s':>9}{'limit':>9}{'of it':>7}{'spread':>8}"
        f"{'compute ms':>12}{'exposed':>9}{'target':>8}{'draft':>8}{'slower':>8}"
    )

    def percent(share: float | None, width: int) -> str:
        return f"{'-':>{width}}" if share is None else f"{share:>{width}.1%}"

    rows = [
        f"{s.transport:<10}{f'{s.target_ranks}+{s.draft_ranks}':>8}{s.payload_mib:>9,.3g}{s.gb_per_s:>9.2f}"
        f"{s.limit_gb_per_s:>9.2f}{s.ratio:>7.0%}{s.spread:>8.0%}"
        f"{'-' if s.compute_ms is None else f'{s.compute_ms:.2f}':>12}"
        f"{percent(s.exposed, 9)}{percent(s.target_idle, 8)}{percent(s.draft_idle, 8)}{percent(s.slower, 8)}"
        for s in speeds
    ]
    return "\n".join(
        [head, *rows, "limit: the transport alone, in the same run; GB are 1e9 bytes, of all links together"]
    )
