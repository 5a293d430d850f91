# SPDX-License-Identifier: Apache-2.0
"""Options of the Mooncake channel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specdist.core.errors import ConfigError

_RDMA_DEVICES = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class MooncakeConfig:
    """How Mooncake's Transfer Engine moves features."""

    protocol: Literal["auto", "rdma", "tcp"] = "auto"
    """auto takes rdma where the host has an InfiniBand or RoCE device, else tcp. All ranks must come to the same."""
    devices: tuple[str, ...] = ()
    """RDMA devices to use, such as mlx5_0; empty: those that Mooncake finds near the memory."""
    memory: Literal["auto", "device", "host"] = "auto"
    """Where the rings of ranks on GPUs lie. device: in the GPU's memory, which the network card reads and writes
    (GPUDirect RDMA; over tcp Mooncake copies). host: in page-locked memory, to and from which this project copies.
    auto: device over rdma where the GPU and the host allow it, else host."""
    stall_s: int = 30
    """A transfer that has not moved for so many seconds has failed (tcp)."""

    def __post_init__(self) -> None:
        if self.stall_s < 1:
            raise ConfigError.at("channel.mooncake.stall_s", f"is at least 1, not {self.stall_s}")

    def chosen_protocol(self) -> Literal["rdma", "tcp"]:
        """What `protocol` means on this host."""
        if self.protocol != "auto":
            return self.protocol
        return "rdma" if _RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir()) else "tcp"
