# SPDX-License-Identifier: Apache-2.0
"""How features travel from the target to the draft."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from specdist.core.errors import ConfigError, check_range

ChannelDtype = Literal["auto", "fp8"]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_RDMA_DEVICES = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class MooncakeConfig:
    """How Mooncake's Transfer Engine moves features."""

    protocol: Literal["auto", "rdma", "tcp"] = "auto"
    """auto takes rdma where the host has an InfiniBand or RoCE device, else tcp. All ranks must come to the same."""
    devices: tuple[str, ...] = ()
    """RDMA devices to use, such as mlx5_0; empty: those that Mooncake finds near the memory."""
    memory: Literal["auto", "device", "host"] = "auto"
    """Where the receive buffers of ranks on GPUs are. device: in the GPU's memory, which the network card reads and
    writes (GPUDirect RDMA; over tcp Mooncake copies). host: in page-locked memory, to and from which this project
    copies. auto: device over rdma where the GPU and the host allow it, else host."""
    stall_s: int = 30
    """A transfer that has not moved for this many seconds has failed (tcp)."""

    def __post_init__(self) -> None:
        check_range("channel.mooncake", self, "stall_s", least=1)

    def chosen_protocol(self) -> Literal["rdma", "tcp"]:
        """What `protocol` means on this host."""
        if self.protocol != "auto":
            return self.protocol
        return "rdma" if _RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir()) else "tcp"


@dataclass(frozen=True)
class ChannelConfig:
    """The transport of features and the memory it may use."""

    transport: str = "auto"
    """What carries features: auto is nccl between GPUs and gloo between CPUs; mooncake writes over RDMA or TCP into the
    draft ranks' receive buffers. gloo and mooncake stage GPUs' features through the host. Plugins add others."""
    memory: str = "2GiB"
    """Receive buffer of one draft rank, for example 512MiB or 4GiB. It holds whole micro-batches of
    prompts.tokens_per_rank tokens; batches in flight never exceed it."""
    dtype: ChannelDtype = "auto"
    """How hidden states travel: as the target computes them (auto), or in half of bfloat16's bytes, rounded to FP8
    (e4m3) in a scale for every layer of every token. Colocated ranks round them alike: a run may go on in any mode."""
    send_buffers: int = 2
    """Buffers on a target rank, each one packed forward: 2 let the next forward run while the last one is sent."""
    cache: str | None = None
    """A directory of each target host, on its NVMe or in /dev/shm, where the target keeps the hidden states of
    sequences: later epochs read them instead of computing them. It may fill up, or fail: the rest is computed."""
    cache_bytes: str = "64GiB"
    """What a job keeps in channel.cache on a host. What earlier runs have left in it makes room."""
    mooncake: MooncakeConfig = field(default_factory=MooncakeConfig)
    """Options of transport=mooncake."""

    def __post_init__(self) -> None:
        parse_bytes(self.memory, "channel.memory")
        parse_bytes(self.cache_bytes, "channel.cache_bytes")
        check_range("channel", self, "send_buffers", least=1)


def parse_bytes(text: str, key: str) -> int:
    """'4GiB', '512 MB', '1048576' as a number of bytes (units are powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError.at(key, f": '{text}' is not an amount of memory; write for example 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
